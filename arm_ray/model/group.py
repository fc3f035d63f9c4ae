"""A layer group as a function of its weights, which also tells of its modules' inputs.

The architecture is Hugging Face's own: the model is built once on the `meta` device, and its
decoder is called with the layers of one group and with the group's tensors. No decoder is written
by hand. Whatever it does before its first layer, such as scaling the embedding, is done in the
first group; in the others its result is replaced by the hidden states that come from the group
before. Nothing after the group's last layer is run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arm_ray.model.activations import GroupOutput, MaskedMeans, Wanted
from arm_ray.model.architecture import Architecture, Weight, architecture_of
from arm_ray.model.experts import ExpertInputs
from arm_ray.model.layout import LayerGroup, ModelLayout

_MEANS, _NOTHING = Wanted(), torch.empty(0)


class Decoder:
    """Runs the layer groups of a model, its last norm and its head, without holding weights.

    Args:
        layout: The model.
        device: Where the forward passes run.
        dtype: Of weights and hidden states in them.

    Attributes:
        device: Where the forward passes run.
        dtype: Of weights and hidden states in them.
    """

    def __init__(self, layout: ModelLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._layout = device, dtype, layout
        self._averages = MaskedMeans()
        self._runners: dict[int, GroupRunner] = {}

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The model on the `meta` device, which the weights are put into for a call.

        It is built when it is first wanted: merges without forward passes never do.
        """
        architecture = architecture_of(self._layout.config, self._layout.class_name, self.dtype)
        architecture.on(self.device)
        return architecture

    @functools.cached_property
    def _weights(self) -> dict[str, Weight]:
        """First name in the files -> tensor of the model."""
        return {w.stored[0]: w for w in self.architecture.weights(self._layout.shapes)[0]}

    @functools.cached_property
    def _strict(self) -> frozenset[str]:
        """Tensors of the files that stay float32 in forward passes of another dtype."""
        return frozenset(
            name
            for weight in self._weights.values()
            if any(map(self.architecture.kept_in_float32, weight.names))
            for name in weight.stored
        )

    def dtype_of(self, name: str) -> torch.dtype:
        """What forward passes take a tensor of the files in."""
        return torch.float32 if name in self._strict else self.dtype

    def runner(self, index: int) -> GroupRunner:
        """What runs a layer group."""
        if index not in self._runners:
            group = self._layout.groups[index]
            weights = [
                weight
                if weight.experts and self._layout.rotated.issuperset(weight.stored)
                else replace(weight, experts=())
                for weight in (self._weights.get(name) for name in group.tensors)
                if weight is not None
            ]
            self._runners[index] = GroupRunner(
                self.architecture, group, weights, self._averages, self._layout.transposed
            )
        return self._runners[index]

    def form(
        self, names: Collection[str], read: Callable[[str, torch.dtype], Tensor]
    ) -> dict[str, Tensor]:
        """A layer group's tensors as forward passes take them.

        Args:
            names: Of the tensors in the files.
            read: Gives one of them in a dtype, on the device.

        Returns:
            Name -> tensor: that of the file, or, where several tensors of a file are one of the
            model, that of the model.
        """
        formed: dict[str, Tensor] = {}
        for weight in [self._weights[name] for name in names if name in self._weights]:
            tensors = {name: read(name, self.dtype_of(name)) for name in weight.stored}
            formed |= tensors if weight.make is None else weight.make(tensors)
        return formed

    @torch.no_grad()
    def embed(self, rows: Tensor, batch: tuple[int, int]) -> Tensor:
        """Hidden states `[batch, tokens, hidden]` before the decoder.

        Args:
            rows: `[batch * tokens, hidden]` in the compute dtype: of the embedding, for each token.
            batch: Number of samples, and of tokens of each.
        """
        name, _, _ = self.architecture.embedding.rpartition(".")
        module = self.architecture.model.get_submodule(name)
        ids = torch.arange(len(rows), device=rows.device).view(batch)
        result: Tensor = torch.func.functional_call(module, {"weight": rows}, (ids,), strict=False)
        return result

    @torch.no_grad()
    def final_norm(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What the decoder does after its last layer, of the shape of `hidden`.

        Args:
            weights: Those of `ModelLayout.tail`, in the compute dtype, on the device.
            hidden: `[batch, tokens, hidden]`, the last layer's output.
        """
        architecture = self.architecture
        last = architecture.num_layers - 1
        clone, [layer] = _with_layers(architecture, range(last, last + 1))
        # Whatever this layer is given, what follows gets `hidden`.
        given = self.runner(len(self._layout.groups) - 1).like_output(hidden)
        layer.forward = lambda *_args, **_kwargs: given
        result = torch.func.functional_call(
            clone,
            {self._inside(name): tensor for name, tensor in self._by_model(weights).items()},
            kwargs={"inputs_embeds": hidden, "use_cache": False},
            strict=False,
        )
        found: Tensor = result.last_hidden_state
        return found

    @torch.no_grad()
    def logits(self, weights: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        """The head's `[batch, tokens, vocabulary]`, with whatever the model does to them.

        Args:
            weights: Those of `ModelLayout.head`, in the compute dtype, on the device.
            normed: `[batch, tokens, hidden]`, what `final_norm` gave.
        """
        architecture = self.architecture
        owner, _, name = architecture.head_module.rpartition(".")
        model = copy.copy(architecture.model.get_submodule(owner))
        model._modules = dict(model._modules)
        inside = architecture.decoder.removeprefix(owner).lstrip(".")
        setattr(model, inside.partition(".")[0], _Known(normed))
        # A tied head's weight has the embedding's name.
        by_name = {
            f"{name}.{old.rpartition('.')[2]}": tensor
            for old, tensor in self._by_model(weights).items()
        }
        kwargs = {"inputs_embeds": normed, "use_cache": False}
        found: Tensor = torch.func.functional_call(
            model, by_name, None, kwargs, strict=False
        ).logits
        return found

    def _by_model(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same under the model's names."""
        return {self._weights[name].names[0]: tensor for name, tensor in weights.items()}

    def _inside(self, name: str) -> str:
        return name.removeprefix(f"{self.architecture.decoder}.")


class _Known(nn.Module):
    """Stands for a decoder whose output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> _Output:
        return _Output(self._hidden)


class _Output:
    """What a decoder returns: its hidden states, and nothing of what families have beside them."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, _name: str) -> None:
        return None


class _FinishedError(Exception):
    """The last layer of a group has been run."""


class GroupRunner:
    """Runs the decoder layers of one group.

    Args:
        architecture: The model.
        group: The group.
        weights: The group's tensors, in the model and in the files.
        averages: Makes means of activations; one for all groups, whose buffer they share.
        transposed: Experts' weights that are `[experts, d_in, d_out]`.
    """

    def __init__(
        self,
        architecture: Architecture,
        group: LayerGroup,
        weights: Sequence[Weight],
        averages: MaskedMeans,
        transposed: Collection[str] = (),
    ) -> None:
        self._averages, self._wanted, self._output = averages, Wanted(), GroupOutput(_NOTHING)
        self._given, self._tuple_size = _NOTHING, 0
        span = range(group.first_layer, group.end_layer)
        self._decoder, layers = _with_layers(architecture, span)
        inside = architecture.layers.removeprefix(architecture.decoder).strip(".")
        # Name in the decoder's layers here -> what `Decoder.form` calls it.
        self._names: dict[str, str] = {}
        self._experts: dict[str, tuple[tuple[tuple[str, ...], ...], bool]] = {}
        files: dict[str, tuple[str, ...]] = {}
        for weight in weights:
            for name in weight.names:
                number = architecture.layer_number(name)
                if number is None:
                    continue
                rest = name.removeprefix(f"{architecture.layers}.{number}.")
                local = f"{inside}.{number - group.first_layer}.{rest}"
                self._names[local] = weight.stored[0] if weight.make is None else name
                files[name] = weight.stored
                if weight.experts:
                    self._experts[local] = (weight.experts, weight.stored[0] in transposed)
        for number, layer in zip(span, layers, strict=True):
            self._watch(layer, number, f"{architecture.layers}.{number}", files)
        if group.first_layer > 0:
            layers[0].register_forward_pre_hook(self._replace_input, with_kwargs=True)
        layers[-1].register_forward_hook(self._end)

    @torch.no_grad()
    def forward(
        self,
        weights: Mapping[str, Tensor],
        hidden: Tensor,
        lengths: Tensor,
        wanted: Wanted = _MEANS,
    ) -> GroupOutput:
        """Run the group on one micro-batch.

        Args:
            weights: The group's tensors as `Decoder.form` gives them.
            hidden: `[batch, tokens, hidden]`: the embedding's, or the group's before; right-padded.
            lengths: `[batch]` int64 number of real tokens of each sample.
            wanted: What to keep beside the hidden states.
        """
        self._averages.start(hidden, lengths)
        self._wanted, self._output, self._given = wanted, GroupOutput(hidden), hidden
        local = {local: weights[name] for local, name in self._names.items()}
        watched: Any = contextlib.nullcontext()
        if self._experts and wanted.means:
            experts = [(local[name], *parts) for name, parts in self._experts.items()]
            watched = ExpertInputs(experts, lengths, hidden.shape[1])
        # Padding is on the right and attention is causal: no real token sees it, so no mask.
        with contextlib.suppress(_FinishedError), watched:
            kwargs = {"inputs_embeds": hidden, "use_cache": False}
            torch.func.functional_call(self._decoder, local, None, kwargs, strict=False)
        self._averages.end()
        if isinstance(watched, ExpertInputs):
            self._output.means |= watched.means
            self._output.seen |= watched.seen
            self._output.transposed = watched.transposed
        output, self._output, self._given = self._output, GroupOutput(_NOTHING), _NOTHING
        return output

    def like_output(self, hidden: Tensor) -> Any:
        """Hidden states as the group's last layer gives them; known once it was run."""
        return (hidden, *[None] * (self._tuple_size - 1)) if self._tuple_size else hidden

    def _watch(
        self, layer: nn.Module, number: int, place: str, files: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Have a layer's modules tell of their inputs, under the names of the files."""
        for name, module in layer.named_modules():
            stored = files.get(f"{place}.{name}.weight")
            if stored and (isinstance(module, nn.Linear) or module.weight.ndim == 1):
                hook = self._input_hook(stored, isinstance(module, nn.Linear))
                module.register_forward_pre_hook(hook)
        # The MLP: experts may be parameters of no linear module.
        parts = [
            child
            for child in layer.children()
            if any(parameter.ndim >= 2 for parameter in child.parameters())
        ]
        if parts:
            parts[-1].register_forward_hook(self._output_hook(number))

    def _input_hook(self, names: tuple[str, ...], is_linear: bool) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args or not self._averages.fits(args[0]):
                return
            if self._wanted.means and is_linear:
                mean = self._averages.mean(args[0])
                self._output.means |= dict.fromkeys(names, mean)
            if self._wanted.magnitudes:
                magnitude = self._averages.magnitude(args[0])
                self._output.magnitudes |= dict.fromkeys(names, magnitude)

        return record

    def _output_hook(self, number: int) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._wanted.outputs:
                # Some experts give the tokens of all samples in one row.
                value, like = _first(output), self._given
                self._output.outputs[number] = value.reshape(*like.shape[:2], -1)

        return record

    def _replace_input(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given}

    def _end(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._output.hidden = _first(output)
        self._tuple_size = len(output) if isinstance(output, tuple) else 0
        raise _FinishedError


def _first(output: Any) -> Tensor:
    """What a module gives, where it gives something else beside it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _with_layers(architecture: Architecture, span: range) -> tuple[nn.Module, list[Any]]:
    """The decoder with some of its layers, as a copy that shares their tensors; and its layers."""
    decoder: Any = architecture.model.get_submodule(architecture.decoder)
    clone = copy.copy(decoder)
    clone._modules = dict(decoder._modules)
    layers = []
    for number in span:
        layer = copy.copy(architecture.layer_list[number])
        # Hooks of its own.
        layer._forward_hooks, layer._forward_pre_hooks = OrderedDict(), OrderedDict()
        layers.append(layer)
    name = architecture.layers.removeprefix(architecture.decoder).strip(".")
    setattr(clone, name, nn.ModuleList(layers))
    clone.config = _cut(decoder.config, span, architecture.num_layers)
    return clone, layers


def _cut(config: Any, span: range, num_layers: int) -> Any:
    """A configuration for some layers: with their entries of every list that has one for each."""
    found = copy.copy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == num_layers:
            object.__setattr__(found, key, value[span.start : span.stop])
    object.__setattr__(found, _own_key(config, "num_hidden_layers"), len(span))
    return found


def _own_key(config: Any, key: str) -> str:
    """What a family calls a setting."""
    return str((getattr(config, "attribute_map", None) or {}).get(key, key))

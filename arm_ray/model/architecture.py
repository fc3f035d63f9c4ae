"""What transformers knows of a model without its weights: its parts, and what they are called.

The model is built once on the `meta` device, which holds no data. Its own accessors say which of
its modules are the embedding, the decoder, its layers and the head. transformers' own tables say
how its tensors are called, and perhaps taken apart, in the files of a checkpoint.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arm_ray.errors import NotACheckpointError
from arm_ray.model.imports import import_model_classes, without_compiler
from arm_ray.model.meta import on_meta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What families call the number of experts of a mixture.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
# And how many of them a token is sent to.
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token")
# Modules that hold one module for each layer, in the order in which they are looked for.
_LAYER_LISTS = ("layers", "h", "blocks")
# transformers changes torch's default dtype while it builds a model, for all threads.
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, or several that are made together, and where they are on disk.

    Attributes:
        names: In the model.
        stored: In the files, in the order in which they are put together.
        make: Makes the first from the second; None: it is the same tensor.
        experts: For each expert, the names in the files of the weights that are its part of a
            parameter `[experts, …]`, or a name of its part of the one that the files hold; empty:
            there are no experts.
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    experts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A causal language model on the `meta` device, and its parts.

    Attributes:
        model: transformers' model.
        decoder: The name of its decoder in it.
        layers: The name of the list of the decoder's layers.
        embedding: The name of the embedding's weight.
        head: The name of the head's weight; None: it is the embedding.
        shapes: Name -> shape of every parameter and persistent buffer; a tied head is left out.
    """

    model: Any
    decoder: str
    layers: str
    embedding: str
    head: str | None
    shapes: Mapping[str, tuple[int, ...]]
    _conversions: tuple[list[Any], list[Any]]
    _devices: list[torch.device] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_list)

    @property
    def layer_list(self) -> nn.ModuleList:
        """The decoder's layers."""
        found: nn.ModuleList = self.model.get_submodule(self.layers)
        return found

    def layer_number(self, name: str) -> int | None:
        """The decoder layer that a tensor of the model is in, 0-based; None: in none."""
        rest = name.removeprefix(f"{self.layers}.")
        return None if rest == name else int(rest.partition(".")[0])

    @property
    def tail(self) -> tuple[str, ...]:
        """The tensors of the decoder outside of its layers and the embedding: its last norm."""
        inside = f"{self.decoder}." if self.decoder else ""
        return tuple(
            name
            for name in self.shapes
            if name.startswith(inside)
            and self.layer_number(name) is None
            and name not in (self.embedding, self.head)
        )

    @property
    def head_tensors(self) -> tuple[str, ...]:
        """The tensors of the head; the embedding, where they are tied."""
        if self.head is None:
            return (self.embedding,)
        module = self.head.rpartition(".")[0]
        return tuple(name for name in self.shapes if name.rpartition(".")[0] == module)

    @property
    def head_module(self) -> str:
        """The name of the head, which has a weight of its own or the embedding's."""
        model: nn.Module = self.model
        head = self.model.get_output_embeddings()
        names: list[str] = [name for name, module in model.named_modules() if module is head]
        return names[0]

    @property
    def tied_copy(self) -> str | None:
        """The name that a tied head's weight would have; None: it has one of its own."""
        return f"{self.head_module}.weight" if self.head is None else None

    @property
    def linear(self) -> frozenset[str]:
        """Names of the 2-D weights of the linear modules in the decoder's layers.

        Without those that choose among experts: their outputs are no activations, but scores.
        """
        text = self.model.config.get_text_config(decoder=True)
        counts = {getattr(text, key, None) for key in EXPERT_COUNTS} - {None}
        scores = {1, *counts} if counts else set[int]()
        return frozenset(
            f"{self.layers}.{name}.weight"
            for name, module in self.layer_list.named_modules()
            if isinstance(module, nn.Linear)
            and not (module.out_features in scores and re.search("gate|router", name))
        )

    def kept_in_float32(self, name: str) -> bool:
        """Whether a forward pass in another dtype has this tensor in float32, as transformers."""
        patterns = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns)

    def weights(self, stored: Iterable[str]) -> tuple[list[Weight], list[str]]:
        """How the tensors of a checkpoint become the model's.

        Args:
            stored: Their names in the files.

        Returns:
            The model's, as far as they are there, and the names of the tensors that it has no use
            for.
        """
        (renamings, converters), shapes = self._conversions, dict(self.shapes)
        plain: dict[str, str] = {}
        parts: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unknown = []
        for name in sorted(stored, key=_natural):
            target, pattern = _rename(self.model, name, renamings, converters, shapes)
            if target not in self.shapes:
                unknown.append(name)
            elif pattern is None:
                plain.setdefault(target, name)
                if plain[target] != name:
                    unknown.append(name)
            else:
                [converter] = [c for c in converters if pattern in c.source_patterns]
                parts.setdefault(target, (converter, []))[1].append((name, pattern))
        found = [
            Weight((target,), (name,), experts=self._fused_experts(target, name))
            for target, name in plain.items()
        ]
        for target, (converter, members) in parts.items():
            if target in plain:
                unknown += [name for name, _ in members]
                continue
            made = _made_of(target, converter)
            names = tuple(n for n in made if n in self.shapes)
            make = functools.partial(_convert, self.model, converter, target, tuple(members))
            experts = self._experts(names, members)
            found.append(Weight(names, tuple(name for name, _ in members), make, experts))
        return found, unknown

    def _fused_experts(self, target: str, name: str) -> tuple[tuple[str, ...], ...]:
        """The parts of each expert of a parameter that the files hold as one tensor."""
        shape = self.shapes[target]
        is_whole = len(shape) == 3 and min(shape) > 1 and self.layer_number(target) is not None
        return tuple((expert_name(name, e),) for e in range(shape[0])) if is_whole else ()

    def _experts(
        self, names: Sequence[str], members: Sequence[tuple[str, str]]
    ) -> tuple[tuple[str, ...], ...]:
        """The parts of each expert, where every stored weight is one expert's."""
        if len(names) != 1 or len(self.shapes[names[0]]) != 3:
            return ()
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in members:
            by_pattern.setdefault(pattern, []).append(name)
        count = self.shapes[names[0]][0]
        if any(len(each) != count for each in by_pattern.values()):
            return ()
        return tuple(zip(*by_pattern.values(), strict=True))

    def written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors as transformers would write them to files: name -> tensor."""
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4 writes them as they are
            return dict(tensors)
        found: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return found

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same without data: name -> shape."""
        state = {name: torch.empty(s, device="meta") for name, s in self.shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.written(state).items()}

    def on(self, device: torch.device) -> None:
        """Have what the decoder computes by itself on a device: buffers that no file holds."""
        if self._devices == [device]:
            return
        self._devices[:] = [device]
        decoder = self.model.get_submodule(self.decoder)
        for parent, name, module in list(_children(decoder)):
            missing = module._non_persistent_buffers_set
            if not missing:
                continue
            # Rotary frequencies follow from the configuration alone.
            if list(inspect.signature(type(module).__init__).parameters)[1:2] == [
                "config"
            ] and not (list(module.parameters())):
                with torch.device(device):
                    setattr(parent, name, type(module)(config=module.config))
                continue
            for buffer in missing:
                value = getattr(module, buffer)
                if value is not None:
                    module._buffers[buffer] = torch.empty_like(value, device=device)
            self.model._init_weights(module)


def expert_name(name: str, expert: int) -> str:
    """What an expert's part of a tensor of all experts is called."""
    return f"{name}[{expert}]"


def architecture_of(
    config: PretrainedConfig, class_name: str | None = None, dtype: torch.dtype = torch.float32
) -> Architecture:
    """Build a model on the `meta` device, and find its parts.

    Each call builds another: forward passes put weights into its modules for as long as they run.

    Args:
        config: Its configuration.
        class_name: transformers' class of the model, which the checkpoint names; None, or one that
            is no causal language model: the family's.
        dtype: Of forward passes.

    Raises:
        NotACheckpointError: It is no causal language model, or its parts are not where those of
            one are.
    """
    import_model_classes()
    import transformers

    config = copy.deepcopy(config)
    config.use_cache = False
    named = getattr(transformers, class_name or "", None)
    if named is None or not hasattr(named, "get_output_embeddings"):
        named = None
    with _BUILDING, without_compiler():
        model = on_meta(lambda: _built(config, named, dtype))
    if named is not None and model.get_output_embeddings() is None:
        return architecture_of(config, None, dtype)
    return _parts_of(model.eval(), config)


def has_other_head(class_name: str | None) -> bool:
    """Whether a class of transformers is of models that give no logits over the vocabulary."""
    import_model_classes()
    import transformers

    named = getattr(transformers, class_name or "", None)
    return named is not None and not re.search(r"ForCausalLM|LMHead|Generation", named.__name__)


def _built(config: Any, kind: Any, dtype: torch.dtype) -> Any:
    """A model whose attention and experts are computed as transformers itself would by default."""
    import transformers

    if kind is None:
        names = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")
        known = [auto for name in names if (auto := getattr(transformers, name, None))]
        fitting = [auto for auto in known if type(config) in auto._model_mapping]
        if not fitting:
            raise _unknown(config, "transformers has no causal language model of it")
        kind = fitting[0]._model_mapping[type(config)]
    text = config.get_text_config(decoder=True)
    if kind.config_class is not type(config) and kind.config_class is type(text):
        config = text
    # Each expert's product by itself, which can be seen; see `arm_ray.model.experts`.
    config._experts_implementation = text._experts_implementation = "eager"
    make = kind._from_config
    try:
        return make(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
            raise
        return make(config, dtype=dtype, attn_implementation="eager")


def _parts_of(model: Any, config: Any) -> Architecture:
    if getattr(config, "is_encoder_decoder", False):
        raise _unknown(config, "it has an encoder")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise _unknown(config, "it has no embedding and head of tokens")
    decoder, layers = _find_layers(model.get_decoder(), embedding, config)
    names = {module: name for name, module in model.named_modules()}
    kept = model.state_dict().keys()
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in kept
    }
    return Architecture(
        model,
        names[decoder],
        names[layers],
        f"{names[embedding]}.weight",
        None if head.weight is embedding.weight else f"{names[head]}.weight",
        shapes,
        _conversions(model),
    )


def _find_layers(
    module: nn.Module, embedding: nn.Module, config: Any
) -> tuple[nn.Module, nn.ModuleList]:
    """The module that has a list of as many layers as the model, and the list."""
    count = int(config.get_text_config(decoder=True).num_hidden_layers)
    for name in _LAYER_LISTS:
        found = getattr(module, name, None)
        if isinstance(found, nn.ModuleList) and len(found) == count:
            return module, found
    # Where transformers' accessor stops at a model around it.
    inner = [c for c in module.children() if c is not embedding and embedding in c.modules()]
    if len(inner) != 1:
        raise _unknown(config, "its decoder has no list of layers")
    return _find_layers(inner[0], embedding, config)


def _unknown(config: Any, why: str) -> NotACheckpointError:
    return NotACheckpointError(
        "the model is no decoder that forward passes are known for",
        got=f"model_type {config.model_type!r}: {why}",
        expected="a causal language model",
    )


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """All modules below one, with the module and the name that each hangs on."""
    for name, child in module.named_children():
        yield module, name, child
        yield from _children(child)


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Transformers' renamings and converters of a model's tensors; 4 has no such tables."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    found = get_model_conversion_mapping(model)
    return (
        [each for each in found if isinstance(each, WeightRenaming)],
        [each for each in found if isinstance(each, WeightConverter)],
    )


def _rename(
    model: Any, name: str, renamings: list[Any], converters: list[Any], state: dict[str, Any]
) -> tuple[str, str | None]:
    """The model's name of a tensor in the files, and the pattern of the converter it goes to."""
    if not renamings and not converters:
        return name, None
    from transformers.core_model_loading import rename_source_key

    found: tuple[str, str | None] = rename_source_key(
        name, renamings, converters, model.base_model_prefix, state
    )
    return found


def _made_of(target: str, converter: Any) -> list[str]:
    """All names that a converter makes beside `target`, which it calls by its first pattern."""
    first = converter.target_patterns[0]
    return [target.replace(first, pattern, 1) for pattern in converter.target_patterns]


def _convert(
    model: Any,
    converter: Any,
    target: str,
    members: Sequence[tuple[str, str]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    own = copy.deepcopy(converter)
    for name, pattern in members:
        own.add_tensor(target, name, pattern, tensors[name])
    made = own.convert(target, model=model, config=model.config)
    return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts the numbers in a name by their value, as experts are put together."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]

"""A layer group as a function of its weights, which also tells of its modules' inputs.

The architecture is Hugging Face's own: the decoder is built once on the `meta` device with as many
layers as the group has, and called with the group's tensors. No decoder is written by hand.

**Activations.** ARM needs, for each linear module, the mean over a sample's tokens of the
module's output. A linear module's mean output is its output at the mean input:
`mean_t(W x_t + b) = W mean_t(x_t) + b`. So only mean inputs are collected while the forward
pass runs, once for modules that share an input (q/k/v; gate/up), and the outputs follow with one
small product per weight (`output_shifts`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arm_ray.model.layout import EMBEDDING, LayerGroup, ModelLayout, is_layer_tensor

# Elements of an activation that are in float32 at once, in a buffer that is used again: writing to
# new memory would cost more than the sum itself. Few on a CPU, so that they stay in cache; many on
# a GPU, where each operation costs a launch.
_FLOAT32_ELEMENTS, _FLOAT32_ELEMENTS_GPU = 1 << 20, 1 << 27


@dataclass(frozen=True)
class Wanted:
    """What a forward pass is to leave behind.

    Attributes:
        means: Mean inputs of the linear modules.
        magnitudes: Mean magnitudes of the inputs of linear modules and norms.
        outputs: What each layer's MLP adds to the residual stream.
    """

    means: bool = True
    magnitudes: bool = False
    outputs: bool = False


@dataclass
class GroupOutput:
    """What one micro-batch gave; names are those of weights.

    Attributes:
        hidden: `[batch, tokens, hidden]`, after the group.
        means: Rotated weight -> mean input `[batch, d_in]` float32 over the real tokens.
        magnitudes: Weight of a linear module or norm -> mean of the input's magnitudes
            `[batch, d]` float32 over the real tokens.
        outputs: Weight of a `down_proj` -> the module's output `[batch, tokens, hidden]`.
    """

    hidden: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class DecoderTemplate:
    """Hugging Face's decoder for some layers, without weights, which it is called with.

    One template serves every state, and every group of as many layers of the same types.

    Args:
        layout: The model.
        group: A group of the kind.
        device: Where the forward pass runs.
        dtype: Of weights and hidden states in the forward pass.
    """

    def __init__(
        self, layout: ModelLayout, group: LayerGroup, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._decoder, self._norm = _meta_decoder(layout, group, device, dtype)
        self._averages = MaskedMeans()
        self._wanted = Wanted()
        self._output = GroupOutput(torch.empty(0))
        for name, module in self._decoder.named_modules():
            if name.startswith("layers.") and hasattr(module, "weight"):
                weight = f"{name}.weight"
                is_linear = f"model.{_shifted(weight, group.first_layer)}" in layout.rotated
                module.register_forward_pre_hook(self._input_hook(weight, is_linear))
                if name.endswith(".down_proj"):
                    module.register_forward_hook(self._output_hook(weight))

    @torch.no_grad()
    def forward(
        self, weights: Mapping[str, Tensor], hidden: Tensor, lengths: Tensor, wanted: Wanted
    ) -> GroupOutput:
        """Run the layers; names count layers from the group's first. See `GroupRunner.forward`."""
        self._averages.start(hidden, lengths)
        self._wanted, self._output = wanted, GroupOutput(hidden)
        # Padding is on the right and attention is causal: no real token sees it, so no mask.
        result = torch.func.functional_call(
            self._decoder,
            dict(weights),
            kwargs={"inputs_embeds": hidden, "use_cache": False},
            strict=False,
        )
        output, self._output = self._output, GroupOutput(hidden)
        self._averages.end()
        output.hidden = result.last_hidden_state
        return output

    @torch.no_grad()
    def final_norm(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The model's last norm, of the shape of `hidden`."""
        result: Tensor = torch.func.functional_call(self._norm, {"weight": weight}, (hidden,))
        return result

    def _input_hook(self, name: str, is_linear: bool) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._wanted.means and is_linear:
                self._output.means[name] = self._averages.mean(args[0])
            if self._wanted.magnitudes:
                self._output.magnitudes[name] = self._averages.magnitude(args[0])

        return record

    def _output_hook(self, name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if self._wanted.outputs:
                self._output.outputs[name] = output

        return record


class MaskedMeans:
    """Means over each sample's real tokens, in float32; of each tensor only once."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._weights = torch.empty(0)
        self._last: dict[bool, tuple[Tensor, Tensor]] = {}

    def start(self, hidden: Tensor, lengths: Tensor) -> None:
        """Set the samples: `hidden` `[batch, tokens, …]`, and their real tokens `[batch]`."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        real = (positions < lengths[:, None]).to(torch.float32)
        self._weights = (real / lengths[:, None])[:, None, :]
        self._last = {}

    def end(self) -> None:
        """Let go of the last tensors."""
        self._last = {}

    def mean(self, value: Tensor) -> Tensor:
        """`[batch, d]` of `[batch, tokens, d]`."""
        return self._once(value, absolute=False)

    def magnitude(self, value: Tensor) -> Tensor:
        """`[batch, d]`: mean of the magnitudes of `[batch, tokens, d]`, or `[…, heads, d]`."""
        return self._once(value, absolute=True)

    def _once(self, value: Tensor, absolute: bool) -> Tensor:
        # q/k/v, and gate and up, are given one and the same tensor.
        last = self._last.get(absolute)
        if last is None or last[0] is not value:
            last = (value, self._compute(value, absolute))
            self._last[absolute] = last
        return last[1]

    def _compute(self, value: Tensor, absolute: bool) -> Tensor:
        if value.ndim == 4:
            value = value.to(torch.float32).abs().mean(2)
        if value.dtype == torch.float32:
            whole = value.abs() if absolute else value
            return torch.bmm(self._weights, whole)[:, 0, :]
        batch, tokens, width = value.shape
        elements = _FLOAT32_ELEMENTS if value.device.type == "cpu" else _FLOAT32_ELEMENTS_GPU
        step = max(1, min(batch, elements // (tokens * width)))
        if self._buffer.numel() < step * tokens * width or self._buffer.device != value.device:
            self._buffer = torch.empty(step * tokens * width, device=value.device)
        mean = value.new_empty(batch, 1, width, dtype=torch.float32)
        for start in range(0, batch, step):
            part = value[start : start + step]
            floats = self._buffer[: part.numel()].view(part.shape).copy_(part)
            if absolute:
                floats.abs_()
            torch.bmm(self._weights[start : start + step], floats, out=mean[start : start + step])
        return mean[:, 0, :]


_MEANS = Wanted()
# Number of layers and their types -> template.
Templates = dict[tuple[object, ...], DecoderTemplate]


class GroupRunner:
    """Runs the decoder layers of one group.

    Args:
        layout: The model.
        group: The group.
        device: Where the forward pass runs.
        dtype: Of weights and hidden states in the forward pass.
        templates: Those made so far, for groups that can share one.
    """

    def __init__(
        self,
        layout: ModelLayout,
        group: LayerGroup,
        device: torch.device,
        dtype: torch.dtype,
        templates: Templates | None = None,
    ) -> None:
        templates = {} if templates is None else templates
        self.group = group
        kind = (group.end_layer - group.first_layer, *_layer_types(layout, group))
        if kind not in templates:
            templates[kind] = DecoderTemplate(layout, group, device, dtype)
        self._template = templates[kind]
        self._local_names = {
            name: _shifted(name.removeprefix("model."), -group.first_layer)
            for name in group.tensors
            if is_layer_tensor(name)
        }
        self._names = {local: name for name, local in self._local_names.items()}

    def forward(
        self,
        weights: Mapping[str, Tensor],
        hidden: Tensor,
        lengths: Tensor,
        wanted: Wanted = _MEANS,
    ) -> GroupOutput:
        """Run the group on one micro-batch.

        Args:
            weights: The group's tensors, in the compute dtype, on the device.
            hidden: `[batch, tokens, hidden]` hidden states; right-padded.
            lengths: `[batch]` int64 number of real tokens of each sample.
            wanted: What to keep beside the hidden states.
        """
        local = {self._local_names[name]: weights[name] for name in self._local_names}
        output = self._template.forward(local, hidden, lengths, wanted)
        for part in ("means", "magnitudes", "outputs"):
            found = getattr(output, part)
            setattr(output, part, {self._names[name]: value for name, value in found.items()})
        return output

    def final_norm(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The model's last norm, of the shape of `hidden`."""
        return self._template.final_norm(weight, hidden)


def _shifted(name: str, by: int) -> str:
    """`layers.3.mlp…` with another layer number; other names as they are."""
    head, dot, rest = name.partition("layers.")
    number, _, tail = rest.partition(".")
    return f"{head}layers.{int(number) + by}.{tail}" if dot and number.isdigit() else name


def _layer_types(layout: ModelLayout, group: LayerGroup) -> list[str]:
    types = getattr(layout.config, "layer_types", None) or []
    return list(types[group.first_layer : group.end_layer])


def embed(weights: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """First hidden states `[batch, tokens, hidden]` of token ids `[batch, tokens]`."""
    return nn.functional.embedding(input_ids, weights[EMBEDDING])


def output_shifts(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], mean_inputs: Sequence[Tensor]
) -> list[Tensor]:
    """`ΔA_i = (W_i X̄_i + b_i) − (W_0 X̄_0 + b_0)` for every model after the first.

    Computed as `ΔW_i X̄_i + W_0 ΔX̄_i + Δb_i`: each product is as small as what it stands for. The
    difference of two outputs would carry the rounding of the outputs themselves, which are far
    larger, and would so give a low-rank shift a full set of small singular values: noise that turns
    into rotation.

    Args:
        weights: `[d_out, d_in]`, as the forward passes used them; the reference's first.
        biases: `[d_out]` or None.
        mean_inputs: `X̄ᵀ` `[N, d_in]` float32.

    Returns:
        `[d_out, N]` float32 each.
    """
    first, *others = (weight.to(torch.float32) for weight in weights)
    first_inputs, *inputs = mean_inputs
    if not others:
        return []
    # One product with the reference's weight for all.
    changes = torch.cat([each - first_inputs for each in inputs])
    from_inputs = torch.split(first @ changes.T, [len(each) for each in inputs], dim=1)
    shifts = []
    for weight, each, shift, bias in zip(others, inputs, from_inputs, biases[1:], strict=True):
        shift = torch.addmm(shift, weight - first, each.T)
        if bias is not None and biases[0] is not None:
            shift += (bias.to(torch.float32) - biases[0].to(torch.float32))[:, None]
        shifts.append(shift)
    return shifts


def _meta_decoder(
    layout: ModelLayout, group: LayerGroup, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """The decoder for the group's layers, and the norm after the model's last one."""
    # Seconds of imports, which merges without forward passes do not need.
    from transformers import AutoModel

    config = copy.deepcopy(layout.config)
    config.num_hidden_layers = group.end_layer - group.first_layer
    if _layer_types(layout, group):
        config.layer_types = _layer_types(layout, group)
    config.use_cache = False
    with torch.device("meta"):
        decoder: nn.Module = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    norm = decoder.get_submodule("norm")
    decoder.norm = nn.Identity()
    decoder.embed_tokens = nn.Identity()
    # Rotary frequencies are no parameters: they are made anew where the pass runs.
    rotary: Any = type(decoder.rotary_emb)
    with torch.device(device):
        decoder.rotary_emb = rotary(config=config)
    return decoder.eval(), norm.eval()

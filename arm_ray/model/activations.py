"""What is kept of activations: means over tokens, and the shifts of outputs between two models.

ARM needs, for each linear module, the mean over a sample's tokens of the module's output. A linear
module's mean output is its output at the mean input: `mean_t(W x_t + b) = W mean_t(x_t) + b`. So
only mean inputs are collected while the forward pass runs, once for modules that share an input
(q/k/v; gate/up), and the outputs follow with one small product per weight (`output_shifts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
        outputs: What the last part of each layer gives: its MLP.
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
        seen: Rotated weight of an expert -> whether any token of a sample was sent to it, `[batch]`
            bool; without one its mean is zero.
        magnitudes: Weight of a linear module or norm -> mean of the input's magnitudes
            `[batch, d]` float32 over the real tokens.
        outputs: Number of a layer -> the output of its MLP `[batch, tokens, hidden]`.
        transposed: Experts' weights that are `[d_in, d_out]` (`ExpertInputs`).
    """

    hidden: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)


class MaskedMeans:
    """Means over each sample's real tokens, in float32; of each tensor only once."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._weights = torch.empty(0)
        self._shape = (0, 0)
        self._last: dict[bool, tuple[Tensor, Tensor]] = {}

    def start(self, hidden: Tensor, lengths: Tensor) -> None:
        """Set the samples: `hidden` `[batch, tokens, …]`, and their real tokens `[batch]`."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        self._shape = (hidden.shape[0], hidden.shape[1])
        real = (positions < lengths[:, None]).to(torch.float32)
        self._weights = (real / lengths[:, None])[:, None, :]
        self._last = {}

    def end(self) -> None:
        """Let go of the last tensors."""
        self._last = {}

    def fits(self, value: Tensor) -> bool:
        """Whether a tensor has a row for each token, in one of the forms that are known."""
        batch, tokens = self._shape
        if value.ndim == 4:
            return value.shape[0] == batch and tokens in value.shape[1:3]
        return value.shape[:2] == self._shape or value.shape[:-1] == (batch * tokens,)

    def mean(self, value: Tensor) -> Tensor:
        """`[batch, d]` of `[batch, tokens, d]`, or of one of these.

        `[batch, tokens, heads, d]` and `[batch, heads, tokens, d]`: the mean over the heads too.
        `[batch * tokens, d]`: the tokens of all samples one after another.
        """
        return self._once(value, absolute=False)

    def magnitude(self, value: Tensor) -> Tensor:
        """The same of the magnitudes."""
        return self._once(value, absolute=True)

    def _once(self, value: Tensor, absolute: bool) -> Tensor:
        # q/k/v, and gate and up, are given one and the same tensor.
        last = self._last.get(absolute)
        if last is None or last[0] is not value:
            last = (value, self._compute(value, absolute))
            self._last[absolute] = last
        return last[1]

    def _compute(self, value: Tensor, absolute: bool) -> Tensor:
        if value.ndim == 2:
            value = value.view(*self._shape, -1)
        if value.ndim == 4:
            value = value.to(torch.float32)
            heads = 2 if value.shape[1] == self._shape[1] else 1
            value = (value.abs() if absolute else value).mean(heads)
        if value.dtype == torch.float32:
            whole = value.abs() if absolute else value
            return torch.bmm(self._weights, whole)[:, 0, :]
        batch, tokens, width = value.shape
        elements = _FLOAT32_ELEMENTS if value.device.type == "cpu" else _FLOAT32_ELEMENTS_GPU
        step = max(1, min(batch, elements // (tokens * width)))
        if self._buffer.numel() < step * tokens * width or self._buffer.device != value.device:
            self._buffer = torch.empty(
                step * tokens * width, dtype=torch.float32, device=value.device
            )
        mean = value.new_empty(batch, 1, width, dtype=torch.float32)
        for start in range(0, batch, step):
            part = value[start : start + step]
            floats = self._buffer[: part.numel()].view(part.shape).copy_(part)
            if absolute:
                floats.abs_()
            torch.bmm(self._weights[start : start + step], floats, out=mean[start : start + step])
        return mean[:, 0, :]


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

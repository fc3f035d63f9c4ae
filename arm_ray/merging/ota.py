"""OTA: means weighted by the optimizer's second moments, the most salient entries alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from arm_ray.merging import quantile
from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.settings import MethodSettings

# Powers are computed in buffers of this size, whatever the size of the piece (see `_Power`).
_BLOCK = 1 << 14


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`Σ P_i ΔW_i / Σ P_i`, `P_i = (v_i^power + ε) [s_i ≥ threshold_i]`; 0 where all are masked.

    v are the second moments and `s = v ΔW²` the saliency, of which a fraction `density` of each
    model's entries survives. There is no coefficient.
    """
    ota, vectors = settings.ota, [v.contiguous() for v in given.vectors]
    if not vectors:
        return torch.zeros_like(given.inputs.reference)
    limits: Sequence[float] = (0.0,) * len(vectors)
    if ota.density < 1.0:
        limits = cast(Sequence[float], given.inputs.statistics["thresholds"])
    moments = given.inputs.second_moments
    if len(moments) != len(vectors):
        raise ValueError(f"second_moments: got {len(moments)}, expected {len(vectors)}")
    power = _Power(ota.power, vectors[0].device)
    for block in in_blocks([*vectors, *moments], _BLOCK):
        changes, squares = block[: len(vectors)], block[len(vectors) :]
        above = torch.zeros_like(changes[0], dtype=torch.float64)
        below = torch.zeros_like(above)
        for change, square, limit in zip(changes, squares, limits, strict=True):
            weight = power(square).add_(ota.epsilon)
            if limit > 0.0:
                weight *= _saliency(change, square) >= limit
            below += weight
            above += weight.mul_(change)
        changes[0].copy_(torch.where(below > 0.0, above / below, 0.0))
    return vectors[0]


class _Power:
    """`v^power` in float64, whose bits do not depend on where an element lies in its piece.

    Vectorised powers treat the last few elements of a tensor differently. All calls here are of
    one size, and the rest of the buffer is thrown away.
    """

    def __init__(self, power: float, device: torch.device) -> None:
        self._power = power
        self._buffer = torch.zeros(_BLOCK, dtype=torch.float64, device=device)

    def __call__(self, moments: Tensor) -> Tensor:
        if self._power == 0.5:
            return moments.double().sqrt_()
        if moments.device.type != "cpu":
            return moments.double().pow_(self._power)
        count = len(moments)
        self._buffer[:count].copy_(moments)
        return self._buffer.pow(self._power)[:count]


def _saliency(change: Tensor, square: Tensor) -> Tensor:
    """The root of `v ΔW²`, which orders entries as that does but cannot underflow; float32."""
    return square.sqrt().mul_(change.abs())


def _measure(number: int, given: TaskVectors, _settings: MethodSettings) -> Sums:
    pairs = zip(given.vectors, given.inputs.second_moments, strict=True)
    saliencies = [_saliency(change, square) for change, square in pairs]
    return {"counts": quantile.measure(number, saliencies, given.inputs.statistics)}


def _conclude(
    number: int, sums: Sums, known: Mapping[str, object], settings: MethodSettings
) -> Mapping[str, object]:
    return quantile.conclude(number, sums["counts"], known, settings.ota.density)


def _check(settings: MethodSettings, num_models: int) -> list[str]:
    ota = settings.ota
    found = "null" if ota.second_moments is None else f"{len(ota.second_moments)} directories"
    # More than enough where an iteration leaves a candidate out, which is its reference.
    if ota.second_moments is not None and len(ota.second_moments) >= num_models:
        return []
    return [
        f"method.ota.second_moments: got {found}, expected one for each of {num_models} candidates"
    ]


OPERATOR = Operator(
    "ota",
    update,
    second_moments=True,
    uses_coefficient=False,
    candidates_only=True,
    statistics=Statistics(
        rounds=lambda settings, _contributors: quantile.ROUNDS if settings.ota.density < 1.0 else 0,
        measure=_measure,
        conclude=_conclude,
    ),
    check=_check,
)

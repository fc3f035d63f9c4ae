"""SCE (Wan et al., 2024): select entries by variance, weigh models by energy, erase minorities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`Σ w_i δ_i / Σ w_i` over the models whose selected entry `δ_i` has the elected sign.

    Selected are, of the entries of the tensor whose variance between the models is not zero, the
    fraction `select` of largest variance. `w_i` is the mean square of a model's selected entries,
    divided by the sum over the models. The elected sign is that of `Σ δ_i`, + where it is zero.
    Where no model has it, nothing changes. There is no coefficient.
    """
    vectors = [v.contiguous() for v in given.vectors]
    if not vectors:
        return torch.zeros_like(given.inputs.reference)
    if settings.sce.select < 1.0:
        _select(vectors, settings.sce.select)
    energies = [_energy(vector) for vector in vectors]
    total = sum(energies)
    weights = [e / total for e in energies] if total > 0.0 else [1.0 / len(vectors)] * len(vectors)
    for block in in_blocks(vectors):
        block[0].copy_(_mean_of_majority(block, weights))
    return vectors[0]


def _energy(vector: Tensor) -> float:
    return sum(float(part.double().square().sum()) for (part,) in in_blocks([vector]))


def _select(vectors: Sequence[Tensor], fraction: float) -> None:
    """Set the entries that are not selected to zero."""
    variance = torch.empty(vectors[0].numel(), device=vectors[0].device)
    for found, *parts in in_blocks([variance, *vectors]):
        stacked = torch.stack(parts).double()
        found.copy_(stacked.var(dim=0, unbiased=False))
    kept = int(fraction * int(torch.count_nonzero(variance)))
    if kept == 0:
        lowest = torch.tensor(torch.inf, device=variance.device)
    else:
        lowest = torch.kthvalue(variance, variance.numel() - kept + 1).values
    for found, *parts in in_blocks([variance, *vectors]):
        chosen = found >= lowest
        for part in parts:
            part.mul_(chosen)


def _mean_of_majority(entries: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    values = torch.stack([entry.double() for entry in entries])
    elected = torch.where(values.sum(0) >= 0.0, 1.0, -1.0)
    shares = torch.tensor(weights, dtype=torch.float64, device=values.device)[:, None]
    shares = shares * (values.sign() == elected)
    divisor = shares.sum(0)
    merged = (values * shares).sum(0)
    return torch.where(divisor > 0.0, merged / divisor, 0.0)


def _check(settings: MethodSettings, candidates: int) -> list[str]:
    if candidates > 1 or settings.sce.select == 1.0:
        return []
    return [
        f"method.sce.select: got {settings.sce.select}, which selects by the variance between "
        "models, and there is one; set it to 1, or give more candidates"
    ]


OPERATOR = Operator("sce", update, whole_tensors=True, uses_coefficient=False, check=_check)

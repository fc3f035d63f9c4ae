"""LoRE: a common base and low-rank task vectors, estimated together from the models alone."""

from __future__ import annotations

import torch
from torch import Tensor

from arm_ray.merging.blocks import weighted_sum_
from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.spectral import scale_singular_values


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`θ_0 + λ combine(δ_i) − W_ref`, where θ_0 and the δ_i are estimated in turns.

    For matrices, from `δ_i = 0`, and so often as `lore.steps` says:

        θ_0 = mean(W_i − δ_i),    δ_i = the W_i − θ_0 with singular values shrunk by μ / 2

    which descends on `Σ |θ_0 + δ_i − W_i|² + μ |δ_i|_*`. All other tensors take the plain mean. In
    a window the reference is one of the models. All is computed as differences from the reference.
    """
    lore = settings.lore
    models = list(given.vectors)
    if given.inputs.includes_reference:
        models.insert(0, torch.zeros_like(given.inputs.reference))
    if not models:
        return torch.zeros_like(given.inputs.reference)
    weights = [1.0 / len(models)] * len(models)
    if given.inputs.reference.ndim != 2:
        return weighted_sum_(models, weights)
    base = torch.zeros_like(given.inputs.reference)
    parts = [torch.zeros_like(base) for _ in models]
    for _ in range(lore.steps):
        base = weighted_sum_([m - p for m, p in zip(models, parts, strict=True)], weights)
        parts = [_shrunk(m - base, lore.mu / 2.0) for m in models]
    share = settings.coefficient / (len(models) if lore.combine == "mean" else 1)
    return base.add_(weighted_sum_(parts, [share] * len(parts)))


def _shrunk(matrix: Tensor, amount: float) -> Tensor:
    """Singular values less `amount`, but not below zero."""
    if amount == 0.0:
        return matrix
    return scale_singular_values(
        matrix,
        lambda sigma: torch.where(sigma > amount, 1.0 - amount / sigma, 0.0),
    )


OPERATOR = Operator("lore", update, whole_tensors=True)

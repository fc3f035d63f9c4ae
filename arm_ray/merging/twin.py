"""Twin-Merging, its static part: what models share, and low-rank experts for what they do not."""

from __future__ import annotations

import torch
from torch import Tensor

from arm_ray.merging.blocks import weighted_sum_
from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.spectral import scale_singular_values


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`S + mean_i truncate(ΔW_i − S)`, with what is shared `S = λ Σ ΔW_i` (or λ times the mean).

    `truncate` keeps the `int(rank_fraction · min(d_out, d_in))` largest singular values of a
    matrix, and all of any other tensor. A router would weigh the experts for each input; here all
    weigh the same. In a window the reference is one of the models.
    """
    twin, inputs = settings.twin, given.inputs
    if not given.vectors:
        return torch.zeros_like(inputs.reference)
    share = settings.coefficient / (inputs.divisor if twin.reduce == "mean" else 1)
    weights = [share] * len(given.vectors)
    shared = weighted_sum_([v.clone() for v in given.vectors], weights)
    residuals = [v - shared for v in given.vectors]
    if inputs.includes_reference:
        residuals.insert(0, -shared)
    if inputs.reference.ndim == 2:
        rank = int(twin.rank_fraction * min(inputs.reference.shape))
        residuals = [_truncated(r, rank) for r in residuals]
    return shared.add_(weighted_sum_(residuals, [1.0 / len(residuals)] * len(residuals)))


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    if rank == min(matrix.shape):
        return matrix
    if rank == 0:
        return torch.zeros_like(matrix)

    def leading(sigma: Tensor) -> Tensor:
        factors = torch.zeros_like(sigma)
        factors[:rank] = 1.0
        return factors

    return scale_singular_values(matrix, leading)


OPERATOR = Operator("twin", update, whole_tensors=True)

"""OPCM: task vectors one after another, each projected off what is merged already.

With `D_1 = ΔW_1` and `project` of the next task vector off the directions of `D`,

    D_t   = D_(t−1) + project(ΔW_t, D_(t−1))
    W_new = W_ref + D_T / λ,        λ = |D_T| / mean |ΔW_i|        (norms over the whole model)

The authors divide by a λ_t after every step and multiply by it in the next one. A projection does
not depend on the length of what it projects off, so both cancel, and one λ at the end is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`D_T / λ`; λ is the `opcm_scale` of the round over the whole model."""
    if not given.vectors:
        return torch.zeros_like(given.inputs.reference)
    if len(given.vectors) == 1:
        return given.vectors[0]
    merged = _merged(given, settings.opcm.alpha)
    return merged.mul_(cast(float, given.inputs.statistics["opcm_scale"]))


def _merged(given: TaskVectors, alpha: float) -> Tensor:
    """`D_T`; overwrites the first task vector."""
    merged = given.vectors[0]
    for vector in given.vectors[1:]:
        if given.inputs.is_linear:
            vector = project(vector, merged, alpha)
        merged += vector
    return merged


def project(vector: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """`ΔW − U M Vᵀ`, float32, with `D = U diag(σ) Vᵀ` and M a part of `P = Uᵀ ΔW V`.

    M is P's diagonal and its leading `r × r` block, where r counts the leading σ whose share of
    `Σ σ`, summed up, is at most α. So what is left is orthogonal to D, and does not touch the
    plane of its leading directions. Directions in which D is zero are not singled out.

    Args:
        vector: `ΔW` `[d_out, d_in]`.
        merged: `D`, of the same shape.
        alpha: α.
    """
    # Neighbouring singular values are close, and float32 would mix up their vectors.
    left, sigma, right = torch.linalg.svd(merged.double(), full_matrices=False)
    tolerance = float(sigma[0]) * max(merged.shape) * torch.finfo(torch.float64).eps
    rank = int((sigma > tolerance).sum())
    if rank == 0:
        return vector
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    wide = vector.double()
    inner = left.T @ wide @ right.T
    leading = int((sigma.cumsum(0) / sigma.sum() <= alpha).sum())
    removed = torch.diag(inner.diagonal())
    removed[:leading, :leading] = inner[:leading, :leading]
    return wide.sub_(left @ removed @ right).float()


def _squared_norm(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for (block,) in in_blocks([tensor]):
        wide = block.double()
        total += torch.dot(wide, wide)
    return total


def _measure(_number: int, given: TaskVectors, settings: MethodSettings) -> Sums:
    squares = torch.stack([_squared_norm(v) for v in given.vectors])
    return {"task_vectors": squares, "merged": _squared_norm(_merged(given, settings.opcm.alpha))}


def _conclude(
    _number: int, sums: Sums, known: Mapping[str, object], _settings: MethodSettings
) -> Mapping[str, object]:
    merged = float(sums["merged"].sqrt())
    mean = float(sums["task_vectors"].sqrt().mean())
    # Where all cancel there is nothing to scale.
    return {**known, "opcm_scale": mean / merged if merged > 0.0 else 1.0}


OPERATOR = Operator(
    "opcm",
    update,
    whole_tensors=True,
    uses_coefficient=False,
    statistics=Statistics(
        rounds=lambda _settings, contributors: int(contributors > 1),
        measure=_measure,
        conclude=_conclude,
    ),
)

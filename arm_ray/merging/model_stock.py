"""Model Stock (Jang et al., 2024): the mean of models, drawn to the reference by their angle."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from arm_ray.merging.blocks import gram, weighted_sum_
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.settings import MethodSettings

# Task vectors of no larger norm have no direction.
_SMALLEST_NORM = 1e-12
# Elements of a model in float64 at once, where each row has an angle of its own.
_ROWS = 1 << 20


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`t · mean ΔW_i`, `t = N c / (1 + (N − 1) c)`, with `c` the mean cosine of two task vectors.

    `c` below zero counts as zero: models that point away from each other say nothing together. Of
    one model `t` is 1. With `over: rows` each row has a `c` of its own. There is no coefficient.
    """
    vectors = [v.contiguous() for v in given.vectors]
    count = len(vectors)
    if count == 0:
        return torch.zeros_like(given.inputs.reference)
    if count == 1:
        return vectors[0]
    by_rows = settings.model_stock.over == "rows"
    ratio: Tensor | float
    if by_rows:
        ratio = _ratio(_row_cosines(vectors), count).to(torch.float32)
    else:
        products = cast(Tensor, given.inputs.statistics["products"])
        norms = products.diagonal().sqrt().clamp(min=_SMALLEST_NORM)
        cosines = products / torch.outer(norms, norms)
        pairs = [cosines[i, j] for i in range(count) for j in range(i + 1, count)]
        ratio = float(_ratio(torch.stack(pairs).clamp(-1.0, 1.0).mean(), count))
    mean = weighted_sum_(vectors, [1.0 / count] * count)
    if isinstance(ratio, float):
        return mean.mul_(ratio)
    return mean.mul_(ratio.view(-1, *[1] * (mean.ndim - 1)) if mean.ndim > 1 else ratio[0])


def _ratio(cosine: Tensor, count: int) -> Tensor:
    positive = cosine.clamp(min=0.0)
    return count * positive / (1.0 + (count - 1) * positive)


def _row_cosines(vectors: list[Tensor]) -> Tensor:
    """`[rows]` float64: the mean cosine of two models' rows; a vector or a number is one row."""
    rows = len(vectors[0]) if vectors[0].ndim > 1 else 1
    matrices = [vector.view(rows, -1) for vector in vectors]
    step = max(1, _ROWS // max(1, matrices[0].shape[1]))
    found = []
    for start in range(0, rows, step):
        models = [matrix[start : start + step].double() for matrix in matrices]
        norms = [model.norm(dim=1).clamp(min=_SMALLEST_NORM) for model in models]
        pairs = [
            ((models[i] * models[j]).sum(1) / (norms[i] * norms[j])).clamp(-1.0, 1.0)
            for i in range(len(models))
            for j in range(i + 1, len(models))
        ]
        found.append(torch.stack(pairs).mean(0))
    return torch.cat(found)


def _measure(_number: int, given: TaskVectors, _settings: MethodSettings) -> Sums:
    models = [v.contiguous() for v in given.vectors]
    return {"products": gram(models, within_blocks=torch.float64)}


OPERATOR = Operator(
    "model_stock",
    update,
    whole_tensors=lambda settings: settings.model_stock.over == "rows",
    uses_coefficient=False,
    statistics=Statistics(
        rounds=lambda settings, contributors: int(
            contributors > 1 and settings.model_stock.over == "tensor"
        ),
        measure=_measure,
        conclude=lambda _number, sums, known, _settings: {**known, **sums},
        by_tensor=lambda _settings: True,
    ),
)

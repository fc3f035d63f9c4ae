"""TIES: trim each task vector, elect a sign for each entry, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from arm_ray.merging import quantile
from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.operator_settings import TiesSettings
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`λ Σ a_i / Σ [a_i ≠ 0]` over the trimmed entries `a_i` that have the elected sign.

    The elected sign is that of the sum of the trimmed entries. `combine` may leave the division
    out, or take the largest instead of the sum.
    """
    ties = settings.ties
    if not given.vectors:
        return torch.zeros_like(given.inputs.reference)
    vectors = [v.contiguous() for v in given.vectors]
    known = given.inputs.statistics
    limits = _limits(_thresholds(known, ties, len(vectors)))
    majority = cast(int, known.get("majority", 0))
    zero_is_positive = ties.zero_sign == "positive" or majority > 0
    for block in in_blocks(vectors):
        trimmed = [torch.hardshrink(v, limit) for v, limit in zip(block, limits, strict=True)]
        total = _sum(trimmed)
        elected = (total >= 0.0 if zero_is_positive else total > 0.0).to(torch.float32)
        elected.mul_(2.0).sub_(1.0)
        block[0].copy_(_combined(trimmed, elected, ties.combine).mul_(settings.coefficient))
    return vectors[0]


def _combined(trimmed: list[Tensor], elected: Tensor, combine: str) -> Tensor:
    """The merged entries of one block; overwrites the trimmed ones."""
    # Magnitudes where the signs agree, else 0.
    agreeing = [t.mul_(elected).clamp_(min=0.0) for t in trimmed]
    merged = agreeing[0].clone()
    for magnitude in agreeing[1:]:
        if combine == "max":
            torch.maximum(merged, magnitude, out=merged)
        else:
            merged += magnitude
    if combine == "mean" and len(agreeing) > 1:
        count = torch.zeros_like(merged)
        for magnitude in agreeing:
            count += torch.sign(magnitude)
        merged /= count.clamp_(min=1.0)
    return merged.mul_(elected)


def _sum(trimmed: list[Tensor]) -> Tensor:
    # Of two numbers the rounded sum has the right sign. Of more, rounding could decide it.
    total = trimmed[0].clone() if len(trimmed) <= 2 else trimmed[0].double()
    for entries in trimmed[1:]:
        total += entries
    return total


def _limits(thresholds: Sequence[float]) -> list[float]:
    """The next number below each threshold: `hardshrink` drops what is not above it.

    Below zero it drops nothing.
    """
    return [float(np.nextafter(np.float32(t), np.float32(-1.0))) for t in thresholds]


def _votes(vectors: Sequence[Tensor], limits: Sequence[float]) -> int:
    """How many more entries elect + than −."""
    votes = 0
    for block in in_blocks(vectors):
        trimmed = [torch.hardshrink(v, limit) for v, limit in zip(block, limits, strict=True)]
        votes += int(torch.sign(_sum(trimmed)).sum())
    return votes


def _thresholds(known: Mapping[str, object], ties: TiesSettings, count: int) -> Sequence[float]:
    return (0.0,) * count if ties.keep == 1.0 else cast(Sequence[float], known["thresholds"])


def _passes(ties: TiesSettings) -> tuple[str, ...]:
    """What the rounds over the whole model, or a tensor, are for."""
    trim = ("trim",) * (quantile.ROUNDS if ties.keep < 1.0 else 0)
    return (*trim, "elect") if ties.zero_sign == "majority" else trim


def _measure(number: int, given: TaskVectors, settings: MethodSettings) -> Sums:
    vectors, known, ties = given.vectors, given.inputs.statistics, settings.ties
    if _passes(ties)[number] == "trim":
        return {"counts": quantile.measure(number, vectors, known)}
    votes = _votes(vectors, _limits(_thresholds(known, ties, len(vectors))))
    return {"votes": torch.tensor([votes], dtype=torch.int64)}


def _conclude(
    number: int, sums: Sums, known: Mapping[str, object], settings: MethodSettings
) -> Mapping[str, object]:
    if _passes(settings.ties)[number] == "trim":
        return quantile.conclude(number, sums["counts"], known, settings.ties.keep)
    return {**known, "majority": int(sums["votes"])}


OPERATOR = Operator(
    "ties",
    update,
    statistics=Statistics(
        rounds=lambda settings, _contributors: len(_passes(settings.ties)),
        measure=_measure,
        conclude=_conclude,
        by_tensor=lambda settings: settings.ties.scope == "per_tensor",
    ),
)

"""RAM and RAM+ (Yuan et al., 2026), for runs of reinforcement learning, which change few entries.

What several runs have changed is averaged over these runs. What one alone has changed stays as it
is (RAM), or is made a little larger (RAM+), the more the more of its changes others share: the
average makes those smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """The mean of what several runs changed, and what one run changed.

    Of each entry, with `n` the number of runs where `|ΔW_i| > threshold`:

        n ≥ 2: the mean of these `ΔW_i`;  n = 1: `ρ_i ΔW_i`;  n = 0: nothing.
        ρ_i = 1 + (r − 1) · min(1, shared_i / alone_i)

    `shared_i` and `alone_i` count, over the whole model, what run `i` has changed together with
    others and alone. There is no coefficient.
    """
    ram, vectors = settings.ram, [v.contiguous() for v in given.vectors]
    if not vectors:
        return torch.zeros_like(given.inputs.reference)
    factors: Sequence[float] = (1.0,) * len(vectors)
    if ram.rescale > 1.0:
        factors = cast(Sequence[float], given.inputs.statistics["factors"])
    for block in in_blocks(vectors):
        changed = [part.abs() > ram.threshold for part in block]
        count = torch.stack(changed).sum(0)
        together = torch.zeros_like(block[0], dtype=torch.float64)
        alone = torch.zeros_like(together)
        for part, mask, factor in zip(block, changed, factors, strict=True):
            value = part.double() * mask
            together += value
            alone += factor * value
        merged = torch.where(count == 1, alone, together / count.clamp(min=1))
        block[0].copy_(merged)
    return vectors[0]


def _measure(_number: int, given: TaskVectors, settings: MethodSettings) -> Sums:
    """`[runs, 2]` int64: entries changed together with others, and alone."""
    vectors = [v.contiguous() for v in given.vectors]
    counts = torch.zeros(len(vectors), 2, dtype=torch.int64)
    for block in in_blocks(vectors):
        changed = torch.stack([part.abs() > settings.ram.threshold for part in block])
        others = changed.sum(0) > 1
        shared = (changed & others).sum(1).cpu()
        counts[:, 0] += shared
        counts[:, 1] += changed.sum(1).cpu() - shared
    return {"changes": counts}


def _conclude(
    _number: int, sums: Sums, known: Mapping[str, object], settings: MethodSettings
) -> Mapping[str, object]:
    factors = []
    for shared, alone in sums["changes"].tolist():
        ratio = 1.0 if shared >= alone else shared / alone
        factors.append(1.0 + (settings.ram.rescale - 1.0) * ratio)
    return {**known, "factors": tuple(factors)}


OPERATOR = Operator(
    "ram",
    update,
    uses_coefficient=False,
    statistics=Statistics(
        rounds=lambda settings, contributors: int(contributors > 0 and settings.ram.rescale > 1.0),
        measure=_measure,
        conclude=_conclude,
    ),
)

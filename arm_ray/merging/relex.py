"""RELEX (Wei et al., 2026): the weights of a later training step, from the path so far.

The contributors are checkpoints `s = 1 … S` of one run at the steps `t_s`. Of each tensor, with `M`
the matrix whose rows are the task vectors `ΔW_s`, and `σ_k, u_k, v_k` its singular triples:

    c_sk = σ_k u_sk                             where checkpoint s is in direction k
    c_k(t) ≈ a_k + b_k t                        by least squares over the checkpoints
    ΔW(t*) = Σ_k (a_k + b_k t*) v_k             of the leading `rank` directions

With `v_k = Mᵀ u_k / σ_k` that is a weighted sum of the task vectors, whose weights follow from
their inner products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from arm_ray.errors import ConfigError
from arm_ray.merging.blocks import gram, in_blocks
from arm_ray.merging.operator import Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.settings import MethodSettings

# Directions of a smaller part of the largest singular value are rounding.
_SMALLEST = 1e-6


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`ΔW(t*)`, of every tensor; the coefficient λ plays no part."""
    chosen = settings.relex
    vectors = [v.contiguous() for v in given.vectors]
    steps = chosen.steps or tuple(float(s) for s in range(1, len(vectors) + 1))
    if len(vectors) != len(steps):
        raise ConfigError(
            "an iteration merges another number of states than there are steps",
            where="method.relex.steps",
            got=f"{len(vectors)} states in iteration {given.inputs.iteration}",
            expected=len(steps),
            hint="give it all candidates: schedule.anchor_iterations = schedule.max_iterations",
        )
    assert chosen.target is not None
    products = cast(Tensor, given.inputs.statistics["products"]).numpy()
    weights = weights_of(products, steps, chosen.target, chosen.rank)
    # Large weights of both signs nearly cancel where a path is short.
    for block in in_blocks(vectors):
        total = sum(w * part.double() for w, part in zip(weights, block, strict=True))
        block[0].copy_(cast(Tensor, total))
    return vectors[0]


def weights_of(
    products: np.ndarray, steps: Sequence[float], target: float, rank: int
) -> list[float]:
    """The weight of each checkpoint's task vector in the predicted one.

    Args:
        products: `[S, S]` float64, inner products of the task vectors.
        steps: `[S]`, not all equal.
        target: `t*`.
        rank: Directions.
    """
    values, vectors = np.linalg.eigh(products)
    sigmas = np.sqrt(np.maximum(values[::-1], 0.0))
    times = np.asarray(steps, dtype=np.float64)
    centred = times - times.mean()
    found = np.zeros(len(steps))
    for index in range(min(rank, len(steps))):
        if sigmas[index] <= _SMALLEST * sigmas[0]:
            break
        direction = vectors[:, ::-1][:, index]
        path = sigmas[index] * direction
        slope = centred @ path / (centred @ centred)
        predicted = path.mean() + slope * (target - times.mean())
        found += predicted / sigmas[index] * direction
    return [float(w) for w in found]


def _measure(_number: int, given: TaskVectors, _settings: MethodSettings) -> Sums:
    models = [v.contiguous() for v in given.vectors]
    return {"products": gram(models, within_blocks=torch.float64)}


def _check(settings: MethodSettings, candidates: int) -> list[str]:
    chosen, key = settings.relex, "method.relex"
    problems = []
    if chosen.target is None:
        problems.append(f"{key}.target: is not set; the training step to predict the weights of")
    if chosen.steps is None:
        return problems
    if len(chosen.steps) != candidates:
        problems.append(
            f"{key}.steps: got {len(chosen.steps)}, expected one for each of the {candidates} "
            "states that an iteration merges"
        )
    elif sorted(set(chosen.steps)) != list(chosen.steps):
        problems.append(f"{key}.steps: are not in the order of training, each once")
    return problems


OPERATOR = Operator(
    "relex",
    update,
    uses_coefficient=False,
    statistics=Statistics(
        rounds=lambda _settings, _contributors: 1,
        measure=_measure,
        conclude=lambda _number, sums, known, _settings: {**known, **sums},
        by_tensor=lambda _settings: True,
    ),
    candidates_only=True,
    min_models=2,
    check=_check,
)

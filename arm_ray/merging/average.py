"""Averages over the checkpoints of a run: SWA and LAWA, EMA, growing or given weights."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from arm_ray.merging.blocks import weighted_sum_
from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.operator_settings import AverageSettings
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`Σ w_i W_i − W_ref = Σ w_i ΔW_i`, the weights of sum 1; there is no coefficient.

    The models are the reference (in a window) and the contributors, in order.
    """
    weights = member_weights(settings.average, given.members)
    # The reference, where it is a model, differs from itself by nothing.
    weights = weights[given.members - len(given.vectors) :]
    if not given.vectors:
        return torch.zeros_like(given.inputs.reference)
    return weighted_sum_(given.vectors, weights)


def member_weights(settings: AverageSettings, count: int) -> list[float]:
    """The weight of each of so many models.

    `ema` starts from the first of them and step `t = 1, 2, …` merges another one with decay
    `α_t`: `M_t = α_t M_(t−1) + (1 − α_t) W_t`.

    `wsm`: had the steps from model `j` to `j + 1` been as much smaller as a falling learning rate
    makes them, `r_(j+1)` of what they were, the run would have ended in `Σ (r_j − r_(j+1)) W_j`.
    """
    used = min(count, settings.last or count)
    if settings.kind == "wsm":
        # What a learning rate that falls over the checkpoints does to the steps between them.
        rates = [_rate(i / used, settings.fall) for i in range(used + 1)]
        weights = [first - second for first, second in pairwise(rates)]
    elif settings.kind == "ema":
        weights = [1.0]
        for t in range(1, used):
            decay = min(settings.decay, (t + 1) / (t + 10)) if settings.warm_up else settings.decay
            weights = [*(decay * w for w in weights), 1.0 - decay]
    else:
        given = {
            "uniform": [1.0] * used,
            "linear": [float(i + 1) for i in range(used)],
            "weighted": list(settings.weights or ()),
        }[settings.kind]
        if len(given) != used:
            raise ValueError(f"weights: got {len(given)}, expected one for each of {used} models")
        weights = [w / math.fsum(given) for w in given]
    return [0.0] * (count - used) + weights


def _rate(progress: float, fall: str) -> float:
    """The learning rate's part that is left, 1 at the beginning and 0 at the end."""
    return 1.0 - (progress if fall == "linear" else math.sqrt(progress))


def _check(settings: MethodSettings, num_models: int) -> list[str]:
    average = settings.average
    problems = []
    if average.last is not None and average.last > num_models:
        problems.append(
            f"method.average.last: got {average.last}, expected at most the {num_models} models"
            " of an iteration"
        )
    for key, kind in (("decay", "ema"), ("warm_up", "ema"), ("fall", "wsm")):
        value = getattr(average, key)
        if average.kind != kind and value != getattr(AverageSettings(), key):
            problems.append(
                f"method.average.{key}: got {value} with kind {average.kind!r},"
                f" expected kind {kind!r}, which alone reads it"
            )
    if average.kind != "weighted":
        if average.weights is not None:
            problems.append(
                f"method.average.weights: got weights with kind {average.kind!r},"
                " expected kind 'weighted', which alone reads them"
            )
        return problems
    used = min(num_models, average.last or num_models)
    found = "null" if average.weights is None else f"{len(average.weights)} weights"
    if average.weights is None or len(average.weights) != used:
        problems.append(
            f"method.average.weights: got {found}, expected one for each of {used} models"
        )
    elif not any(average.weights):
        problems.append(
            "method.average.weights: got only zeros, expected at least one positive weight"
        )
    return problems


OPERATOR = Operator("average", update, uses_coefficient=False, check=_check)

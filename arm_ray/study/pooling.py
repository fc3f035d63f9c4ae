"""How sure a number is that is a mean over problems and over runs: several seeds, say. Pure.

Every run is scored on the same problems, so the values form a table of runs by problems. Both are
drawn anew, with replacement and independently of each other, and the mean of what they cross is
taken: the percentile bootstrap of crossed factors (Owen, The pigeonhole bootstrap, 2007). With runs
`c_s` times and problems `w_j` times in a resample, values `x_sj` and weights `t_sj`,

    mean* = (sum_sj c_s w_j x_sj) / (sum_sj c_s w_j t_sj)

Differences are first taken within each run, problem by problem, and then pooled, so that what a
seed does to both models cancels. With one run this is the bootstrap over problems. Two or three
runs say little about how much runs differ: the bootstrap takes their spread for that of all runs,
and such an interval is rather too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arm_ray.evaluation.statistics import Comparison, Estimate, compare, estimate

Values = NDArray[np.float64]
# Resamples drawn at once, which bounds the memory.
_BLOCK = 500


def pooled_estimate(
    values: Values,
    weights: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The mean over runs and problems, with the interval of the module.

    Args:
        values: `[runs, problems]`.
        weights: `[runs, problems]`, what the sums are divided by; None for ones.
        confidence: Of the interval.
        resamples: Of the bootstrap.
        seed: Of the resampling.

    Returns:
        The estimate; without an interval (NaN) where a value is NaN or infinite.
    """
    weights = np.ones_like(values) if weights is None else weights
    if len(values) == 1:
        return estimate(
            values[0], weights[0], confidence=confidence, resamples=resamples, seed=seed
        )
    if not np.isfinite(values).all():
        return Estimate(float(values.sum()) / float(weights.sum()), math.nan, math.nan)
    runs, problems = values.shape
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn_runs = generator.multinomial(runs, np.full(runs, 1 / runs), size)
        drawn = generator.multinomial(problems, np.full(problems, 1 / problems), size)
        sums = ((drawn_runs @ values) * drawn).sum(axis=1)
        means.append(sums / ((drawn_runs @ weights) * drawn).sum(axis=1))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail])
    return Estimate(float(values.sum() / weights.sum()), float(low), float(high))


def pooled_comparison(
    first: Values,
    second: Values,
    weights: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """One kind of model against another over runs and problems, paired within each run.

    The p-value is that of `statistics.compare` for each problem's difference summed over the runs:
    it is about problems like these, for these runs.

    Args:
        first: `[runs, problems]`.
        second: `[runs, problems]`, the other's.
        weights: `[runs, problems]`, tokens, for a loss; None for ones.
        confidence: Of the interval.
        resamples: Of the bootstrap and the permutation test.
        seed: Of both.
    """
    ones = np.ones_like(first) if weights is None else weights
    over_runs = compare(
        first.sum(axis=0), second.sum(axis=0), ones.sum(axis=0),
        confidence=confidence, resamples=resamples, seed=seed,
    )  # fmt: skip
    if len(first) == 1 or math.isnan(over_runs.difference):
        return over_runs
    interval = pooled_estimate(
        first - second, ones, confidence=confidence, resamples=resamples, seed=seed
    )
    return Comparison(
        interval.mean, interval.low, interval.high, over_runs.p_value, over_runs.num_problems
    )


def aligned(keys: Sequence[Sequence[str]], rows: Sequence[Values]) -> tuple[list[str], Values]:
    """Values of several runs as one table of the problems that all of them have.

    Args:
        keys: Of each run, the problems.
        rows: Of each run, a value for each problem.

    Returns:
        The problems, in the first run's order, and `[runs, problems]`.
    """
    shared = set(keys[0]).intersection(*keys[1:])
    problems = [key for key in keys[0] if key in shared]
    table = []
    for names, row in zip(keys, rows, strict=True):
        place = {name: index for index, name in enumerate(names)}
        table.append(row[[place[key] for key in problems]])
    return problems, np.array(table)

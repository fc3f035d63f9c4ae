"""How sure a score is, and whether one model is better than another on the same problems.

Problems are drawn anew, completions are not: a model is judged on problems like these, and the
completions of one problem are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Resamples drawn at once: bounds the memory at this many times the number of problems.
_BLOCK = 500


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same problems.

    Attributes:
        difference: Weighted mean of the differences, first minus second.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        p_value: Two-sided, of a permutation test: how often differences at least this large come
            about when it is by chance which model a problem's score is ascribed to.
        num_problems: Problems that both were scored on.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_problems: int


def estimate(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Weighted mean over problems, with a percentile bootstrap interval (Efron, 1979).

    Args:
        values: `[n]`, one for each problem: its mean score, or its sum where weights are given.
        weights: `[n]`, what the sums are divided by (tokens, for a loss); None for ones.
        confidence: Of the interval.
        resamples: Of the bootstrap.
        seed: Of the resampling.

    Returns:
        The estimate; without an interval (NaN) where a value is NaN or infinite.

    Raises:
        ValueError: There are no values.
    """
    if len(values) == 0:
        raise ValueError("no values to take a mean of")
    weights = np.ones(len(values)) if weights is None else weights
    if not np.isfinite(values).all():
        return Estimate(sum(map(float, values)) / float(weights.sum()), math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        drawn = generator.integers(0, len(values), (rows, len(values)))
        means.append(values[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail])
    return Estimate(float(values.sum() / weights.sum()), float(low), float(high))


def compare(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of two models.

    Args:
        first: `[n]`, mean score of each problem, or its sum where weights are given.
        second: `[n]`, the other model's, problem by problem.
        weights: `[n]`, what the sums are divided by (tokens, for a loss); None for ones.
        confidence: Of the interval.
        resamples: Of the bootstrap and of the permutation test, which is exact where fewer than
            this many sign patterns exist.
        seed: Of both.

    Returns:
        The comparison; NaN but for the number of problems where a score is NaN or infinite.

    Raises:
        ValueError: The arrays differ in length, or are empty.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} problems, expected the same")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Comparison(math.nan, math.nan, math.nan, math.nan, len(first))
    differences = first - second
    interval = estimate(differences, weights, confidence=confidence, resamples=resamples, seed=seed)
    return Comparison(
        interval.mean,
        interval.low,
        interval.high,
        _sign_flip_p(differences, resamples, seed),
        len(differences),
    )


def _sign_flip_p(differences: NDArray[np.float64], resamples: int, seed: int) -> float:
    """Two-sided p-value of a sign-flip permutation test on the sum of differences.

    Weights do not matter to it: what the sum is divided by is the same for all patterns.
    """
    telling = differences[differences != 0.0]
    if len(telling) == 0:
        return 1.0
    # Sums of the same numbers in another order differ in their last bits.
    observed = abs(telling.sum()) - 1e-12 * np.abs(telling).sum()
    if len(telling) < 30 and 2 ** len(telling) <= resamples:
        patterns = np.arange(2 ** len(telling))[:, None] >> np.arange(len(telling)) & 1
        sums = (1.0 - 2.0 * patterns) @ telling
        return float(np.mean(np.abs(sums) >= observed))
    generator = np.random.default_rng(seed)
    as_large = 0
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        signs = generator.integers(0, 2, (rows, len(telling))) * 2.0 - 1.0
        as_large += int(np.sum(np.abs(signs @ telling) >= observed))
    # The observed pattern is one of those possible: p is never 0.
    return (as_large + 1) / (resamples + 1)


def samples_to_tell(found: Comparison) -> int | None:
    """About how many samples would tell two models apart, if their difference is what it seems.

    The interval shrinks with the square root of the number of samples.

    Returns:
        None where there is no difference.
    """
    width = (found.high - found.low) / 2.0
    if found.difference == 0.0 or not math.isfinite(width):
        return None
    return math.ceil(found.num_problems * (width / abs(found.difference)) ** 2)


def joined(found: Sequence[Comparison]) -> Comparison:
    """The mean of independent differences of the same two models, over several tasks.

    Half the width of its interval is that of the root of the sum of squares; the p-value follows
    from it by the normal distribution.
    """
    if len(found) == 1:
        return found[0]
    count = len(found)
    difference = math.fsum(each.difference for each in found) / count
    halves = [(each.high - each.low) / 2.0 for each in found]
    half = math.sqrt(math.fsum(h * h for h in halves)) / count
    error = half / 1.96
    if error == 0.0:
        p_value = 0.0 if difference else 1.0
    else:
        p_value = math.erfc(abs(difference) / error / math.sqrt(2.0))
    problems = sum(each.num_problems for each in found)
    return Comparison(difference, difference - half, difference + half, p_value, problems)

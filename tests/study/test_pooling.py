"""Numbers over several runs, against a plain program."""

from __future__ import annotations

import numpy as np
import pytest

from arm_ray.evaluation.statistics import compare, estimate
from arm_ray.study.pooling import aligned, pooled_comparison, pooled_estimate


def plain_interval(values, weights, resamples: int) -> tuple[float, float]:
    """Runs and problems drawn one by one."""
    runs, problems = values.shape
    generator = np.random.default_rng(7)
    means = []
    for _ in range(resamples):
        rows = generator.integers(0, runs, runs)
        columns = generator.integers(0, problems, problems)
        crossed = np.ix_(rows, columns)
        means.append(values[crossed].sum() / weights[crossed].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@pytest.fixture
def table() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    weights = np.tile(generator.integers(5, 50, 40).astype(float), (3, 1))
    runs = np.array([[0.3], [-0.2], [0.1]])
    return (2.0 + runs + generator.normal(0, 0.5, (3, 40))) * weights, weights


def test_the_interval_is_that_of_the_plain_program(table) -> None:
    values, weights = table
    found = pooled_estimate(values, weights, resamples=20_000)
    assert found.mean == pytest.approx(values.sum() / weights.sum())
    low, high = plain_interval(values, weights, 20_000)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.03 * width)
    assert found.high == pytest.approx(high, abs=0.03 * width)
    # Runs that differ make it wider than that over problems alone.
    alone = estimate(values.mean(axis=0), weights.mean(axis=0))
    assert width > 1.2 * (alone.high - alone.low)


def test_one_run_has_the_interval_over_problems(table) -> None:
    values, weights = table
    assert pooled_estimate(values[:1], weights[:1]) == estimate(values[0], weights[0])
    one = pooled_comparison(values[:1], values[1:2], weights[:1])
    assert one == compare(values[0], values[1], weights[0])


def test_what_both_have_of_a_run_cancels(table) -> None:
    values, weights = table
    better = values - 0.01 * weights
    found = pooled_comparison(better, values, weights, resamples=1000)
    assert found.difference == pytest.approx(-0.01)
    assert found.low == pytest.approx(-0.01)
    assert found.high == pytest.approx(-0.01)
    assert found.p_value == compare(better.sum(axis=0), values.sum(axis=0), resamples=1000).p_value
    assert found.num_problems == 40


def test_the_same_numbers_give_the_same_interval(table) -> None:
    assert pooled_estimate(*table, resamples=700) == pooled_estimate(*table, resamples=700)


def test_what_is_not_finite_has_no_interval(table) -> None:
    values, weights = table
    values[0, 0] = np.nan
    assert np.isnan(pooled_estimate(values, weights).low)
    assert np.isnan(pooled_comparison(values, values, weights).difference)


def test_runs_are_aligned_by_problem() -> None:
    problems, values = aligned(
        [("a", "b", "c"), ("c", "a")], [np.array([1.0, 2.0, 3.0]), np.array([30.0, 10.0])]
    )
    assert problems == ["a", "c"]
    assert values.tolist() == [[1.0, 3.0], [10.0, 30.0]]

"""Intervals and paired comparisons against what they are by definition."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from arm_ray.evaluation.statistics import compare, estimate

PROPERTY = settings(deadline=None, max_examples=50, derandomize=True)


def test_the_mean_and_an_interval_around_it() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.2, 0.6])
    found = estimate(values, resamples=20_000)
    assert found.mean == pytest.approx(values.mean())
    # The bootstrap's own standard error is that of the mean, with n in the denominator.
    error = values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.mean < found.high


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        values = (generator.random(60) < 0.3).astype(float)
        found = estimate(values, resamples=500, seed=trial)
        covered += found.low <= 0.3 <= found.high
    # Binomial with 200 trials of 0.95: three standard deviations below is 0.904.
    assert covered / 200 > 0.88


def test_sums_over_weights_are_a_ratio() -> None:
    sums, tokens = np.array([3.0, 10.0, 2.0]), np.array([1.0, 5.0, 4.0])
    assert estimate(sums, tokens, resamples=200).mean == pytest.approx(1.5)


def test_equal_values_have_no_width() -> None:
    found = estimate(np.full(7, 0.5), resamples=200)
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate(np.zeros(0))


def exact_p(differences: list[float]) -> float:
    """Over all ways to swap the two models problem by problem."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


@PROPERTY
@given(st.lists(st.sampled_from([-1.0, -0.4, -0.2, 0.0, 0.2, 0.6, 1.0]), min_size=1, max_size=9))
def test_small_samples_have_the_exact_p_value(differences: list[float]) -> None:
    first = np.array(differences)
    found = compare(first, np.zeros(len(first)), resamples=1000)
    assert found.p_value == pytest.approx(exact_p(differences))
    assert found.difference == pytest.approx(first.mean())


@PROPERTY
@given(st.integers(0, 10_000))
def test_swapping_the_models_turns_the_sign_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.random(12), generator.random(12)
    one, other = compare(first, second, resamples=500), compare(second, first, resamples=500)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value)


def test_large_samples_approach_the_exact_p_value() -> None:
    # 13 problems won and 5 lost of 40: the sign test's p is known from the binomial.
    differences = np.array([1.0] * 13 + [-1.0] * 5 + [0.0] * 22)
    sign_test = 2 * sum(math.comb(18, k) for k in range(13, 19)) / 2**18
    found = compare(differences, np.zeros(40), resamples=20_000)
    assert found.p_value == pytest.approx(sign_test, abs=0.01)


def test_equal_models_are_not_told_apart() -> None:
    values = np.array([0.0, 0.4, 1.0])
    found = compare(values, values)
    assert (found.difference, found.p_value) == (0.0, 1.0)


def test_a_clear_difference_is_found_and_p_is_never_zero() -> None:
    found = compare(np.ones(200), np.zeros(200), resamples=1000)
    assert 0.0 < found.p_value <= 1 / 1001
    assert found.low == 1.0


@PROPERTY
@given(st.integers(0, 10_000))
def test_weights_make_it_the_difference_of_the_weighted_means(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 1000, 9).astype(float)
    first, second = generator.random(9) * tokens, generator.random(9) * tokens
    found = compare(first, second, tokens, resamples=1000)
    one, other = (estimate(sums, tokens, resamples=100).mean for sums in (first, second))
    assert found.difference == pytest.approx(one - other, abs=1e-12)
    assert found.low <= found.difference <= found.high
    assert found.p_value == pytest.approx(exact_p(list(first - second)))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_has_no_interval_and_no_p_value(broken: float) -> None:
    values = np.array([0.5, broken, 0.1])
    found = estimate(values)
    assert not math.isfinite(found.mean)
    assert math.isnan(found.low)
    compared = compare(np.full(3, 0.2), values)
    assert math.isnan(compared.p_value)
    assert math.isnan(compared.difference)
    assert math.isnan(compare(values, values).p_value)


def test_different_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same"):
        compare(np.zeros(3), np.zeros(4))

"""Which state is selected, and when a run stops looking."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.selection import Criterion, best_state, make_criterion, stops_at
from arm_ray.evaluation.settings import SelectSettings

METRICS = {"gsm8k": ("strict", "qwen_compat"), "mbpp": ("pass@1",), "held": ("loss",)}
HIGHER = Criterion((("gsm8k", "strict"),), True)
LOWER = Criterion((("held", "loss"),), False)
PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)


def test_the_last_state_needs_no_criterion() -> None:
    assert make_criterion(SelectSettings(), METRICS) is None


@pytest.mark.parametrize(
    ("select", "metrics", "higher"),
    [
        (SelectSettings("gsm8k"), (("gsm8k", "strict"),), True),
        (SelectSettings("gsm8k", "qwen_compat"), (("gsm8k", "qwen_compat"),), True),
        (SelectSettings("held"), (("held", "loss"),), False),
        (SelectSettings("average"), (("gsm8k", "strict"), ("mbpp", "pass@1")), True),
        (
            SelectSettings("average", "qwen_compat"),
            (("gsm8k", "qwen_compat"), ("mbpp", "pass@1")),
            True,
        ),
    ],
)
def test_what_states_are_compared_by(
    select: SelectSettings, metrics: tuple[tuple[str, str], ...], higher: bool
) -> None:
    assert make_criterion(select, METRICS) == Criterion(metrics, higher)


@pytest.mark.parametrize(
    ("select", "text"),
    [
        (SelectSettings("math500"), "one of gsm8k, mbpp, held, average, last"),
        (SelectSettings("mbpp", "strict"), "pass@1"),
        (SelectSettings(patience=2), "the name of a task"),
    ],
)
def test_what_cannot_be_compared_is_refused(select: SelectSettings, text: str) -> None:
    with pytest.raises(EvaluationError, match=text):
        make_criterion(select, METRICS)


def test_losses_have_no_average() -> None:
    with pytest.raises(EvaluationError, match="losses only"):
        make_criterion(SelectSettings("average"), {"held": ("loss",)})


def test_the_value_is_the_mean_and_a_missing_one_is_none() -> None:
    both = Criterion((("a", "strict"), ("b", "pass@1")), True)
    assert both.value({("a", "strict"): 0.5, ("b", "pass@1"): 0.7}) == pytest.approx(0.6)
    assert both.value({("a", "strict"): 0.5}) is None
    assert both.value({("a", "strict"): math.nan}) is None
    found = both.value({("a", "strict"): 0.5, ("b", "pass@1"): math.nan})
    assert found is not None
    assert math.isnan(found)


@pytest.mark.parametrize("criterion", [HIGHER, LOWER])
def test_a_state_whose_score_is_nan_is_never_better(criterion: Criterion) -> None:
    assert best_state({1: math.nan, 2: 0.5}, criterion) == 2
    assert best_state({1: 0.5, 2: math.nan}, criterion) == 1
    assert best_state({1: math.nan}, criterion) is None
    assert stops_at({1: 0.5, 2: math.nan, 3: math.nan}, criterion, 2) == 3
    assert stops_at({1: math.nan, 2: 0.5, 3: 0.5}, criterion, 2) is None
    assert not criterion.is_better(math.nan, 0.5)
    assert criterion.is_better(0.5, math.nan)


def test_the_earlier_of_equal_states_is_the_best() -> None:
    assert best_state({3: 0.4, 1: 0.2, 2: 0.4}, HIGHER) == 2
    assert best_state({1: 2.0, 2: 1.5, 3: 1.5}, LOWER) == 2
    assert best_state({1: None, 2: 0.1}, HIGHER) == 2
    assert best_state({1: None}, HIGHER) is None
    assert best_state({}, HIGHER) is None


def test_patience_counts_states_that_are_no_better_than_the_best() -> None:
    values: dict[int, float | None] = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.9}
    assert stops_at(values, HIGHER, 1) == 3
    assert stops_at(values, HIGHER, 2) == 4
    assert stops_at(values, HIGHER, 3) is None
    assert stops_at(values, HIGHER, None) is None
    assert stops_at({1: 1.0, 2: 0.9, 3: 0.95, 4: 0.96}, LOWER, 2) == 4


def test_a_score_that_is_still_awaited_decides_nothing() -> None:
    assert stops_at({1: 0.5, 2: None, 3: 0.4, 4: 0.3}, HIGHER, 1) is None


@PROPERTY
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_where_it_stops_does_not_depend_on_what_comes_later(
    numbers: list[int], patience: int
) -> None:
    values: dict[int, float | None] = {t: float(v) for t, v in enumerate(numbers, start=1)}
    stop = stops_at(values, HIGHER, patience)
    if stop is None:
        return
    known = {t: value for t, value in values.items() if t <= stop}
    assert stops_at(known, HIGHER, patience) == stop
    assert stops_at({t: v for t, v in known.items() if t < stop}, HIGHER, patience) is None
    best = best_state(known, HIGHER)
    assert best is not None
    assert stop - best == patience

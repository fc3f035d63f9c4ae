"""Averages of checkpoints against the recursions that define them."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.errors import ConfigError
from arm_ray.merging.average import member_weights
from arm_ray.merging.operator_settings import AverageSettings
from tests.builders.operators import (
    PROPERTY,
    assert_near,
    assert_rows_give_the_whole,
    exact,
    inputs_of,
    merge,
    method_of,
    seeds,
    shapes,
)
from tests.builders.tensors import gaussian

KINDS = ("uniform", "ema", "linear", "weighted")


def expected_average(models: list[np.ndarray], settings: AverageSettings) -> np.ndarray:
    models = models[-settings.last :] if settings.last else models
    if settings.kind == "ema":
        average = models[0]
        for t, model in enumerate(models[1:], 1):
            a = min(settings.decay, (t + 1) / (t + 10)) if settings.warm_up else settings.decay
            average = a * average + (1 - a) * model
        return average
    weights = {"uniform": np.ones(len(models)), "linear": 1.0 + np.arange(len(models))}
    return np.average(models, axis=0, weights=weights.get(settings.kind, settings.weights))


@PROPERTY
@given(
    shapes,
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.none() | st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_every_kind(shape, kind, count, last, warm_up, window, seed) -> None:
    window, last = window and count > 1, min(last, count) if last else None
    used = last or count
    settings = AverageSettings(
        kind,
        last,
        decay=0.6 if kind == "ema" else 0.8,
        warm_up=warm_up and kind == "ema",
        weights=tuple(i % 3 + 0.5 for i in range(used)) if kind == "weighted" else None,
    )
    vectors = [gaussian(*shape, seed=seed + i) for i in range(count - window)]
    inputs = inputs_of(gaussian(*shape, seed=seed + 9), vectors, includes_reference=window)
    found = merge(method_of("average", count, average=settings), inputs)
    reference, vectors = exact(inputs)
    models = ([reference] if window else []) + [reference + v for v in vectors]
    assert_near(found, expected_average(models, settings))
    weights = member_weights(settings, count)
    assert len(weights) == count
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "ema", "linear"])
def test_no_change_gives_the_reference(kind) -> None:
    reference = gaussian(4, 3)
    inputs = inputs_of(reference, [torch.zeros(4, 3)] * 2)
    assert torch.equal(
        merge(method_of("average", average=AverageSettings(kind)), inputs), reference
    )


def test_the_last_one_alone_is_the_last_checkpoint() -> None:
    inputs = inputs_of(gaussian(5), [gaussian(5, seed=i) for i in (1, 2)])
    found = merge(method_of("average", average=AverageSettings(last=1)), inputs)
    assert_near(found, inputs.contributors[1].numpy())


def test_a_window_of_which_only_the_reference_is_left() -> None:
    reference = gaussian(5)
    inputs = inputs_of(reference, [], includes_reference=True, divisor=1)
    assert torch.equal(merge(method_of("average", 1), inputs), reference)


@PROPERTY
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(KINDS[:3]),
    seeds,
    st.lists(st.integers(0, 99), max_size=4),
)
def test_rows_give_the_bits_of_the_whole(rows, width, kind, seed, cuts) -> None:
    vectors = [gaussian(rows, width, seed=seed + i) for i in range(3)]
    method = method_of("average", 3, average=AverageSettings(kind))
    assert_rows_give_the_whole(method, inputs_of(gaussian(rows, width), vectors), cuts)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (AverageSettings("weighted"), "weights: got null, expected one for each of 3 models"),
        (
            AverageSettings("weighted", weights=(1.0, 2.0)),
            "weights: got 2 weights, expected one for each of 3 models",
        ),
        (
            AverageSettings("weighted", last=2, weights=(1.0, 2.0, 3.0)),
            "weights: got 3 weights, expected one for each of 2 models",
        ),
        (
            AverageSettings("weighted", weights=(0.0, 0.0, 0.0)),
            "weights: got only zeros, expected at least one positive weight",
        ),
        (
            AverageSettings("linear", weights=(1.0, 2.0, 3.0)),
            "weights: got weights with kind 'linear', expected kind 'weighted'",
        ),
        (AverageSettings(last=4), "last: got 4, expected at most the 3 models"),
        (AverageSettings(decay=0.5), "decay: got 0.5 with kind 'uniform', expected kind 'ema'"),
        (
            AverageSettings("linear", warm_up=True),
            "warm_up: got True with kind 'linear', expected kind 'ema'",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, text) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"  - method.average.{text}")):
        method_of("average", 3, average=settings)


def test_a_merge_of_another_size_than_was_checked_is_not_overlooked() -> None:
    method = method_of("average", 2, average=AverageSettings("weighted", weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match="got 2, expected one for each of 3 models"):
        merge(method, inputs_of(gaussian(3), [gaussian(3)] * 3))

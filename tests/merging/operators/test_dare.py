"""DARE: who is dropped depends on names and places alone, and the mean is the task vector."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.merging.dare import drop
from arm_ray.merging.operator_settings import AverageSettings, DareSettings, TiesSettings
from tests.builders.operators import (
    PROPERTY,
    assert_near,
    assert_rows_give_the_whole,
    inputs_of,
    merge,
    merge_model,
    method_of,
    pieces,
    seeds,
)
from tests.builders.tensors import gaussian


def thinned(vector: torch.Tensor, settings: DareSettings, **others) -> torch.Tensor:
    chosen = {"name": "w", "contributor": "c", "iteration": 1, **others}
    shape = tuple(vector.shape)
    return drop(vector.clone(), slice(None), shape, settings=settings, **chosen)


def survivors(count: int, p: float, seed: int = 0) -> np.ndarray:
    """Drawn one 32-bit word at a time, from the start of the stream."""
    key = hashlib.sha256(json.dumps([seed, 1, "w", "c"]).encode()).digest()[:16]
    stream = np.random.Philox(key=int.from_bytes(key, "little"))
    words: list[int] = []
    while len(words) < count:
        raw = int(stream.random_raw())
        words += [raw & 0xFFFFFFFF, raw >> 32]
    return np.array([word >= p * 2**32 for word in words[:count]])


@PROPERTY
@given(st.integers(0, 200), st.floats(0.0, 0.999), st.integers(0, 2**70))
def test_element_e_is_decided_by_word_e(count, p, seed) -> None:
    vector = gaussian(count, seed=1)
    found = thinned(vector, DareSettings(p, "none", seed=seed))
    assert torch.equal(found, vector * torch.from_numpy(survivors(count, p, seed)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_survivors_are_scaled_by_exactly_one_over_one_minus_p(p: float) -> None:
    vector = gaussian(300, 40, seed=1)
    found = thinned(vector, DareSettings(p))
    alive = found != 0
    assert torch.equal(found[alive], vector[alive] * torch.tensor(1.0 / (1.0 - p)))
    share = float(alive.float().mean())
    assert abs(share - (1.0 - p)) < 5.0 * math.sqrt(p * (1.0 - p) / vector.numel())


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    vector, count, p = gaussian(500, seed=1), 400, 0.75
    total = sum(thinned(vector, DareSettings(p, seed=seed)).double() for seed in range(count))
    deviation = (total / count - vector) / (vector.abs() * math.sqrt(p / (1.0 - p) / count))
    assert float(deviation.abs().max()) < 5.0
    assert abs(float(deviation.pow(2).mean()) - 1.0) < 0.3


def test_the_tensor_s_sum_of_magnitudes_is_kept() -> None:
    vector = gaussian(70, 30, seed=1)
    found = thinned(vector, DareSettings(0.8, "l1"))
    assert float(found.double().abs().sum()) == pytest.approx(float(vector.double().abs().sum()))
    alive = found != 0
    ratio = found[alive] / vector[alive]
    assert float(ratio.max() - ratio.min()) < 1e-5
    # Nothing to keep up, and nothing left to do it.
    assert not thinned(torch.zeros(4), DareSettings(0.8, "l1")).any()
    assert not thinned(torch.ones(3), DareSettings(1.0 - 1e-15, "l1")).any()


def test_names_iteration_and_seed_tell_streams_apart() -> None:
    vector = torch.ones(200)
    found = [
        thinned(vector, DareSettings(0.5)),
        thinned(vector, DareSettings(0.5, seed=1)),
        thinned(vector, DareSettings(0.5), name="w2"),
        thinned(vector, DareSettings(0.5), contributor="c2"),
        thinned(vector, DareSettings(0.5), iteration=2),
        # No way to move a boundary between two names.
        thinned(vector, DareSettings(0.5), name="w,c", contributor=""),
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert 50 < int((one == other).sum()) < 150
    assert torch.equal(found[0], thinned(vector, DareSettings(0.5)))


def test_a_rate_of_zero_changes_nothing() -> None:
    vector = gaussian(9, 5)
    for rescale in ("exact", "l1", "none"):
        assert torch.equal(thinned(vector, DareSettings(0.0, rescale)), vector)


@PROPERTY
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(["task_arithmetic", "ties", "average"]),
    seeds,
    st.lists(st.integers(0, 99), max_size=5),
)
def test_pieces_of_rows_give_the_bits_of_the_whole(rows, width, then, seed, cuts) -> None:
    vectors = [gaussian(rows, width, seed=seed + i) for i in range(2)]
    method = method_of("dare", dare=DareSettings(0.6, then=then, seed=seed))
    assert_rows_give_the_whole(method, inputs_of(gaussian(rows, width), vectors), cuts)


def test_large_tensors_are_thinned_in_blocks_of_the_same_stream() -> None:
    vector = torch.ones(300_001, 1)
    settings = DareSettings(0.5, "none")
    whole = thinned(vector, settings)
    inputs = inputs_of(torch.zeros(300_001, 1), [vector], name="w", contributor_names=("c",))
    method = method_of("dare", 1, coefficient=1.0, dare=settings)
    parts = merge_model(method, pieces(inputs, [1, 65_537, 200_003]))
    assert torch.equal(torch.cat(parts), whole)
    expected = survivors(300_001, 0.5)
    assert torch.equal(whole.reshape(-1), torch.from_numpy(expected).float())


def test_l1_needs_whole_tensors() -> None:
    assert method_of("dare", dare=DareSettings()).takes_rows(2, True)
    assert not method_of("dare", dare=DareSettings(rescale="l1")).takes_rows(2, True)
    assert not method_of("dare", dare=DareSettings(rescale="l1")).takes_rows(1, False)
    assert method_of("task_arithmetic").takes_rows(2, True)


@pytest.mark.parametrize("then", ["task_arithmetic", "ties", "average"])
def test_the_thinned_task_vectors_are_merged_by_the_operator_after_it(then: str) -> None:
    vectors = [gaussian(20, 11, seed=i) for i in range(2)]
    inputs = inputs_of(torch.zeros(20, 11), vectors)
    settings = DareSettings(0.5, then=then, seed=3)
    extra = {"ties": TiesSettings(keep=0.3)} if then == "ties" else {}
    if then == "average":
        extra = {"average": AverageSettings("linear")}
    found = merge(method_of("dare", dare=settings, **extra), inputs)
    thin = [
        thinned(v, settings, contributor=name)
        for v, name in zip(vectors, inputs.contributor_names, strict=True)
    ]
    assert_near(
        found, merge(method_of(then, **extra), inputs_of(torch.zeros(20, 11), thin)).numpy()
    )


def test_contributors_without_names_are_told_apart() -> None:
    inputs = inputs_of(torch.zeros(400), [torch.ones(400), -torch.ones(400)])
    found = merge(method_of("dare", coefficient=1.0), replace(inputs, contributor_names=()))
    assert found.any()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4)])
def test_scalars_and_small_tensors(shape) -> None:
    vectors = [torch.ones(shape)] * 2
    found = merge(method_of("dare"), inputs_of(torch.zeros(shape), vectors))
    assert found.shape == shape
    unchanged = merge(method_of("dare"), inputs_of(torch.ones(shape), [torch.zeros(shape)] * 2))
    assert torch.equal(unchanged, torch.ones(shape))

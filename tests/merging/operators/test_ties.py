"""TIES against its formula in NumPy, tensor by tensor and over a whole model."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.merging import quantile
from arm_ray.merging.operator_settings import TiesSettings
from tests.builders.operators import (
    PROPERTY,
    assert_near,
    assert_rows_give_the_whole,
    exact,
    inputs_of,
    merge,
    merge_model,
    method_of,
    pieces,
    seeds,
    shapes,
)
from tests.builders.tensors import coarse, gaussian

choices = st.builds(
    TiesSettings,
    keep=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    scope=st.sampled_from(["global", "per_tensor"]),
    zero_sign=st.sampled_from(["majority", "positive"]),
    combine=st.sampled_from(["mean", "sum", "max"]),
)


def method(count: int = 2, coefficient: float = 1.0, **chosen: Any) -> Any:
    return method_of("ties", count, coefficient=coefficient, ties=TiesSettings(**chosen))


def kept_by_sorting(values: np.ndarray, keep: float) -> np.ndarray:
    """The entries that survive the trim, all others zero."""
    d = values.size
    k = d - int(d * keep)
    if k == 0:
        return values
    limit = np.sort(np.abs(values))[k - 1]
    return np.where(np.abs(values) >= limit, values, 0.0)


def expected_update(vectors: list[np.ndarray], ties: TiesSettings) -> np.ndarray:
    """TIES of flat task vectors, by the book."""
    trimmed = np.stack([kept_by_sorting(v, ties.keep) for v in vectors])
    elected = np.sign(trimmed.sum(0))
    majority = np.sign(elected.sum()) if ties.zero_sign == "majority" else 1.0
    elected[elected == 0] = majority
    agrees = np.where(elected > 0, trimmed > 0, trimmed < 0)
    kept = trimmed * agrees
    if ties.combine == "max":
        return np.where(elected > 0, kept.max(0), kept.min(0))
    total = kept.sum(0)
    return total / np.maximum(1, (kept != 0).sum(0)) if ties.combine == "mean" else total


@PROPERTY
@given(shapes, st.integers(1, 4), choices, seeds, st.booleans())
def test_one_tensor(shape, count, ties, seed, with_ties) -> None:
    make = coarse if with_ties else gaussian
    inputs = inputs_of(make(*shape, seed=seed), [make(*shape, seed=seed + i) for i in range(count)])
    found = merge(method_of("ties", count, coefficient=0.3, ties=ties), inputs)
    reference, vectors = exact(inputs)
    update = expected_update([v.reshape(-1) for v in vectors], ties).reshape(shape)
    assert_near(found, reference + 0.3 * update)


@PROPERTY
@given(st.integers(1, 3), choices, seeds, st.booleans(), st.lists(st.integers(0, 99), max_size=3))
def test_a_model_in_pieces(count, ties, seed, with_ties, cuts) -> None:
    make = coarse if with_ties else gaussian
    sizes = [(6, 5), (9,), (), (4, 7)]
    # Of different magnitudes, so that a threshold of one tensor is none of another.
    tensors = [
        inputs_of(
            make(*shape, seed=seed + 100 * n),
            [2.0**n * make(*shape, seed=seed + 100 * n + 10 + i) for i in range(count)],
            name=f"t{n}",
        )
        for n, shape in enumerate(sizes)
    ]
    chosen = method_of("ties", count, coefficient=0.5, ties=ties)
    found = merge_model(chosen, tensors)
    flat = [np.concatenate([exact(t)[1][i].reshape(-1) for t in tensors]) for i in range(count)]
    update = expected_update(flat, ties)
    for tensor, merged in zip(tensors, found, strict=True):
        reference, vectors = exact(tensor)
        if ties.scope == "global":
            head, update = update[: reference.size], update[reference.size :]
        else:
            head = expected_update([v.reshape(-1) for v in vectors], ties)
        assert_near(merged, reference + 0.5 * head.reshape(reference.shape))
    assert chosen.takes_rows(2, True) == (ties.scope == "global")
    assert chosen.has_statistics == (chosen.rounds(count) > 0)
    if ties.scope == "per_tensor":
        assert chosen.rounds(count) == 0
        return
    split = [p for t in tensors for p in (pieces(t, cuts) if t.reference.ndim else [t])]
    again = merge_model(chosen, split)
    assert torch.equal(
        torch.cat([t.reshape(-1) for t in again]), torch.cat([t.reshape(-1) for t in found])
    )


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_201_of_1000_are_kept_and_one_model_is_only_trimmed(scope) -> None:
    vector = gaussian(1000, seed=1)
    found = merge(method(1, keep=0.2, scope=scope), inputs_of(torch.zeros(1000), [vector]))
    assert int((found != 0).sum()) == 201
    assert torch.equal(found[found != 0], vector[found != 0])
    assert float(vector[found == 0].abs().max()) < float(found[found != 0].abs().min())


def test_equal_task_vectors_give_the_trimmed_one() -> None:
    vector = gaussian(40, 30, seed=2)
    inputs = inputs_of(torch.zeros(40, 30), [vector] * 3)
    one = inputs_of(torch.zeros(40, 30), [vector])
    assert_near(merge(method(3), inputs), merge(method(1), one).numpy())


def test_contributors_may_come_in_any_order() -> None:
    reference, vectors = gaussian(20, 20), [gaussian(20, 20, seed=i) for i in range(1, 4)]
    first = merge(method(3, keep=0.5), inputs_of(reference, vectors))
    second = merge(method(3, keep=0.5), inputs_of(reference, vectors[::-1]))
    assert_near(first, second.double().numpy())


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_no_change_gives_the_reference(shape, keep) -> None:
    reference = gaussian(*shape)
    found = merge(method(2, keep=keep), inputs_of(reference, [torch.zeros(shape)] * 2))
    assert torch.equal(found, reference)


def test_a_zero_sum_takes_the_sign_of_the_majority_of_the_model() -> None:
    first = inputs_of(torch.zeros(3), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, 0])])
    for others, sign in ((-1.0, -1.0), (1.0, 1.0)):
        second = inputs_of(torch.zeros(4), [torch.full((4,), others)] * 2)
        merged = merge_model(method(2, keep=1.0), [first, second])
        assert merged[0].tolist() == [sign, 1.5, 0.0]
    # As many + as −: then −, as in the authors' code.
    balanced = inputs_of(torch.zeros(1), [torch.tensor([-3.0])] * 2)
    assert merge_model(method(2, keep=1.0), [first, balanced])[0].tolist() == [-1.0, 1.5, 0.0]
    positive = method(2, keep=1.0, zero_sign="positive")
    assert merge_model(positive, [first, balanced])[0].tolist() == [1.0, 1.5, 0.0]


def test_rounding_does_not_decide_a_sign() -> None:
    # The sum is 1; added up in float32 it would be 0.
    big = float(np.float32(1e8))
    vectors = [torch.tensor([v]) for v in (big, 1.0, -big)]
    found = merge(method(3, keep=1.0, combine="sum"), inputs_of(torch.zeros(1), vectors))
    assert found.tolist() == [big]


def test_mostly_zero_vectors_as_after_dare_are_all_kept() -> None:
    vector = gaussian(30, 30, seed=3) * (gaussian(30, 30, seed=4) > 1.3)
    found = merge(method(1, keep=0.2), inputs_of(torch.zeros(30, 30), [vector]))
    assert torch.equal(found, vector)


@PROPERTY
@given(st.integers(1, 2000), st.floats(0.001, 1.0), seeds, st.booleans())
def test_thresholds_are_order_statistics(count, keep, seed, with_ties) -> None:
    values = (coarse if with_ties else gaussian)(count, seed=seed)
    values *= 10.0 ** (gaussian(count, seed=seed + 1) * 12).clamp(-44, 30)
    (found,) = quantile.thresholds([values], keep)
    rank = quantile.rank_of(count, keep)
    assert found == (0.0 if rank == 0 else float(values.abs().sort().values[rank - 1]))


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 40), seeds, st.lists(st.integers(0, 99), max_size=4))
def test_rows_give_the_bits_of_the_whole(rows, width, seed, cuts) -> None:
    vectors = [gaussian(rows, width, seed=seed + i) for i in range(3)]
    for combine in ("mean", "max"):
        chosen = method(3, 0.7, combine=combine)
        assert_rows_give_the_whole(chosen, inputs_of(gaussian(rows, width), vectors), cuts)

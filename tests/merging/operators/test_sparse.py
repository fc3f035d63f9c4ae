"""Operators that choose entries, and steps that drop some, against plain programs in NumPy."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.errors import ConfigError
from arm_ray.merging.operator_settings import (
    BreadcrumbsSettings,
    DellaSettings,
    NearswapSettings,
    RamSettings,
    SceSettings,
    TiesSettings,
)
from arm_ray.merging.thinning import drop_outliers, drop_small
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
from tests.builders.tensors import gaussian


def vectors_of(shape: tuple[int, ...], count: int, seed: int) -> list[torch.Tensor]:
    return [gaussian(*shape, seed=seed + i) for i in range(count)]


# --- DELLA --------------------------------------------------------------------------------------


def della(vector: torch.Tensor, settings: DellaSettings) -> torch.Tensor:
    place = (slice(None), tuple(vector.shape), "w", "c", 1)
    return drop_small(vector.clone(), *place, settings)


def chances(row: np.ndarray, p: float, epsilon: float) -> np.ndarray:
    ranks = np.argsort(np.argsort(np.abs(row), kind="stable"))
    spread = 2.0 * ranks / (len(row) - 1) - 1.0 if len(row) > 1 else np.zeros(1)
    return 1.0 - p + epsilon * spread


@PROPERTY
@given(shapes, st.floats(0.2, 0.8), st.floats(0.0, 0.15), seeds)
def test_survivors_are_divided_by_their_chance(shape, p, epsilon, seed) -> None:
    vector = gaussian(*shape, seed=seed)
    found = della(vector, DellaSettings(p, epsilon))
    rows = vector.numpy().reshape(shape[0] if len(shape) > 1 else 1, -1)
    for row, merged in zip(rows, found.numpy().reshape(rows.shape), strict=True):
        alive = merged != 0.0
        expected = row / chances(row, p, epsilon)
        np.testing.assert_allclose(merged[alive], expected[alive], rtol=1e-6)


def test_large_entries_stay_more_often_and_the_mean_is_the_whole() -> None:
    vector, count = gaussian(6, 50, seed=1), 600
    settings = [DellaSettings(0.6, 0.2, seed=seed) for seed in range(count)]
    total = sum(della(vector, each).double() for each in settings)
    alive = sum((della(vector, each) != 0).double() for each in settings) / count
    means = (total / count).numpy()
    for row, share, mean in zip(vector.numpy(), alive.numpy(), means, strict=True):
        expected = chances(row, 0.6, 0.2)
        deviation = np.sqrt(expected * (1.0 - expected) / count)
        assert np.abs((share - expected) / deviation).max() < 5.0
        spread = np.abs(row) * np.sqrt((1.0 - expected) / expected / count)
        assert np.abs((mean - row) / spread).max() < 5.0


def test_the_sum_of_magnitudes_is_kept_where_that_is_asked_for() -> None:
    vector = gaussian(40, 30, seed=1)
    found = della(vector, DellaSettings(0.7, 0.1, "l1"))
    assert float(found.abs().double().sum()) == pytest.approx(float(vector.abs().double().sum()))
    plain = della(vector, DellaSettings(0.7, 0.1, "none"))
    assert torch.equal(plain[plain != 0], vector[plain != 0])
    assert torch.equal(plain != 0, found != 0)


@PROPERTY
@given(st.lists(st.integers(1, 20), max_size=3), seeds)
def test_rows_of_a_matrix_may_come_in_pieces(cuts, seed) -> None:
    method = method_of("della", della=DellaSettings(0.5, 0.1))
    inputs = inputs_of(gaussian(21, 8, seed=seed), vectors_of((21, 8), 2, seed + 1))
    assert_rows_give_the_whole(method, inputs, cuts)
    assert not method.takes_rows(1, False)
    assert not method_of("della", della=DellaSettings(rescale="l1")).takes_rows(2, False)


@pytest.mark.parametrize(("p", "epsilon"), [(0.05, 0.1), (0.95, 0.1), (0.5, 0.5 - 1e-9)])
def test_chances_must_be_chances(p: float, epsilon: float) -> None:
    if p == 0.5:
        method_of("della", della=DellaSettings(p, epsilon))
        return
    with pytest.raises(ConfigError, match=r"method\.della\.epsilon"):
        method_of("della", della=DellaSettings(p, epsilon))


# --- Breadcrumbs --------------------------------------------------------------------------------


@PROPERTY
@given(shapes, st.floats(0.01, 1.0), st.floats(0.0, 0.5), seeds)
def test_the_largest_and_the_smallest_entries_are_dropped(shape, keep, largest, seed) -> None:
    vector = gaussian(*shape, seed=seed)
    found = drop_outliers(vector.clone(), BreadcrumbsSettings(keep, largest))
    flat = vector.numpy().reshape(-1)
    count = flat.size
    kept = int(keep * count)
    top = min(int(largest * count), count - kept)
    order = np.argsort(np.abs(flat), kind="stable")
    expected = np.zeros_like(flat)
    chosen = order[count - kept - top : count - top]
    expected[chosen] = flat[chosen]
    assert np.array_equal(found.numpy().reshape(-1), expected)


@pytest.mark.parametrize("step", ["della", "breadcrumbs"])
@pytest.mark.parametrize("then", ["task_arithmetic", "ties", "average"])
def test_another_operator_merges_what_is_left(step: str, then: str) -> None:
    settings = {
        "della": DellaSettings(0.5, 0.2, then=then),
        "breadcrumbs": BreadcrumbsSettings(0.6, 0.05, then=then),
    }[step]
    inputs = inputs_of(gaussian(9, 7, seed=1), vectors_of((9, 7), 3, 2))
    sections = {"ties": TiesSettings(keep=0.5)} if then == "ties" else {}
    found = merge(method_of(step, 3, **{step: settings}, **sections), inputs)
    thin = []
    for name, vector in zip(inputs.contributor_names, inputs.contributors, strict=True):
        delta = vector - inputs.reference
        if step == "della":
            thin.append(drop_small(delta, slice(None), (9, 7), "w", name, 1, settings))
        else:
            thin.append(drop_outliers(delta, settings))
    # The rounding of a sum with the reference is not there twice.
    direct = replace(inputs, reference=torch.zeros(9, 7), contributors=thin)
    expected = merge(method_of(then, 3, **sections), direct) + inputs.reference
    assert_near(found, expected.double().numpy())


# --- SCE ----------------------------------------------------------------------------------------


def expected_sce(vectors: list[np.ndarray], select: float) -> np.ndarray:
    stacked = np.stack(vectors)
    if select < 1.0:
        variance = np.float32(stacked.var(axis=0)).reshape(-1)
        kept = int(select * np.count_nonzero(variance))
        mask = np.zeros(variance.size, dtype=bool)
        mask[np.argsort(-variance, kind="stable")[:kept]] = True
        stacked = stacked * mask.reshape(stacked.shape[1:])
    weights = np.array([(v**2).sum() for v in stacked])
    total = weights.sum()
    weights = weights / total if total > 0 else np.full(len(weights), 1.0 / len(weights))
    elected = np.where(stacked.sum(0) >= 0.0, 1.0, -1.0)
    shares = weights.reshape(-1, *[1] * (stacked.ndim - 1)) * (np.sign(stacked) == elected)
    divisor = shares.sum(0)
    return (stacked * shares).sum(0) / np.where(divisor > 0.0, divisor, 1.0)


@PROPERTY
@given(shapes, st.integers(1, 4), st.sampled_from([1.0, 0.7, 0.3]), seeds)
def test_sce(shape, count, select, seed) -> None:
    count = max(count, 1 if select == 1.0 else 2)
    inputs = inputs_of(gaussian(*shape, seed=seed), vectors_of(shape, count, seed + 1))
    found = merge(method_of("sce", count, sce=SceSettings(select)), inputs)
    reference, vectors = exact(inputs)
    assert_near(found, reference + expected_sce(vectors, select), 2e-6)


def test_sce_selects_between_models() -> None:
    with pytest.raises(ConfigError, match=r"method\.sce\.select"):
        method_of("sce", 1, sce=SceSettings(0.5))
    method_of("sce", 1, sce=SceSettings(1.0))


# --- NearSwap -----------------------------------------------------------------------------------


@PROPERTY
@given(shapes, st.floats(1e-4, 2.0), seeds)
def test_no_entry_moves_further_than_the_threshold(shape, t, seed) -> None:
    inputs = inputs_of(gaussian(*shape, seed=seed), vectors_of(shape, 1, seed + 1))
    found = merge(method_of("nearswap", 1, nearswap=NearswapSettings(t)), inputs)
    reference, [vector] = exact(inputs)
    share = np.minimum(1.0, t / np.maximum(np.abs(vector), 1e-30))
    assert_near(found, reference + share * vector)


def test_nearswap_takes_one_other_model() -> None:
    with pytest.raises(ConfigError, match="merges exactly 1 models, got 2"):
        method_of("nearswap", 2)


# --- RAM ----------------------------------------------------------------------------------------


def sparse_vectors(shape: tuple[int, ...], count: int, seed: int) -> list[torch.Tensor]:
    found = []
    for index, vector in enumerate(vectors_of(shape, count, seed)):
        kept = gaussian(*shape, seed=seed + 50 + index) > 0.3
        found.append(vector * kept)
    return found


def expected_ram(model: list[list[np.ndarray]], settings: RamSettings) -> list[np.ndarray]:
    """Of tensors, each a list of the runs' task vectors."""
    runs = len(model[0])
    shared, alone = np.zeros(runs), np.zeros(runs)
    for vectors in model:
        changed = np.stack([np.abs(v) > settings.threshold for v in vectors])
        others = changed.sum(0) >= 2
        for run in range(runs):
            shared[run] += (changed[run] & others).sum()
            alone[run] += (changed[run] & ~others).sum()
    factors = [
        1.0 + (settings.rescale - 1.0) * (min(1.0, s / a) if a else 1.0)
        for s, a in zip(shared, alone, strict=True)
    ]
    found = []
    for vectors in model:
        values = np.stack([np.where(np.abs(v) > settings.threshold, v, 0.0) for v in vectors])
        count = np.stack([np.abs(v) > settings.threshold for v in vectors]).sum(0)
        scaled = sum(f * v for f, v in zip(factors, values, strict=True))
        found.append(np.where(count == 1, scaled, values.sum(0) / np.maximum(count, 1)))
    return found


@PROPERTY
@given(st.integers(1, 4), st.sampled_from([1.0, 1.05, 2.0]), st.lists(st.integers(1, 9)), seeds)
def test_ram(count, rescale, cuts, seed) -> None:
    settings = RamSettings(0.05, rescale)
    method = method_of("ram", count, ram=settings)
    model = [
        inputs_of(gaussian(*shape, seed=seed + i), sparse_vectors(shape, count, seed + 7 * i))
        for i, shape in enumerate([(6, 5), (4,), (3, 2)])
    ]
    pairs = [exact(inputs) for inputs in model]
    expected = expected_ram([vectors for _, vectors in pairs], settings)
    found = merge_model(method, model)
    for tensor, (reference, _), update in zip(found, pairs, expected, strict=True):
        assert_near(tensor, reference + update)
    # In any pieces of rows the same bits.
    parts = [piece for inputs in model for piece in pieces(inputs, cuts)]
    assert torch.equal(
        torch.cat([part.flatten() for part in merge_model(method, parts)]),
        torch.cat([tensor.flatten() for tensor in found]),
    )


def test_what_one_run_alone_has_changed_is_not_diluted() -> None:
    reference = torch.zeros(4)
    runs = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 5.0, 0.0])]
    inputs = inputs_of(reference, runs)
    plain = merge(method_of("ram", ram=RamSettings(rescale=1.0)), inputs)
    assert plain.tolist() == [1.0, 2.0, 5.0, 0.0]
    # One entry alone and one shared: the ratio is 1.
    scaled = merge(method_of("ram", ram=RamSettings(rescale=1.5)), inputs)
    assert scaled.tolist() == [1.5, 2.0, 7.5, 0.0]
    assert math.isclose(float(scaled[0]), 1.5)

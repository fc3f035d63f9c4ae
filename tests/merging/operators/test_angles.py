"""Operators that follow the angles and the path of task vectors, against NumPy in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.errors import ConfigError
from arm_ray.merging.average import member_weights
from arm_ray.merging.operator_settings import (
    AverageSettings,
    ModelStockSettings,
    RelexSettings,
    SlerpSettings,
)
from tests.builders.operators import (
    PROPERTY,
    assert_near,
    exact,
    inputs_of,
    merge,
    method_of,
    seeds,
    shapes,
)
from tests.builders.tensors import gaussian


def vectors_of(shape: tuple[int, ...], count: int, seed: int) -> list[torch.Tensor]:
    """Task vectors that point roughly the same way, as those of one run do."""
    common = gaussian(*shape, seed=seed)
    return [common + 0.7 * gaussian(*shape, seed=seed + 1 + i) for i in range(count)]


# --- Model Stock --------------------------------------------------------------------------------


def ratio_of(vectors: list[np.ndarray]) -> float:
    count = len(vectors)
    if count == 1:
        return 1.0
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            cosines.append(np.clip((vectors[i] * vectors[j]).sum() / max(norms, 1e-24), -1.0, 1.0))
    cosine = max(0.0, float(np.mean(cosines)))
    return count * cosine / (1.0 + (count - 1) * cosine)


@PROPERTY
@given(shapes, st.integers(1, 4), st.sampled_from(["tensor", "rows"]), seeds)
def test_model_stock(shape, count, over, seed) -> None:
    inputs = inputs_of(gaussian(*shape, seed=seed + 9), vectors_of(shape, count, seed))
    found = merge(method_of("model_stock", count, model_stock=ModelStockSettings(over)), inputs)
    reference, vectors = exact(inputs)
    mean = np.mean(vectors, axis=0)
    if over == "rows" and len(shape) > 1:
        ratios = np.array([ratio_of([v[row] for v in vectors]) for row in range(shape[0])])
        expected = reference + ratios[:, None] * mean
    else:
        expected = reference + ratio_of(vectors) * mean
    assert_near(found, expected, 2e-6)


def test_models_that_point_away_from_each_other_leave_the_reference() -> None:
    inputs = inputs_of(torch.ones(3), [torch.ones(3), -torch.ones(3)])
    assert merge(method_of("model_stock"), inputs).tolist() == [1.0, 1.0, 1.0]
    same = inputs_of(torch.ones(3), [torch.ones(3), torch.ones(3)])
    assert merge(method_of("model_stock"), same).tolist() == [2.0, 2.0, 2.0]


# --- SLERP row by row ---------------------------------------------------------------------------


def arc(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = (first * second).sum() / norms if norms > 0 else 1.0
    if min(np.linalg.norm(first), np.linalg.norm(second)) <= 1e-8 or abs(cosine) > 0.9995:
        return (1.0 - t) * first + t * second
    angle = np.arccos(cosine)
    return (np.sin((1.0 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


@PROPERTY
@given(
    shapes, st.floats(0.0, 1.0), st.sampled_from(["weights", "task_vectors"]), st.booleans(), seeds
)
def test_slerp_row_by_row(shape, t, of, window, seed) -> None:
    vectors = vectors_of(shape, 1 if window else 2, seed)
    inputs = inputs_of(gaussian(*shape, seed=seed + 9), vectors, includes_reference=window)
    found = merge(method_of("slerp", slerp=SlerpSettings(t, of, "rows")), inputs)
    reference, vectors = exact(inputs)
    ends = [np.zeros_like(reference), *vectors] if window else vectors
    added = reference if of == "weights" else np.zeros_like(reference)
    rows = shape[0] if len(shape) > 1 else 1
    first, second, base = (
        np.reshape(each, (rows, -1)) for each in (ends[0] + added, ends[1] + added, reference)
    )
    merged = np.stack([arc(first[row], second[row], t) for row in range(rows)])
    expected = merged if of == "weights" else base + merged
    assert_near(found, expected.reshape(shape), 2e-6)


# --- RELEX --------------------------------------------------------------------------------------


@PROPERTY
@given(shapes, st.integers(2, 5), st.integers(1, 2), st.booleans(), seeds)
def test_relex(shape, count, rank, given_steps, seed) -> None:
    steps = tuple(10.0 * (s + 1) ** 2 for s in range(count))
    chosen = RelexSettings(target=400.0, steps=steps if given_steps else None, rank=rank)
    inputs = inputs_of(gaussian(*shape, seed=seed + 9), vectors_of(shape, count, seed))
    found = merge(method_of("relex", count, relex=chosen), inputs)
    reference, vectors = exact(inputs)
    matrix = np.stack([v.reshape(-1) for v in vectors])
    times = np.array(steps if given_steps else range(1, count + 1), dtype=np.float64)
    _, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    predicted = np.zeros(matrix.shape[1])
    for k in range(min(rank, len(sigma))):
        if sigma[k] > 1e-6 * sigma[0]:
            path = np.polynomial.Polynomial.fit(times, matrix @ right[k], 1)
            predicted += path(400.0) * right[k]
    assert_near(found, reference + predicted.reshape(shape), 1e-5)


def test_a_straight_path_is_followed_exactly() -> None:
    direction, reference = gaussian(5, 4, seed=1), gaussian(5, 4, seed=2)
    inputs = inputs_of(reference, [0.1 * s * direction for s in (1.0, 2.0, 3.0)])
    settings = RelexSettings(target=50.0, steps=(10.0, 20.0, 30.0))
    found = merge(method_of("relex", 3, relex=settings), inputs)
    torch.testing.assert_close(found, reference + 0.5 * direction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (RelexSettings(), "method.relex.target: is not set"),
        (RelexSettings(target=9.0, steps=(1.0, 2.0, 3.0)), "method.relex.steps: got 3"),
        (RelexSettings(target=9.0, steps=(2.0, 1.0)), "are not in the order of training"),
    ],
)
def test_what_relex_cannot_do(settings: RelexSettings, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        method_of("relex", 2, relex=settings)


# --- WSM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fall", ["linear", "minus_sqrt"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_wsm_is_a_run_whose_learning_rate_falls(fall: str, count: int) -> None:
    """Its steps between the checkpoints, each as much smaller as the rate after it has fallen."""
    checkpoints = [gaussian(4, 3, seed=s).double().numpy() for s in range(count)]
    rates = np.arange(1, count) / count
    rates = 1.0 - (rates if fall == "linear" else np.sqrt(rates))
    expected = checkpoints[0].copy()
    for rate, before, after in zip(rates, checkpoints, checkpoints[1:], strict=False):
        expected += rate * (after - before)
    weights = member_weights(AverageSettings("wsm", fall=fall), count)
    found = sum(w * c for w, c in zip(weights, checkpoints, strict=True))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert sum(weights) == pytest.approx(1.0)


def test_only_wsm_reads_how_the_rate_falls() -> None:
    with pytest.raises(ConfigError, match=r"average\.fall: got linear with kind 'uniform'"):
        method_of("average", average=AverageSettings(fall="linear"))

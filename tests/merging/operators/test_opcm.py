"""OPCM against the authors' recursion, with full decompositions and a λ for each step."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.merging.opcm import project
from arm_ray.merging.operator_settings import OpcmSettings
from tests.builders.operators import (
    PROPERTY,
    assert_near,
    exact,
    inputs_of,
    merge_model,
    method_of,
    seeds,
)
from tests.builders.tensors import coarse, gaussian

SHAPES = [((6, 4), True), ((4, 6), True), ((5, 5), False), ((7,), False), ((), False)]


def full_projection(vector: np.ndarray, merged: np.ndarray, alpha: float) -> np.ndarray:
    if not merged.any():
        return vector
    u, sigma, vt = np.linalg.svd(merged, full_matrices=True)
    share = np.cumsum(sigma) / sigma.sum()
    r = int(np.argmax(share > alpha))
    p = u.T @ vector @ vt.T
    np.fill_diagonal(p, 0.0)
    p[:r, :r] = 0.0
    return u @ p @ vt


def expected_model(
    tensors: list[list[np.ndarray]], linear: list[bool], alpha: float
) -> list[np.ndarray]:
    """Updates of a model, given each tensor's task vectors."""
    norms = [
        np.sqrt(sum((vectors[i] ** 2).sum() for vectors in tensors)) for i in range(len(tensors[0]))
    ]
    merged, scale = [vectors[0] for vectors in tensors], 1.0
    for t in range(1, len(norms)):
        new = [
            scale * m + (full_projection(v[t], m, alpha) if is_linear else v[t])
            for v, m, is_linear in zip(tensors, merged, linear, strict=True)
        ]
        length = np.sqrt(sum((n**2).sum() for n in new))
        scale = length / np.mean(norms[: t + 1])
        merged = [n / scale for n in new]
    return merged


@PROPERTY
@given(st.integers(1, 4), st.sampled_from([0.1, 0.5, 0.9]), seeds)
def test_a_model(count, alpha, seed) -> None:
    model = [
        inputs_of(
            gaussian(*shape, seed=seed + n),
            [gaussian(*shape, seed=seed + 10 * n + i + 5) for i in range(count)],
            name=f"t{n}",
            is_linear=is_linear,
        )
        for n, (shape, is_linear) in enumerate(SHAPES)
    ]
    method = method_of("opcm", count, opcm=OpcmSettings(alpha))
    assert method.rounds(count) == int(count > 1)
    found = merge_model(method, model)
    pairs = [exact(inputs) for inputs in model]
    updates = expected_model([v for _, v in pairs], [flag for _, flag in SHAPES], alpha)
    length = 0.0
    for (reference, _), merged, update in zip(pairs, found, updates, strict=True):
        assert_near(merged, reference + update, 3e-6)
        length += float(((merged.double().numpy() - reference) ** 2).sum())
    means = [np.sqrt(sum((v[i] ** 2).sum() for _, v in pairs)) for i in range(count)]
    assert np.sqrt(length) == pytest.approx(np.mean(means), rel=1e-5)


@PROPERTY
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 0.99), seeds)
def test_what_is_left_is_orthogonal_to_what_was_there(rows, width, alpha, seed) -> None:
    vector, merged = gaussian(rows, width, seed=seed), gaussian(rows, width, seed=seed + 1)
    kept = merged.clone()
    found = project(vector, merged, alpha)
    assert torch.equal(kept, merged)
    assert abs(float((found.double() * merged.double()).sum())) < 1e-5
    assert_near(found, full_projection(vector.double().numpy(), merged.double().numpy(), alpha))


def test_equal_task_vectors_leave_nothing_after_the_first() -> None:
    vector = gaussian(6, 5, seed=1)
    assert float(project(vector, vector, 0.5).abs().max()) < 1e-6
    inputs = inputs_of(torch.zeros(6, 5), [vector] * 3, is_linear=True)
    (found,) = merge_model(method_of("opcm", 3), [inputs])
    assert_near(found, vector.numpy(), 1e-5)


def test_directions_in_which_nothing_was_are_not_singled_out() -> None:
    # Whole numbers, so that the rank is 1 to the last bit.
    vector, one = gaussian(6, 5, seed=1), coarse(6, 1, seed=2) @ coarse(1, 5, seed=6)
    assert one[0].any()
    assert one[:, 0].any()
    u, v = one[:, :1].double(), one[:1].double()
    u, v = u / u.norm(), v / v.norm()
    wide = vector.double()
    expected = wide - u @ (u.T @ wide @ v.T) @ v
    assert_near(project(vector, one, 0.5), expected.numpy())
    assert torch.equal(project(vector, torch.zeros(6, 5), 0.5), vector)


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_no_change_and_what_cancels_give_the_reference(shape, is_linear) -> None:
    reference, vector = torch.ones(shape), torch.full(shape, 0.5)
    flag = is_linear and len(shape) == 2
    for vectors in ([0 * vector] * 3, [vector, -vector]):
        (found,) = merge_model(method_of("opcm"), [inputs_of(reference, vectors, is_linear=flag)])
        if not (flag and vectors[0].any()):
            assert torch.equal(found, reference)
        assert torch.isfinite(found).all()


def test_after_zeros_comes_the_next_as_it_is() -> None:
    vector = gaussian(4, 3, seed=1)
    inputs = inputs_of(torch.zeros(4, 3), [torch.zeros(4, 3), vector], is_linear=True)
    (found,) = merge_model(method_of("opcm"), [inputs])
    assert_near(found, vector.numpy() / 2)


def test_it_needs_whole_tensors() -> None:
    assert not method_of("opcm").takes_rows(2, False)
    assert method_of("opcm").has_statistics

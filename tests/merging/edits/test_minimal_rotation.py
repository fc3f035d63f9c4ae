"""The smallest rotation of one subspace into another, against a dense one and its alternatives."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from arm_ray.merging import svd
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.operator_settings import RotationSettings
from arm_ray.merging.rotation import MinimalRotation, activation_rotation, minimal_rotation
from arm_ray.merging.settings import MethodSettings

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
shapes = st.tuples(st.integers(2, 16), st.integers(1, 16), st.integers(1, 8), st.integers(0, 9999))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(rotation: MinimalRotation | None, size: int) -> torch.Tensor:
    identity = torch.eye(size, dtype=torch.float64)
    return identity if rotation is None else rotation.apply(identity)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed)).Q


def subspace(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors, by LAPACK."""
    return torch.linalg.svd(matrix).U[:, : min(rank, min(matrix.shape))]


def reference(shift: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Plane by plane: with `n` the part of `b` across `a`, turn `(a, n)` by the angle."""
    rank = int(np.linalg.matrix_rank(shift, rtol=1e-6))
    size = len(shift)
    a = np.linalg.svd(delta)[0][:, : min(rank, *delta.shape)]
    b = np.linalg.svd(shift)[0][:, :rank]
    x, cosines, yt = np.linalg.svd(a.T @ b, full_matrices=False)
    result = np.eye(size)
    for u, v, c in zip((a @ x).T, (b @ yt.T).T, np.minimum(cosines, 1.0), strict=True):
        across = v - c * u
        sine = np.linalg.norm(across)
        if sine < 1e-9:
            continue
        plane = np.stack([u, across / sine], axis=1)
        turn = np.array([[c, -sine], [sine, c]])
        result += plane @ (turn - np.eye(2)) @ plane.T
    return result


def distance(matrix: torch.Tensor) -> float:
    return float((matrix - torch.eye(len(matrix), dtype=torch.float64)).norm())


@PROPERTY
@given(shapes)
def test_it_is_a_rotation_of_one_subspace_into_the_other(
    shape: tuple[int, int, int, int],
) -> None:
    d_out, d_in, samples, seed = shape
    shift, delta = gaussian(d_out, samples, seed=seed), gaussian(d_out, d_in, seed=seed + 1)
    r = dense(minimal_rotation(shift, delta), d_out)
    identity = torch.eye(d_out, dtype=torch.float64)
    assert float((r.T @ r - identity).norm()) < 1e-11
    assert float(torch.linalg.det(r)) == pytest.approx(1.0)
    into = subspace(shift, samples)
    turned = r @ subspace(delta, samples)
    assert float((turned - into @ (into.T @ turned)).norm()) < 1e-11
    # The identity on what is orthogonal to both subspaces.
    both = torch.cat([into, subspace(delta, samples)], dim=1)
    others = torch.linalg.svd(both).U[:, torch.linalg.matrix_rank(both) :]
    assert float((r @ others - others).norm()) < 1e-11


@PROPERTY
@given(shapes)
def test_it_equals_the_dense_rotation_plane_by_plane(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, samples, seed = shape
    shift, delta = gaussian(d_out, samples, seed=seed), gaussian(d_out, d_in, seed=seed + 1)
    expected = reference(shift.numpy(), delta.numpy())
    found = dense(minimal_rotation(shift, delta), d_out).numpy()
    assert np.linalg.norm(found - expected) < 1e-6


@PROPERTY
@given(shapes)
def test_no_other_orthogonal_matrix_that_does_it_is_closer_to_the_identity(
    shape: tuple[int, int, int, int],
) -> None:
    d_out, d_in, samples, seed = shape
    shift, delta = gaussian(d_out, samples, seed=seed), gaussian(d_out, d_in, seed=seed + 1)
    r = dense(minimal_rotation(shift, delta), d_out)
    source = subspace(delta, samples)
    k = source.shape[1]
    frame = torch.linalg.svd(source).U
    for trial in range(5):
        small = trial < 3
        inner, outer = gaussian(k, k, seed=seed + trial), gaussian(d_out - k, d_out - k, seed=trial)
        pieces = [
            torch.linalg.matrix_exp((m - m.T) * (0.05 if small else 2)) for m in (inner, outer)
        ]
        # Whatever happens within the source and within its complement first, r still does it.
        other = r @ frame @ torch.block_diag(*pieces) @ frame.T
        assert distance(r) <= distance(other) + 1e-10


@PROPERTY
@given(shapes)
def test_signs_and_bases_do_not_matter(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, samples, seed = shape
    samples = min(samples, d_out)
    shift, delta = gaussian(d_out, samples, seed=seed), gaussian(d_out, d_in, seed=seed + 1)
    expected = dense(minimal_rotation(shift, delta), d_out)
    mixed = -3.0 * shift @ (orthogonal(samples, seed) + 0.1 * torch.eye(samples))
    assert torch.allclose(dense(minimal_rotation(mixed, delta), d_out), expected, atol=1e-8)
    turned = -2.0 * delta @ orthogonal(d_in, seed)
    assert torch.allclose(dense(minimal_rotation(shift, turned), d_out), expected, atol=1e-8)


def test_it_turns_with_the_coordinates() -> None:
    """`R(QΔA, QΔW) = Q R(ΔA, ΔW) Qᵀ`: nothing prefers one axis to another."""
    shift, delta, q = gaussian(12, 3), gaussian(12, 20, seed=1), orthogonal(12, 2)
    expected = q @ dense(minimal_rotation(shift, delta), 12) @ q.T
    assert torch.allclose(dense(minimal_rotation(q @ shift, q @ delta), 12), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 50), (30, 9), (30, 30)])
def test_the_gram_matrix_gives_the_same(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shift, delta = gaussian(30, 5), gaussian(*shape, seed=1)
    expected = dense(minimal_rotation(shift, delta), 30)
    monkeypatch.setattr(svd, "SMALL", 0)
    monkeypatch.setattr(svd, "_BLOCK", 100)
    assert torch.allclose(dense(minimal_rotation(shift, delta), 30), expected, atol=1e-9)


@pytest.mark.parametrize("gram", [False, True])
def test_a_task_vector_of_low_rank(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many directions are turned as the task vector has; noise is none."""
    if gram:
        monkeypatch.setattr(svd, "SMALL", 0)
    delta = (gaussian(30, 2) @ gaussian(2, 20, seed=1)).float()
    rotation = minimal_rotation(gaussian(30, 6, seed=2), delta)
    assert rotation is not None
    assert rotation.rank == 6
    assert rotation.sources.shape == (30, 2)
    assert float((dense(rotation, 30).T @ dense(rotation, 30)).trace()) == pytest.approx(30.0)


def test_no_angle_is_the_identity() -> None:
    delta = gaussian(10, 4)
    rotation = minimal_rotation(delta @ gaussian(4, 4, seed=1), delta)
    assert distance(dense(rotation, 10)) < 1e-12


def test_a_tiny_angle_is_exact() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    angle = 1e-9
    shift = torch.cos(torch.tensor(angle)) * axes[:, :1] + np.sin(angle) * axes[:, 1:2]
    r = dense(minimal_rotation(shift, axes[:, :1].clone()), 6)
    assert float(r[1, 0]) == pytest.approx(angle, rel=1e-6)
    assert float(r[0, 1]) == pytest.approx(-angle, rel=1e-6)


def test_a_right_angle() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    r = dense(minimal_rotation(axes[:, 2:4], axes[:, :2].clone()), 6)
    assert float((r.T @ r - axes).norm()) < 1e-12
    assert float((r @ axes[:, :2])[2:4].norm()) == pytest.approx(np.sqrt(2))
    assert torch.allclose(r[4:, 4:], axes[4:, 4:])


def test_nothing_to_rotate() -> None:
    shift, delta = gaussian(8, 3), gaussian(8, 5, seed=1)
    assert minimal_rotation(torch.zeros(8, 3), delta) is None
    assert minimal_rotation(shift, torch.zeros(8, 5)) is None
    assert minimal_rotation(gaussian(8, 8), delta) is None
    assert minimal_rotation(gaussian(8, 20), delta) is None
    assert minimal_rotation(gaussian(1, 4), gaussian(1, 5)) is None


def test_a_rank_deficient_shift() -> None:
    column = gaussian(8, 1)
    rotation = minimal_rotation(column.repeat(1, 3), gaussian(8, 5, seed=1))
    assert rotation is not None
    assert (rotation.rank, rotation.full_rank) == (1, 3)
    assert rotation.is_rank_deficient


@pytest.mark.parametrize("shift", [torch.ones(3), torch.full((3, 2), torch.nan)])
def test_a_shift_that_is_none(shift: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="shift: got"):
        minimal_rotation(shift, torch.ones(3, 3))


def test_float32_in_and_out() -> None:
    shift, delta = gaussian(64, 8), gaussian(64, 90, seed=1).float()
    rotation = minimal_rotation(shift, delta)
    assert rotation is not None
    found = rotation.apply(delta)
    assert found.dtype == torch.float32
    expected = dense(rotation, 64) @ delta.double()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("variant", ["activation", "minimal", "none"])
def test_a_method_takes_the_variant(variant: str) -> None:
    base, candidate = gaussian(12, 9).float(), gaussian(12, 9, seed=1).float()
    shift = gaussian(12, 3, seed=2).float()
    asked = MethodSettings(rotation=RotationSettings(variant=variant), coefficient=1.0)  # type: ignore[arg-type]
    inputs = TensorInputs("w", base, [candidate], 1, shifts=[shift], is_linear=True)
    found = open_method(asked, 1).merge(inputs)
    delta = candidate - base
    chosen = {
        "activation": activation_rotation(shift),
        "minimal": minimal_rotation(shift, delta),
        "none": None,
    }[variant]
    expected = base + (delta if chosen is None else chosen.apply(delta))
    assert torch.allclose(found.tensor, expected, atol=1e-6)
    assert found.rotated == (chosen is not None)

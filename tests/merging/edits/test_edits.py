"""Low-rank edits against their formulas, written again in NumPy with a full SVD."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from arm_ray.merging import svd
from arm_ray.merging.edits import edit
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.operator_settings import AlphaRLSettings, PomeSettings, TimberSettings
from arm_ray.merging.rotation import activation_rotation
from arm_ray.merging.settings import MethodSettings
from tests.builders.reference import dense_rotation

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
EDITS = ("timber", "pome", "alpharl")
SHAPES = ((12, 12), (30, 7), (7, 30), (1, 9), (9, 1), (1, 1))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graded(rows: int, columns: int, seed: int = 0, decay: float = 0.6) -> torch.Tensor:
    """Singular values that fall by a factor each: no edit is near a tie."""
    u, _, vt = np.linalg.svd(gaussian(rows, columns, seed=seed).double().numpy(), False)
    return torch.from_numpy(u * decay ** np.arange(u.shape[1]) @ vt).float()


def chosen(kind: str, **options: Any) -> MethodSettings:
    section = {"timber": TimberSettings, "pome": PomeSettings, "alpharl": AlphaRLSettings}[kind]
    return MethodSettings(edit=kind, **{kind: section(**options)})  # type: ignore[arg-type]


def assert_close(found: torch.Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    expected = np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    assert float(np.linalg.norm(found.double().numpy() - expected)) / scale < tolerance


def timber_reference(delta: np.ndarray, gamma: float) -> np.ndarray:
    matrix = delta.reshape(delta.shape[0], -1)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    p = s / s.sum()
    k = int(np.ceil(np.exp(-(p * np.log(p + 1e-9)).sum())))
    return (u @ np.diag(np.where(np.arange(len(s)) < k, s, gamma * s)) @ vt).reshape(delta.shape)


def pome_reference(delta: np.ndarray, fraction: float, scale: str, beta: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    rank = (s > s[0] * max(delta.shape) * 2.0**-23).sum()
    k = max(1, int(fraction * rank))
    c = {
        "fro": np.linalg.norm(delta) / np.sqrt(k),
        "mean_sv": s[:k].mean(),
        "spec": s[0],
        "raw": 1.0,
    }[scale]
    return beta * c * u[:, :k] @ vt[:k]


def alpharl_reference(delta: np.ndarray, rank: int, alpha: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    s[rank:] = 0.0
    return alpha * np.linalg.norm(delta) / np.linalg.norm(s) * u @ np.diag(s) @ vt


@pytest.fixture(params=["direct", "gram"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices are decomposed themselves; large ones through a Gram matrix in blocks."""
    if request.param == "gram":
        monkeypatch.setattr(svd, "SMALL", 0)
        monkeypatch.setattr(svd, "_BLOCK", 50)
    return str(request.param)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [*SHAPES, (6, 2, 5)])
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.9])
def test_timber(shape: tuple[int, ...], gamma: float) -> None:
    delta = graded(shape[0], int(np.prod(shape[1:])), seed=3).reshape(shape)
    before = delta.clone()
    found = edit(delta, UP, True, chosen("timber", gamma=gamma))
    assert_close(found, timber_reference(delta.double().numpy(), gamma))
    assert torch.equal(delta, before)
    assert found.is_contiguous()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["fro", "mean_sv", "spec", "raw"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_pome(shape: tuple[int, int], scale: str, fraction: float) -> None:
    delta = graded(*shape, seed=4)
    asked = chosen("pome", rank_fraction=fraction, scale=scale, beta=1.5)
    found = edit(delta, UP, True, asked)
    assert_close(found, pome_reference(delta.double().numpy(), fraction, scale, 1.5))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_alpharl(shape: tuple[int, int], rank: int) -> None:
    delta = graded(*shape, seed=5)
    found = edit(delta, QUERY, True, chosen("alpharl", rank=rank, alpha=0.8))
    assert_close(found, alpharl_reference(delta.double().numpy(), rank, 0.8))


def test_timber_with_equal_singular_values_and_with_one() -> None:
    """The ε in the logarithm pulls the effective rank just below a whole number, not above."""
    equal = torch.linalg.qr(gaussian(9, 9)).Q
    assert torch.equal(edit(equal, UP, True, chosen("timber", gamma=0.0)), equal)
    one = torch.outer(gaussian(9), gaussian(6, seed=1))
    assert_close(edit(one, UP, True, chosen("timber", gamma=0.0)), one.double().numpy())


@pytest.mark.usefixtures("path")
def test_gamma_one_changes_no_bit() -> None:
    delta = gaussian(20, 12)
    assert torch.equal(edit(delta, UP, True, chosen("timber", gamma=1.0)), delta)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_zero_stays_zero(kind: str, shape: tuple[int, int]) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(edit(zero, UP, True, chosen(kind)), zero)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_pome_keeps_the_norm_and_makes_the_singular_values_equal(fraction: float) -> None:
    delta = gaussian(24, 16)
    found = edit(delta, UP, True, chosen("pome", rank_fraction=fraction))
    assert float(found.norm()) == pytest.approx(float(delta.norm()), rel=1e-6)
    sigma = torch.linalg.svdvals(found.double())
    k = int(16 * fraction)
    assert_close(sigma[:k].float(), np.full(k, float(delta.norm()) / np.sqrt(k)), 1e-5)
    assert float(sigma[k:].sum()) < 1e-5


def test_pome_counts_the_numerical_rank() -> None:
    """What rounding adds to a task vector of rank 8 is no direction of it."""
    low = (gaussian(60, 8).double() @ gaussian(8, 40, seed=1).double()).float()
    found = edit(low, UP, True, chosen("pome"))
    assert int(torch.linalg.matrix_rank(found.double(), rtol=1e-4)) == 4


@pytest.mark.usefixtures("path")
def test_alpharl_keeps_the_norm() -> None:
    delta = gaussian(24, 40)
    found = edit(delta, QUERY, True, chosen("alpharl"))
    assert float(found.norm()) == pytest.approx(float(delta.norm()), rel=1e-6)


@PROPERTY
@given(st.integers(2, 24), st.integers(1, 24), st.integers(1, 8), st.integers(0, 9999))
def test_rotating_before_an_edit_is_rotating_after_it(
    d_out: int, d_in: int, samples: int, seed: int
) -> None:
    delta = graded(d_out, d_in, seed=seed)
    shift = gaussian(d_out, samples, seed=seed + 1)
    q = dense_rotation(shift, "positive_diagonal", 1e-6)
    assert q is not None
    for kind in EDITS:
        found = edit(q @ delta.double(), UP, True, chosen(kind))
        expected = q @ edit(delta.double(), UP, True, chosen(kind))
        assert float((found - expected).norm() / expected.norm()) < 1e-8


def test_which_tensors_are_edited() -> None:
    linear = {UP: True, DOWN: True, QUERY: True, EMBEDDING: False, HEAD: False}
    matrix, row = graded(9, 6), gaussian(6)

    def edited(settings: MethodSettings) -> set[str]:
        for name in (NORM, BIAS):
            found = edit(row, name, False, settings)
            dropped = settings.edit == "alpharl" and settings.alpharl.others == "drop"
            assert torch.equal(found, torch.zeros_like(row) if dropped else row)
        return {
            name
            for name, is_linear in linear.items()
            if not torch.equal(edit(matrix, name, is_linear, settings), matrix)
        }

    assert edited(chosen("timber")) == set(linear)
    assert edited(chosen("pome")) == {UP}
    assert edited(chosen("pome", tensors="mlp")) == {UP, DOWN}
    assert edited(chosen("pome", tensors="all_linear")) == {UP, DOWN, QUERY}
    assert edited(chosen("alpharl", others="keep")) == {UP, DOWN, QUERY}
    for name in (EMBEDDING, HEAD):
        assert not edit(matrix, name, False, chosen("alpharl")).any()
    fused = "model.layers.0.mlp.gate_up_proj.weight"
    assert torch.equal(edit(matrix, fused, True, chosen("pome")), matrix)


def test_both_ways_to_decompose_agree_on_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = gaussian(900, 40) @ torch.diag(0.9 ** torch.arange(40.0))
    direct = [edit(delta, UP, True, chosen(kind)) for kind in EDITS]
    monkeypatch.setattr(svd, "SMALL", 0)
    for kind, expected in zip(EDITS, direct, strict=True):
        assert_close(edit(delta, UP, True, chosen(kind)), expected.double().numpy())


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_method_rotates_then_edits_then_merges(kind: str, rotate: bool) -> None:
    base = gaussian(10, 8)
    candidates = [base + 0.1 * graded(10, 8, seed=s) for s in (1, 2)]
    shifts = [gaussian(10, 3, seed=s) for s in (3, 4)]
    asked = chosen(kind)
    asked = MethodSettings(
        **{**vars(asked), "operator": "task_arithmetic", "rotate": rotate, "coefficient": 0.7}
    )
    inputs = TensorInputs(UP, base, candidates, 2, shifts=shifts if rotate else (), is_linear=True)
    method = open_method(asked, 2)
    found = method.merge(inputs)
    total = torch.zeros_like(base)
    for candidate, shift in zip(candidates, shifts, strict=True):
        vector = candidate - base
        if rotate:
            rotation = activation_rotation(shift)
            assert rotation is not None
            vector = rotation.apply(vector)
        total += edit(vector, UP, True, asked)
    assert_close(found.tensor, (base + 0.35 * total).double().numpy())
    assert found.rotated == (2 if rotate else 0)
    assert method.takes_rows(1, False)
    assert not method.takes_rows(2, False)

"""Rotations are orthogonal, have the right signs and columns, and never need a square matrix."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import astuple
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis.extra.numpy import arrays

from arm_ray.merging.method import open_method
from arm_ray.merging.operator import MergedTensor, TensorInputs
from arm_ray.merging.operator_settings import RotationSettings, SignRule
from arm_ray.merging.rotation import Rotation, activation_rotation
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.similarity import COMPARE_BLOCK, SimilaritySums, cosines, similarity_sums
from arm_ray.model.activations import output_shifts
from tests.builders.reference import dense_rotation

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
SIGNS: tuple[SignRule, ...] = ("positive_diagonal", "library")

signs = st.sampled_from(SIGNS)
sizes = st.integers(1, 24)
seeds = st.integers(0, 2**31)
# Small whole numbers: many equal columns, zero columns and equal singular values.
coarse_shifts = st.tuples(sizes, sizes).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-2, 2).map(float))
)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation_of(shift: torch.Tensor, sign: SignRule = "positive_diagonal") -> Rotation:
    rotation = activation_rotation(shift, sign=sign)
    assert rotation is not None
    return rotation


def dense(rotation: Rotation) -> torch.Tensor:
    return rotation.apply(torch.eye(len(rotation.signs), dtype=torch.float64))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = float((found - expected).norm() / max(float(expected.norm()), 1e-30))
    assert error < tolerance, error


@PROPERTY
@given(coarse_shifts, signs)
def test_it_is_orthogonal_for_every_shift(values: np.ndarray, sign: SignRule) -> None:
    shift = torch.from_numpy(values)
    rotation = activation_rotation(shift, sign=sign)
    if not values.any():
        assert rotation is None
        return
    assert rotation is not None
    u = dense(rotation)
    assert_close(u.T @ u, torch.eye(len(u), dtype=torch.float64), 1e-12)
    assert_close(rotation.diagonal(), u.diagonal(), 1e-11)


@PROPERTY
@given(coarse_shifts)
def test_the_diagonal_is_not_negative_unless_signs_are_the_library_s(values: np.ndarray) -> None:
    assume(values.any())
    assert float(dense(rotation_of(torch.from_numpy(values))).diagonal().min()) >= -1e-12


@PROPERTY
@given(coarse_shifts, signs)
def test_the_first_columns_span_the_shift(values: np.ndarray, sign: SignRule) -> None:
    assume(values.any())
    shift = torch.from_numpy(values)
    rotation = rotation_of(shift, sign)
    assert rotation.rank == int(torch.linalg.matrix_rank(shift))
    assert rotation.full_rank == min(shift.shape)
    assert rotation.is_rank_deficient == (rotation.rank < min(shift.shape))
    leading = dense(rotation)[:, : rotation.rank]
    assert_close(leading @ (leading.T @ shift), shift, 1e-11)
    # Not just any basis: the singular vectors diagonalise ΔA ΔAᵀ, largest first.
    gram = leading.T @ (shift @ shift.T) @ leading
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-9 * float(gram.max())
    assert bool((gram.diagonal().diff() <= 1e-9 * gram.max()).all())


@PROPERTY
@given(sizes, sizes, sizes, seeds, signs)
def test_it_keeps_the_norm_of_every_column(
    d_out: int, num_samples: int, d_in: int, seed: int, sign: SignRule
) -> None:
    rotation = rotation_of(gaussian(d_out, num_samples, seed=seed), sign)
    task_vector = gaussian(d_out, d_in, seed=seed + 1)
    rotated = rotation.apply(task_vector)
    assert rotated.dtype == torch.float64
    assert_close(rotated.norm(dim=0), task_vector.norm(dim=0), 1e-12)


@PROPERTY
@given(sizes, sizes, seeds, signs)
def test_the_compact_form_equals_the_dense_one(
    d_out: int, num_samples: int, seed: int, sign: SignRule
) -> None:
    shift = gaussian(d_out, num_samples, seed=seed)
    expected = dense_rotation(shift, sign, 1e-6)
    assert expected is not None
    assert_close(dense(rotation_of(shift, sign)), expected, 1e-9)


@PROPERTY
@given(st.integers(2, 24), st.integers(2, 24), st.data())
def test_the_compact_form_equals_the_dense_one_where_samples_depend_on_each_other(
    d_out: int, num_samples: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(d_out, num_samples) - 1))
    seed = data.draw(seeds)
    shift = gaussian(d_out, rank, seed=seed) @ gaussian(rank, num_samples, seed=seed + 1)
    sigma = torch.linalg.svdvals(shift)
    assume(float(sigma[rank - 1] / sigma[0]) > 1e-3)
    sign = data.draw(signs)
    expected = dense_rotation(shift, sign, 1e-6)
    assert expected is not None
    # A diagonal entry near zero would have an arbitrary sign.
    assume(float(expected.diagonal().abs().min()) > 1e-6)
    rotation = rotation_of(shift, sign)
    assert (rotation.rank, rotation.full_rank) == (rank, min(d_out, num_samples))
    assert_close(dense(rotation), expected, 1e-7)


@PROPERTY
@given(st.integers(1, 16), st.integers(0, 30), seeds)
def test_library_is_the_full_svd_of_lapack(num_samples: int, more: int, seed: int) -> None:
    d_out = max(math.ceil(11 * num_samples / 6), num_samples + 1) + more
    shift = gaussian(d_out, num_samples, seed=seed)
    expected = torch.linalg.svd(shift, full_matrices=True).U
    assert_close(dense(rotation_of(shift, "library")), expected, 1e-9)


def test_positive_diagonal_only_flips_columns_of_the_library_s() -> None:
    shift = gaussian(30, 8, seed=4)
    left, right = dense(rotation_of(shift)), dense(rotation_of(shift, "library"))
    ratio = (left * right).sum(0)
    assert_close(ratio.abs(), torch.ones(30, dtype=torch.float64), 1e-12)
    assert bool((ratio < 0).any())
    assert bool((ratio > 0).any())


@pytest.mark.parametrize(
    ("d_out", "num_samples"), [(12, 5), (12, 12), (5, 12), (12, 1), (1, 12), (1, 1), (2, 1)]
)
@pytest.mark.parametrize("sign", SIGNS)
def test_tall_square_wide_and_single(d_out: int, num_samples: int, sign: SignRule) -> None:
    shift = gaussian(d_out, num_samples, seed=d_out * 100 + num_samples)
    expected = dense_rotation(shift, sign, 1e-6)
    rotation = rotation_of(shift, sign)
    assert expected is not None
    assert (rotation.rank, rotation.is_rank_deficient) == (min(d_out, num_samples), False)
    assert_close(dense(rotation), expected, 1e-11)


def test_one_sample_is_one_reflection() -> None:
    shift = torch.tensor([[3.0], [0.0], [4.0]], dtype=torch.float64)
    rows = [[0.6, 0.0, -0.8], [0.0, 1.0, 0.0], [0.8, 0.0, 0.6]]
    expected = torch.tensor(rows, dtype=torch.float64)
    assert_close(dense(rotation_of(shift)), expected, 1e-14)


def test_one_output_is_not_turned() -> None:
    rotation = rotation_of(torch.tensor([[-2.0, 1.0, -5.0]]))
    assert torch.equal(dense(rotation), torch.ones(1, 1, dtype=torch.float64))


def repeated(shift: torch.Tensor) -> torch.Tensor:
    return torch.cat([shift, shift[:, :2]], dim=1)


def with_zeros(shift: torch.Tensor) -> torch.Tensor:
    return torch.cat([shift[:, :2], torch.zeros_like(shift[:, :3]), shift[:, 2:]], dim=1)


@pytest.mark.parametrize("degenerate", [repeated, with_zeros])
@pytest.mark.parametrize("d_out", [40, 8, 5])
def test_noise_below_the_tolerance_does_not_turn_anything(degenerate, d_out: int) -> None:
    shift = degenerate(gaussian(d_out, 4, seed=7))
    noise = 1e-10 * gaussian(*shift.shape, seed=8)
    clean, noisy = rotation_of(shift), rotation_of(shift + noise)
    assert clean.rank == noisy.rank == 4
    assert clean.is_rank_deficient == (d_out > 4)
    assert_close(dense(noisy), dense(clean), 1e-8)
    # With a tolerance below it, the same noise does turn (at 5 outputs no freedom is left).
    sharp = activation_rotation(shift + noise, rank_tolerance=0.0)
    assert sharp is not None
    assert sharp.rank > 4
    assert d_out == 5 or float((dense(sharp) - dense(clean)).norm()) > 0.1


def test_rounding_of_the_activations_does_not_turn_a_low_rank_change() -> None:
    # As after LoRA: a change of rank 4, and the same inputs below it (the first layer's q_proj).
    # Whole multiples of powers of two, so that the weights and their difference are exact.
    reference = (32 * gaussian(96, 64, seed=1)).round().float() / 256
    left, right = (3 * gaussian(96, 4, seed=2)).round(), (3 * gaussian(4, 64, seed=3)).round()
    contributor = reference + (left @ right).float() / 2**16
    assert int(torch.linalg.matrix_rank((contributor - reference).double())) == 4
    mean_input = 3 * gaussian(20, 64, seed=4, dtype=torch.float32)
    shifts = output_shifts([reference, contributor], [None, None], [mean_input, mean_input])
    inputs = TensorInputs("w", reference, [contributor], 1, shifts)
    assert merge(inputs).rank_deficient == [(4, 20)]


@pytest.mark.parametrize("d_out", [9, 3, 2])
def test_the_rank_tolerance_is_relative_to_the_largest(d_out: int) -> None:
    for scale in (1e-12, 1.0, 1e12):
        for small, rank in ((0.5e-3, 1), (2e-3, 2)):
            shift = torch.zeros(d_out, 2, dtype=torch.float64)
            shift[0, 0], shift[1, 1] = scale, small * scale
            rotation = activation_rotation(shift, rank_tolerance=1e-3)
            assert rotation is not None
            assert (rotation.rank, rotation.full_rank) == (rank, 2)


@PROPERTY
@given(sizes, sizes, seeds, st.sampled_from([1e-30, 1e-6, 1e6, 1e30]))
def test_the_scale_of_the_shift_does_not_matter(
    d_out: int, num_samples: int, seed: int, scale: float
) -> None:
    shift = gaussian(d_out, num_samples, seed=seed)
    base = rotation_of(shift)
    # A diagonal entry near zero would have an arbitrary sign.
    assume(float(base.diagonal().min()) > 1e-9)
    assert_close(dense(rotation_of(shift * scale)), dense(base), 1e-8)


@PROPERTY
@given(sizes, sizes, seeds)
def test_float32_and_float64_agree(d_out: int, num_samples: int, seed: int) -> None:
    shift = gaussian(d_out, num_samples, seed=seed, dtype=torch.float32)
    task_vector = gaussian(d_out, 7, seed=seed + 1, dtype=torch.float32)
    single, double = rotation_of(shift), rotation_of(shift.double())
    assert torch.equal(dense(single), dense(double))
    found = single.apply(task_vector)
    assert found.dtype == torch.float32
    assert_close(found.double(), double.apply(task_vector.double()), 2e-6)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_never_changed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    shift, task_vector = gaussian(*shape, dtype=dtype), gaussian(shape[0], 5, dtype=dtype)
    kept = shift.clone(), task_vector.clone()
    rotated = rotation_of(shift).apply(task_vector)
    assert torch.equal(shift, kept[0])
    assert torch.equal(task_vector, kept[1])
    assert rotated.data_ptr() != task_vector.data_ptr()


def test_layout_in_memory_does_not_matter() -> None:
    shift, task_vector = gaussian(6, 20).T, gaussian(9, 20).T
    expected = rotation_of(shift.contiguous()).apply(task_vector.contiguous())
    assert_close(rotation_of(shift).apply(task_vector), expected, 1e-14)


def test_no_square_matrix_is_formed() -> None:
    d_out = 50_000  # a square matrix of it would take 20 GB
    shift, task_vector = gaussian(d_out, 4), gaussian(d_out, 3, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    rotation = rotation_of(shift)
    rotated = rotation.apply(task_vector)
    assert time.monotonic() - started < 5.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert_close(rotated.norm(dim=0), task_vector.norm(dim=0), 1e-5)
    assert float(rotation.diagonal().mean()) > 0.999


def test_a_zero_shift_gives_no_rotation() -> None:
    assert activation_rotation(torch.zeros(6, 3)) is None
    assert activation_rotation(torch.zeros(3, 6)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_numbers_that_are_not_finite_are_refused(bad: float, shape: tuple[int, int]) -> None:
    shift = gaussian(*shape)
    shift[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        activation_rotation(shift)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[4\], expected \[d_out, N\]"):
        activation_rotation(torch.ones(4))


def inputs_of(
    reference: torch.Tensor,
    contributors: list[torch.Tensor],
    activations: list[torch.Tensor] | None = None,
    divisor: int = 2,
) -> TensorInputs:
    first, *others = (a.double() for a in activations or [reference])
    shifts = [other - first for other in others]
    return TensorInputs("w", reference, contributors, divisor, shifts)


def merge(
    inputs: TensorInputs,
    coefficient: float = 0.7,
    sign: SignRule = "positive_diagonal",
    operator: str = "arm",
) -> MergedTensor:
    settings = MethodSettings(operator, coefficient, rotation=RotationSettings(sign=sign))
    return open_method(settings, len(inputs.contributors)).merge(inputs)


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), seeds, signs)
def test_arm_is_equations_3_to_5(
    d_out: int, num_samples: int, count: int, seed: int, sign: SignRule
) -> None:
    weights = [gaussian(d_out, 7, seed=seed + i, dtype=torch.float32) for i in range(count + 1)]
    activations = [
        gaussian(d_out, num_samples, seed=seed + 9 + i, dtype=torch.float32)
        for i in range(count + 1)
    ]
    found = merge(inputs_of(weights[0], weights[1:], activations, divisor=count + 1), 0.3, sign)
    total = torch.zeros(d_out, 7, dtype=torch.float64)
    for weight, activation in zip(weights[1:], activations[1:], strict=True):
        u = dense_rotation(activation.double() - activations[0].double(), sign, 1e-6)
        assert u is not None
        total += u @ (weight - weights[0]).double()
    expected = weights[0].double() + 0.3 / (count + 1) * total
    assert found.tensor.dtype == torch.float32
    assert found.rotated == count
    assert_close(found.tensor.double(), expected, 2e-6)


def test_arm_says_which_shifts_were_rank_deficient() -> None:
    weights = [gaussian(9, 4, seed=i, dtype=torch.float32) for i in range(3)]
    reference = gaussian(9, 5, seed=3, dtype=torch.float32)
    shift = gaussian(9, 2, seed=4, dtype=torch.float32)
    deficient = reference.double() + (shift @ torch.ones(2, 5)).double()
    full = gaussian(9, 5, seed=5, dtype=torch.float32)
    found = merge(inputs_of(weights[0], weights[1:], [reference, deficient, full]))
    assert (found.rotated, found.rank_deficient) == (2, [(1, 5)])


def test_a_candidate_that_acts_as_the_reference_is_added_without_rotation() -> None:
    weights = [gaussian(6, 4, seed=i, dtype=torch.float32) for i in range(3)]
    activation = gaussian(6, 3, seed=5, dtype=torch.float32)
    inputs = inputs_of(weights[0], weights[1:], [activation] * 3)
    found = merge(inputs)
    assert (found.rotated, found.rank_deficient) == (0, [])
    assert torch.equal(found.tensor, merge(inputs, operator="task_arithmetic").tensor)


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
@pytest.mark.parametrize("same_activations", [True, False])
def test_identical_checkpoints_give_the_reference_to_the_bit(operator, same_activations) -> None:
    reference = gaussian(6, 4, dtype=torch.float32)
    activations = [gaussian(6, 3, seed=0 if same_activations else i) for i in range(3)]
    inputs = inputs_of(reference, [reference.clone(), reference.clone()], activations)
    result = merge(inputs, operator=operator)
    assert torch.equal(result.tensor, reference)
    assert result.tensor.data_ptr() != reference.data_ptr()


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)])
def test_without_activations_arm_is_task_arithmetic(shape: tuple[int, ...]) -> None:
    weights = [gaussian(*shape, seed=i, dtype=torch.float32) for i in range(3)]
    inputs = inputs_of(weights[0], weights[1:])
    found = merge(inputs, 0.5)
    mean = sum(w.double() - weights[0].double() for w in weights[1:]) / 2
    assert_close(found.tensor.double(), weights[0].double() + 0.5 * mean, 1e-6)
    assert torch.equal(found.tensor, merge(inputs, 0.5, operator="task_arithmetic").tensor)


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_operators_leave_their_inputs_alone(operator) -> None:
    tensors = [gaussian(6, 4, seed=i, dtype=torch.float32) for i in range(6)]
    kept = [t.clone() for t in tensors]
    merge(inputs_of(tensors[0], tensors[1:3], tensors[3:]), operator=operator)
    assert all(map(torch.equal, tensors, kept))


def test_a_missing_activation_is_not_overlooked() -> None:
    tensors = [gaussian(6, 4, seed=i, dtype=torch.float32) for i in range(5)]
    with pytest.raises(ValueError, match="shifts: got 1 for 2"):
        merge(inputs_of(tensors[0], tensors[1:3], tensors[3:]))


def sums(values: tuple[float, ...]) -> SimilaritySums:
    return SimilaritySums(*values)


# Sums of squares of several tensors; of magnitudes at which addition is not associative.
several_sums = st.lists(st.tuples(*[st.floats(1e-12, 1e12)] * 5).map(sums), min_size=1, max_size=12)


@PROPERTY
@given(several_sums, st.randoms(use_true_random=False))
def test_cosines_do_not_depend_on_how_tensors_are_spread(parts, random) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert cosines(shuffled) == cosines(iter(parts))


@PROPERTY
@given(several_sums)
def test_cosines_lie_between_minus_one_and_one(parts) -> None:
    for value in cosines(parts):
        assert value is not None
        assert -1.0 <= value <= 1.0


def test_sums_over_tensors_are_exact() -> None:
    # cos = (|W|² + |P|² − |W − P|²) / (2 |W| |P|), with a small tensor beside large ones.
    parts = [sums((v, v, v, v, v)) for v in (1e16, 1.0, 1.0)]
    total = float(Fraction(10**16) + 2)
    assert total != 1e16 + 1.0 + 1.0
    only = cosines([sums((total,) * 5)])
    assert cosines(parts) == only == (0.5, 0.5)
    small = [sums((1.0, 1.0, c, 1.0, 1.0)) for c in (1e16, 1.0, -1e16)]
    assert cosines(small) == cosines([sums((3.0, 3.0, 1.0, 3.0, 3.0))])


def test_the_cosine_of_a_zero_side_is_none() -> None:
    assert cosines([]) == (None, None)
    zero, moved = torch.zeros(4), torch.ones(4)
    assert cosines([similarity_sums(moved, zero, zero)]) == (None, None)
    assert cosines([similarity_sums(zero, moved, moved)]) == (None, None)
    # The first iteration starts from the base: its state before has no task vector.
    weight, task_vector = cosines([similarity_sums(2 * moved, moved, moved)])
    assert (weight, task_vector) == (1.0, None)


@pytest.mark.parametrize("count", [1, 7, *(COMPARE_BLOCK + n for n in (-1, 0, 1)), 3 << 17])
@pytest.mark.parametrize("from_base", [True, False])
def test_similarity_sums_are_squared_norms(count: int, from_base: bool) -> None:
    new, previous, base = (gaussian(count, seed=i, dtype=torch.float32) for i in range(3))
    base = previous if from_base else base
    w, p, b = (t.double() for t in (new, previous, base))
    expected = [float(x @ x) for x in (w, p, w - p, w - b, p - b)]
    found = similarity_sums(new, previous, base)
    assert astuple(found) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5, 7)])
def test_similarity_sums_of_every_shape(shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    count = float(ones.numel())
    found = similarity_sums(3 * ones, 2 * ones, ones)
    assert astuple(found) == (9 * count, 4 * count, count, 4 * count, count)
    assert found.is_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_similarity_sums_see_numbers_that_are_not_finite(bad: float) -> None:
    new = torch.ones(1 << 17)
    new[-1] = bad
    assert not similarity_sums(new, torch.ones(1 << 17), torch.zeros(1 << 17)).is_finite


def angle(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(left @ right / left.norm() / right.norm())


@PROPERTY
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), seeds, st.floats(-1.0, 1.0))
def test_cosines_are_those_of_all_tensors_together(counts, seed: int, alike: float) -> None:
    parts, whole = [], []
    for i, count in enumerate(counts):
        base, first, noise = (
            gaussian(count, seed=seed + 10 * i + j, dtype=torch.float32) for j in range(3)
        )
        new, previous = base + 0.1 * first, base + 0.1 * (alike * first + 0.5 * noise)
        parts.append(similarity_sums(new, previous, base))
        whole.append(torch.stack([new, previous, base]).double())
    w, p, b = torch.cat(whole, dim=1)
    weight, task_vector = cosines(parts)
    assert weight == pytest.approx(angle(w, p), abs=1e-6)
    assert task_vector == pytest.approx(angle(w - b, p - b), abs=1e-6)


def test_a_small_angle_keeps_its_digits() -> None:
    base = gaussian(4000, seed=1, dtype=torch.float32)
    step = gaussian(4000, seed=2, dtype=torch.float32)
    previous = base + step
    new = previous + 1e-4 * gaussian(4000, seed=3, dtype=torch.float32)
    w, p, b = (t.double() for t in (new, previous, base))
    for found, x, y in zip(
        cosines([similarity_sums(new, previous, base)]), (w, w - b), (p, p - b), strict=True
    ):
        exact = 1.0 - angle(x, y)
        assert 1e-10 < exact < 1e-7
        assert found is not None
        assert 1.0 - found == pytest.approx(exact, rel=1e-3)

"""SLERP and means on the sphere against their formulas in NumPy."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.errors import ConfigError
from arm_ray.merging.method import takes_models
from arm_ray.merging.operator_settings import SlerpSettings, SphericalMeanSettings
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
from tests.builders.tensors import coarse, gaussian

spaces = st.sampled_from(["weights", "task_vectors"])


def models_of(inputs, of: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """What is added at the end, and the models, flat."""
    reference, vectors = exact(inputs)
    if inputs.includes_reference:
        vectors = [np.zeros_like(reference), *vectors]
    if of == "task_vectors":
        return reference, [v.reshape(-1) for v in vectors]
    return np.zeros_like(reference), [(reference + v).reshape(-1) for v in vectors]


def expected_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if min(lengths) <= 1e-8:
        return (1 - t) * a + t * b
    c = float(a @ b / (lengths[0] * lengths[1]))
    if abs(c) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(c)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def expected_mean(models: list[np.ndarray], settings: SphericalMeanSettings) -> np.ndarray:
    """Vector by vector, in the space itself."""
    w = np.array(settings.weights or [1.0] * len(models))
    w = w / w.sum()
    lengths = np.array([np.linalg.norm(m) for m in models])
    straight = np.einsum("i,ij->j", w, np.stack(models))
    if lengths.min() <= 1e-8:
        return straight
    units = [m / n for m, n in zip(models, lengths, strict=True)]
    center = np.einsum("i,ij->j", w, np.stack(units))
    if np.linalg.norm(center) <= 1e-8:
        return straight
    center = center / np.linalg.norm(center)
    for _ in range(settings.max_steps if settings.kind == "karcher" else 1):
        step = np.zeros_like(center)
        for weight, u in zip(w, units, strict=True):
            c = np.clip(u @ center, -1, 1)
            tangent = u - c * center
            sine = np.linalg.norm(tangent)
            if settings.kind == "karcher" and sine > 1e-8:
                tangent *= np.arctan2(sine, c) / sine
            step += weight * tangent
        length = np.linalg.norm(step)
        if length > 1e-8:
            center = np.cos(length) * center + np.sin(length) * step / length
        if length < settings.step_tolerance:
            break
    return float(w @ lengths) * center


@PROPERTY
@given(shapes, st.floats(0.0, 1.0), spaces, seeds, st.booleans(), st.sampled_from([0.01, 1.0]))
def test_slerp(shape, t, of, seed, window, scale) -> None:
    vectors = [scale * gaussian(*shape, seed=seed + i) for i in range(1 if window else 2)]
    inputs = inputs_of(gaussian(*shape, seed=seed + 7), vectors, includes_reference=window)
    found = merge(method_of("slerp", slerp=SlerpSettings(t, of)), inputs)
    offset, (a, b) = models_of(inputs, of)
    assert_near(found, offset + expected_slerp(a, b, t).reshape(shape))


@PROPERTY
@given(shapes, seeds, spaces)
def test_zero_and_parallel_models_are_merged_on_a_line(shape, seed, of) -> None:
    vectors = [coarse(*shape, seed=seed), coarse(*shape, seed=seed + 1)]
    for pair in (vectors, [vectors[0]] * 2, [vectors[0], -vectors[0]], [vectors[0] * 0] * 2):
        inputs = inputs_of(torch.zeros(shape), pair)
        found = merge(method_of("slerp", slerp=SlerpSettings(0.25, of)), inputs)
        offset, (a, b) = models_of(inputs, of)
        assert_near(found, offset + expected_slerp(a, b, 0.25).reshape(shape))


def test_the_ends_are_the_models() -> None:
    reference, vectors = gaussian(30, 20), [gaussian(30, 20, seed=i) for i in (1, 2)]
    inputs = inputs_of(reference, vectors)
    for t, model in enumerate(inputs.contributors):
        found = merge(method_of("slerp", slerp=SlerpSettings(float(t))), inputs)
        assert_near(found, model.double().numpy())
    window = inputs_of(reference, vectors[:1], includes_reference=True)
    assert_near(merge(method_of("slerp", slerp=SlerpSettings(0.0)), window), reference.numpy())


def test_units_stay_units() -> None:
    units = [torch.nn.functional.normalize(gaussian(50, seed=i), dim=0) for i in (1, 2)]
    found = merge(method_of("slerp", slerp=SlerpSettings(0.3)), inputs_of(torch.zeros(50), units))
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)
    cosine = float(units[0] @ units[1])
    assert math.acos(float(found @ units[0])) == pytest.approx(0.3 * math.acos(cosine), abs=1e-3)


def test_the_line_begins_at_a_cosine_of_09995() -> None:
    for cosine, straight in ((0.9994, False), (0.9996, True), (-0.9996, True), (-0.9994, False)):
        a = torch.tensor([1.0, 0.0])
        b = torch.tensor([cosine, math.sqrt(1.0 - cosine**2)])
        found = merge(method_of("slerp"), inputs_of(torch.zeros(2), [a, b]))
        assert (float((found - (a + b) / 2).abs().max()) < 1e-7) == straight


def test_checkpoints_of_one_run_are_averaged_to_the_last_bit_of_their_differences() -> None:
    reference = gaussian(200, 200)
    vectors = [1e-4 * gaussian(200, 200, seed=i) for i in (1, 2)]
    inputs = inputs_of(reference, vectors)
    vectors = [c - reference for c in inputs.contributors]
    mean = vectors[0] * 0.5 + vectors[1] * 0.5
    assert torch.equal(merge(method_of("slerp"), inputs), mean + reference)


def test_an_uneven_mean_of_checkpoints_of_one_run_is_rounded_once() -> None:
    reference = gaussian(200, 200)
    inputs = inputs_of(reference, [1e-4 * gaussian(200, 200, seed=i) for i in (1, 2)])
    found = merge(method_of("slerp", slerp=SlerpSettings(0.3)), inputs)
    a, b = (c.double() for c in inputs.contributors)
    half_a_unit = 2.0**-24 * (a.abs() + 1e-3)
    assert bool(((found.double() - (0.7 * a + 0.3 * b)).abs() <= half_a_unit).all())


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("operator", ["slerp", "spherical_mean"])
def test_models_and_their_task_vectors_give_the_same(operator: str, window: bool) -> None:
    """A factor of nearly 1 has the operator take task vectors."""
    vectors = [0.3 * gaussian(300, 400, seed=i) for i in range(1 if window else 2)]
    inputs = inputs_of(gaussian(300, 400, seed=9), vectors, includes_reference=window)
    mean = {"spherical_mean": SphericalMeanSettings(of="weights")}
    method = method_of(operator, **(mean if operator == "spherical_mean" else {}))
    assert takes_models(method, ("w", 0.0))
    by_vectors = replace(inputs, factors=[math.nextafter(1.0, 2.0)] * len(vectors))
    assert_near(merge(method, inputs), merge(method, by_vectors).double().numpy())
    found = method.measure(0, inputs)["products"]
    torch.testing.assert_close(found, method.measure(0, by_vectors)["products"], rtol=1e-5, atol=0)


def test_a_step_has_the_bits_that_merge_gives() -> None:
    inputs = inputs_of(gaussian(30, 40), [gaussian(30, 40, seed=i) for i in (1, 2)])
    method = method_of("slerp")
    steps = [replace(inputs, factors=[f, f]) for f in (0.5, 1.0, 2.0)]
    for step, found in zip(steps, method.merge_steps(steps), strict=True):
        assert torch.equal(found, method.merge(step).tensor)
    assert torch.equal(method.merge(steps[1]).tensor, method.merge(inputs).tensor)


def test_what_changes_task_vectors_has_them_merged() -> None:
    assert not takes_models(
        method_of("slerp", slerp=SlerpSettings(0.5, "task_vectors")), ("w", 0.0)
    )
    rows = SlerpSettings(0.5, over="rows")
    assert not takes_models(method_of("slerp", slerp=rows), ("w", 0.0))
    assert not takes_models(method_of("slerp", edit="pome"), ("w", 0.0))
    assert not takes_models(method_of("task_arithmetic"), ("w", 0.0))


def test_large_tensors_are_summed_in_blocks() -> None:
    vectors = [gaussian(700, 900, seed=i) for i in (1, 2)]
    inputs = inputs_of(gaussian(700, 900), vectors)
    offset, (a, b) = models_of(inputs, "weights")
    assert_near(
        merge(method_of("slerp"), inputs), offset + expected_slerp(a, b, 0.5).reshape(700, 900)
    )


@PROPERTY
@given(
    shapes,
    st.integers(2, 4),
    st.sampled_from(["karcher", "projection"]),
    spaces,
    seeds,
    st.booleans(),
    st.booleans(),
)
def test_spherical_mean(shape, count, kind, of, seed, weighted, window) -> None:
    vectors = [gaussian(*shape, seed=seed + i) for i in range(count - window)]
    inputs = inputs_of(3.0 * gaussian(*shape, seed=seed + 7), vectors, includes_reference=window)
    weights = tuple(1.0 + i for i in range(count)) if weighted else None
    settings = SphericalMeanSettings(kind, of, weights)
    found = merge(method_of("spherical_mean", count, spherical_mean=settings), inputs)
    offset, models = models_of(inputs, of)
    assert_near(found, offset + expected_mean(models, settings).reshape(shape), 3e-6)


@pytest.mark.parametrize("kind", ["karcher", "projection"])
@pytest.mark.parametrize("of", ["weights", "task_vectors"])
def test_degenerate_means(kind, of) -> None:
    settings = SphericalMeanSettings(kind, of)
    method = method_of("spherical_mean", spherical_mean=settings)
    one = gaussian(4, 5, seed=1)
    for vectors in ([one, one], [one, -one], [one, 0 * one], [0 * one, 0 * one], [one, 2 * one]):
        inputs = inputs_of(torch.zeros(4, 5), vectors)
        offset, models = models_of(inputs, of)
        assert_near(merge(method, inputs), offset + expected_mean(models, settings).reshape(4, 5))
    same = gaussian(4, 5, seed=2)
    assert torch.equal(merge(method, inputs_of(same, [0 * one, 0 * one])), same)


def test_the_mean_of_two_is_slerp_at_one_half() -> None:
    units = [torch.nn.functional.normalize(gaussian(50, seed=i), dim=0) for i in (1, 2)]
    inputs = inputs_of(torch.zeros(50), units)
    assert_near(
        merge(method_of("spherical_mean"), inputs), merge(method_of("slerp"), inputs).numpy()
    )


def test_the_karcher_mean_has_no_mean_tangent_left() -> None:
    vectors = [gaussian(30, seed=i) for i in range(3)]
    inputs = inputs_of(torch.zeros(30), vectors)
    found = merge(method_of("spherical_mean", 3), inputs).double()
    center, total = found / found.norm(), torch.zeros(30, dtype=torch.float64)
    for vector in vectors:
        unit = vector.double() / vector.double().norm()
        tangent = unit - (unit @ center) * center
        total += torch.acos(unit @ center) * tangent / tangent.norm()
    assert float(total.norm() / 3) < 1e-5
    lengths = sum(float(v.double().norm()) for v in vectors) / 3
    assert float(found.norm()) == pytest.approx(lengths, rel=1e-6)


def test_they_need_whole_tensors() -> None:
    assert not method_of("slerp").takes_rows(2, False)
    assert not method_of("spherical_mean").takes_rows(1, False)


def test_slerp_merges_two() -> None:
    with pytest.raises(ConfigError, match="merges exactly 2 models, got 3"):
        method_of("slerp", 3)
    with pytest.raises(ConfigError, match="merges at least 2 models, got 1"):
        method_of("spherical_mean", 1)


def test_a_wrong_number_of_weights_is_refused() -> None:
    settings = SphericalMeanSettings(weights=(1.0, 2.0, 3.0))
    text = "method.spherical_mean.weights: got 3 weights, expected one for each of 2 models"
    with pytest.raises(ConfigError, match=re.escape(text)):
        method_of("spherical_mean", 2, spherical_mean=settings)
    method = method_of("spherical_mean", 3, spherical_mean=settings)
    inputs = inputs_of(gaussian(3), [gaussian(3, seed=1), gaussian(3, seed=2)])
    with pytest.raises(ValueError, match="got 3, expected one for each of 2 models"):
        merge(method, inputs)
    merge(method, replace(inputs, includes_reference=True))

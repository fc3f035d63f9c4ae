"""OTA against its formula: weights from second moments, and the most salient entries."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from arm_ray.errors import ConfigError
from arm_ray.merging.operator_settings import OtaSettings
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


def method(count: int = 2, **chosen: Any) -> Any:
    directories = tuple(f"moments{i}" for i in range(count))
    return method_of("ota", count, ota=OtaSettings(directories, **chosen))


def expected_updates(
    changes: list[np.ndarray], moments: list[np.ndarray], settings: OtaSettings
) -> np.ndarray:
    above, below = np.zeros_like(changes[0]), np.zeros_like(changes[0])
    for change, v in zip(changes, moments, strict=True):
        weight = v**settings.power + settings.epsilon
        saliency = v * change**2
        k = saliency.size - int(saliency.size * settings.density)
        if k > 0:
            weight = weight * (saliency >= np.sort(saliency)[k - 1])
        above += weight * change
        below += weight
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@PROPERTY
@given(
    st.integers(1, 3),
    st.sampled_from([0.05, 0.4, 1.0]),
    st.sampled_from([0.5, 1.0, 0.37]),
    seeds,
    st.lists(st.integers(0, 99), max_size=3),
)
def test_a_model(count, density, power, seed, cuts) -> None:
    model = [
        inputs_of(
            torch.zeros(shape),
            [gaussian(*shape, seed=seed + 20 * n + i) for i in range(count)],
            second_moments=[
                1e-12 * gaussian(*shape, seed=seed + i + 10) ** 2 for i in range(count)
            ],
            name=f"t{n}",
        )
        for n, shape in enumerate([(6, 5), (), (9,)])
    ]
    chosen = method(count, density=density, power=power)
    assert chosen.rounds(count) == (2 if density < 1.0 else 0)
    found = torch.cat([t.reshape(-1) for t in merge_model(chosen, model)])
    changes = [np.concatenate([exact(t)[1][i].reshape(-1) for t in model]) for i in range(count)]
    moments = [
        np.concatenate([t.second_moments[i].double().numpy().reshape(-1) for t in model])
        for i in range(count)
    ]
    assert_near(found, expected_updates(changes, moments, chosen.settings.ota))
    split = [p for t in model for p in (pieces(t, cuts) if t.reference.ndim else [t])]
    assert torch.equal(torch.cat([t.reshape(-1) for t in merge_model(chosen, split)]), found)


@PROPERTY
@given(shapes, st.sampled_from([0.3, 1.0]), seeds)
def test_equal_moments_give_the_mean(shape, density, seed) -> None:
    moments = coarse(*shape, seed=seed) ** 2
    vectors = [gaussian(*shape, seed=seed + 1)] * 2
    inputs = inputs_of(torch.zeros(shape), vectors, second_moments=[moments] * 2)
    found = merge(method(density=density), inputs)
    assert_near(found, np.where(found == 0.0, 0.0, vectors[0].numpy()))
    vectors = [gaussian(*shape, seed=seed + i) for i in (1, 2)]
    inputs = inputs_of(torch.zeros(shape), vectors, second_moments=[moments] * 2)
    assert_near(merge(method(), inputs), sum(v.double().numpy() for v in vectors) / 2)


def test_entries_without_history_take_the_plain_mean_however_small() -> None:
    vectors = [1e-9 * gaussian(50, seed=i) for i in (1, 2)]
    zeros = [torch.zeros(50)] * 2
    found = merge(method(), inputs_of(torch.zeros(50), vectors, second_moments=zeros))
    assert_near(1e9 * found, 1e9 * sum(v.double().numpy() for v in vectors) / 2)


def test_what_all_mask_stays_as_it_was() -> None:
    reference = gaussian(100)
    change = torch.ones(100)
    change[:10] = 100.0
    inputs = inputs_of(reference, [change] * 2, second_moments=[torch.ones(100)] * 2)
    found = merge(method(density=0.05), inputs)
    assert torch.equal(found[10:], reference[10:])
    assert_near(found[:10], inputs.contributors[0][:10].numpy())


def test_saliency_does_not_underflow() -> None:
    changes = torch.arange(1.0, 101.0) * 1e-9
    moments = torch.full((100,), 1e-30)
    inputs = inputs_of(torch.zeros(100), [changes], second_moments=[moments])
    assert int((merge(method(1, density=0.2), inputs) != 0).sum()) == 21


@PROPERTY
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.5, 0.37]),
    seeds,
    st.lists(st.integers(0, 99), max_size=4),
)
def test_rows_give_the_bits_of_the_whole(rows, width, power, seed, cuts) -> None:
    vectors = [gaussian(rows, width, seed=seed + i) for i in range(2)]
    moments = [gaussian(rows, width, seed=seed + i + 5) ** 2 for i in range(2)]
    inputs = inputs_of(gaussian(rows, width), vectors, second_moments=moments)
    assert_rows_give_the_whole(method(power=power), inputs, cuts)


@pytest.mark.parametrize("found", [None, ("one",)])
def test_a_wrong_number_of_directories_is_refused(found) -> None:
    got = "null" if found is None else "1 directories"
    text = f"method.ota.second_moments: got {got}, expected one for each of 2 candidates"
    with pytest.raises(ConfigError, match=re.escape(text)):
        method_of("ota", 2, ota=OtaSettings(found))


def test_missing_moments_are_not_overlooked() -> None:
    assert method().operator.second_moments
    with pytest.raises(ValueError, match="second_moments: got 0, expected 2"):
        merge(method(), inputs_of(gaussian(3), [gaussian(3)] * 2))

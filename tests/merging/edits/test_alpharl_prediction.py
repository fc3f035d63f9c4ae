"""AlphaRL's prediction against the formula in NumPy, and on data that it must extend exactly."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from arm_ray.errors import ConfigError
from arm_ray.merging.alpharl_prediction import OPERATOR, predict
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.operator_settings import AlphaRLPredictionSettings
from arm_ray.merging.settings import MethodSettings

NAME = "model.layers.0.self_attn.q_proj.weight"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(**options: Any) -> MethodSettings:
    return MethodSettings(
        operator="alpharl_prediction", alpharl_prediction=AlphaRLPredictionSettings(**options)
    )


def merged(
    base: torch.Tensor, states: list[torch.Tensor], is_linear: bool = True, **options: Any
) -> torch.Tensor:
    inputs = TensorInputs(NAME, base, states, len(states), is_linear=is_linear)
    before = [base.clone(), *(s.clone() for s in states)]
    found = open_method(chosen(**options), len(states)).merge(inputs).tensor
    assert all(torch.equal(x, y) for x, y in zip(before, [base, *states], strict=True))
    return found


def reference(base: np.ndarray, states: list[np.ndarray], y: np.ndarray, target: float) -> Any:
    """a* v_Sᵀ, with the loops written out."""
    rows: list[np.ndarray] = []
    for state in states:
        u, s, vt = np.linalg.svd(state - base, full_matrices=False)
        rows.append(s[0] * u[:, 0])
        right = vt[0]
    for i in range(len(rows) - 2, -1, -1):
        if rows[i] @ rows[i + 1] < 0:
            rows[i] = -rows[i]
    x = np.array(rows)
    mean, deviation = x.mean(0), x.std(0, ddof=1)
    scaled = (x - mean) / deviation
    w = scaled.T @ (y - y.mean())
    w /= np.linalg.norm(w)
    z = scaled @ w
    p = scaled.T @ z / (z @ z)
    slope, intercept = np.polyfit(z, y, 1)
    return np.outer((target - intercept) / slope * p * deviation + mean, right)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("onto", ["last", "base"])
def test_the_formula(shape: tuple[int, int], onto: str) -> None:
    base = gaussian(*shape)
    direction = torch.outer(gaussian(shape[0], seed=1), gaussian(shape[1], seed=2))
    states = [base + s * direction + 0.3 * gaussian(*shape, seed=s + 2) for s in (1, 2, 3, 4)]
    accuracies = (0.1, 0.3, 0.25, 0.5)
    found = merged(base, states, accuracies=accuracies, target=0.7, onto=onto)
    wide = [s.double().numpy() for s in states]
    update = reference(base.double().numpy(), wide, np.array(accuracies), 0.7)
    expected = (states[-1] if onto == "last" else base).double().numpy() + update
    error = np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-6


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_rank_one_updates_that_are_linear_in_accuracy_are_extended_exactly(
    shape: tuple[int, int],
) -> None:
    d, e, v = (
        gaussian(n, seed=s).double() for n, s in ((shape[0], 1), (shape[0], 2), (shape[1], 3))
    )
    v /= v.norm()
    d[0] = 0.0  # an entry that does not change with accuracy
    accuracies = (0.2, 0.5, 0.4, 0.9)
    base = torch.zeros(shape)
    states = [torch.outer(y * d + e, v).float() for y in accuracies]
    found = merged(base, states, accuracies=accuracies, target=1.7, onto="base")
    expected = torch.outer(1.7 * d + e, v)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_the_prediction_of_rows_alone() -> None:
    d, e = gaussian(30, seed=1).double(), gaussian(30, seed=2).double()
    d[3] = 0.0
    y = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    found = predict(y[:, None] * d + e, y, 10.0)
    assert torch.allclose(found, 10.0 * d + e, atol=1e-12)


def test_an_observed_accuracy_gives_its_row() -> None:
    rows = gaussian(2, 30).double()
    y = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert torch.allclose(predict(rows, y, 4.0), rows[1], atol=1e-12)


def test_rows_without_any_relation_to_accuracy_give_their_mean() -> None:
    rows = torch.ones(3, 4, dtype=torch.float64)
    y = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    assert torch.equal(predict(rows, y, 5.0), rows[0])


def test_signs_do_not_matter() -> None:
    """Mirrored checkpoints have mirrored singular vectors; the chain undoes it."""
    base, direction = torch.zeros(8, 6), torch.outer(gaussian(8), gaussian(6, seed=1))
    states = [s * direction for s in (1.0, 2.0, 3.0)]
    options: dict[str, Any] = {"accuracies": (1.0, 2.0, 3.0), "target": 4.0, "onto": "base"}
    expected = merged(base, states, **options)
    assert torch.allclose(expected, 4.0 * direction, atol=1e-5)
    mirrored = [states[0], -states[1], states[2]]
    assert torch.allclose(merged(base, mirrored, **options), expected, atol=1e-5)


def test_a_checkpoint_without_any_change() -> None:
    base, direction = gaussian(8, 6), torch.outer(gaussian(8), gaussian(6, seed=1))
    states = [base + 2.0 * direction, base.clone(), base + 4.0 * direction]
    found = merged(base, states, accuracies=(2.0, 0.0, 4.0), target=6.0, onto="base")
    assert torch.allclose(found, base + 6.0 * direction, atol=1e-4)
    still = [base.clone(), base.clone()]
    assert torch.equal(merged(base, still, accuracies=(0.0, 1.0), target=2.0), base)


def test_other_tensors_take_the_last_value_or_the_reference() -> None:
    base, states = gaussian(8, 6), [gaussian(8, 6, seed=s) for s in (1, 2)]
    options: dict[str, Any] = {"accuracies": (0.0, 1.0), "target": 2.0}
    last = merged(base, states, is_linear=False, **options)
    assert torch.allclose(last, states[-1], atol=1e-6)
    assert torch.equal(merged(base, states, is_linear=False, onto="base", **options), base)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "accuracies: is not set"),
        ({}, "target: is not set"),
        ({"accuracies": (0.1, 0.2), "target": 1.0}, "got 2, expected one for each of the 3"),
        ({"accuracies": (0.1, 0.1, 0.1), "target": 1.0}, "are all equal"),
        ({"accuracies": (0.1, 0.2, 0.1)}, "target: is not set"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        open_method(chosen(**options), 3)


def test_a_single_candidate_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 models"):
        open_method(chosen(accuracies=(0.1, 0.2), target=1.0), 1)


def test_a_window_of_other_length_is_refused() -> None:
    method = open_method(chosen(accuracies=(0.1, 0.2), target=1.0), 2)
    base = gaussian(4, 3)
    inputs = TensorInputs(NAME, base, [gaussian(4, 3, seed=1)], 2, is_linear=True)
    with pytest.raises(ConfigError, match="another number of states"):
        method.merge(inputs)


def test_it_wants_whole_tensors() -> None:
    assert OPERATOR.whole_tensors

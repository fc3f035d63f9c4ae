"""What the tests of operators share: tensors, pieces of rows, a model merged piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings

from arm_ray.merging.method import Method, open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.settings import MethodSettings

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (5, 3), (3, 8), (6, 6), (4, 1)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**31)


def inputs_of(
    reference: torch.Tensor, vectors: Sequence[torch.Tensor], **others: Any
) -> TensorInputs:
    """A tensor named `w`; its contributors are the reference and a vector each."""
    given = {
        "name": "w",
        "divisor": len(vectors),
        "contributor_names": tuple(f"c{i}" for i in range(len(vectors))),
        **others,
    }
    return TensorInputs(reference=reference, contributors=[reference + v for v in vectors], **given)


def method_of(operator: str, models: int = 2, **sections: Any) -> Method:
    return open_method(MethodSettings(operator, **sections), models)


def pieces(inputs: TensorInputs, cuts: Sequence[int]) -> list[TensorInputs]:
    """The same tensor as pieces of rows that begin at these rows (and at 0)."""
    rows = inputs.reference.shape[0]
    edges = sorted({0, rows, *(c % rows for c in cuts)})
    return [
        replace(
            inputs,
            reference=inputs.reference[a:b],
            contributors=[c[a:b] for c in inputs.contributors],
            second_moments=[m[a:b] for m in inputs.second_moments],
            rows=slice(a, b),
            shape=tuple(inputs.reference.shape),
        )
        for a, b in pairwise(edges)
    ]


def statistics_of(method: Method, model: Sequence[TensorInputs]) -> Mapping[str, object]:
    """The rounds over a whole model, given as tensors or pieces of them."""
    known: Mapping[str, object] = {}
    for number in range(method.rounds(len(model[0].contributors))):
        found = [method.measure(number, replace(piece, statistics=known)) for piece in model]
        assert all(sums.keys() == found[0].keys() for sums in found)
        for sums in found:
            for key, value in sums.items():
                assert value.dtype in (torch.int64, torch.float64)
                assert value.shape == found[0][key].shape
        total = {key: torch.stack([s[key] for s in found]).sum(0) for key in found[0]}
        known = method.conclude(number, total, known)
    return known


def merge_model(method: Method, model: Sequence[TensorInputs]) -> list[torch.Tensor]:
    known = statistics_of(method, model)
    return [method.merge(replace(piece, statistics=known)).tensor for piece in model]


def merge(method: Method, inputs: TensorInputs) -> torch.Tensor:
    kept = [t.clone() for t in (inputs.reference, *inputs.contributors, *inputs.second_moments)]
    (merged,) = merge_model(method, [inputs])
    after = (inputs.reference, *inputs.contributors, *inputs.second_moments)
    assert all(map(torch.equal, kept, after)), "the inputs were changed"
    assert merged.shape == inputs.reference.shape
    assert merged.dtype == torch.float32
    assert all(merged.data_ptr() != t.data_ptr() for t in after if t.numel())
    return merged


def exact(inputs: TensorInputs) -> tuple[np.ndarray, list[np.ndarray]]:
    """The reference and the task vectors as they are computed (float32), in float64."""
    reference = inputs.reference.double().numpy()
    return reference, [(c - inputs.reference).double().numpy() for c in inputs.contributors]


def assert_near(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    error = np.abs(found.double().numpy() - expected).max(initial=0.0)
    assert error <= tolerance * max(1.0, float(np.abs(expected).max(initial=0.0))), error


def assert_rows_give_the_whole(method: Method, inputs: TensorInputs, cuts: Sequence[int]) -> None:
    assert method.takes_rows(inputs.reference.ndim, False)
    whole = merge(method, inputs)
    parts = merge_model(method, pieces(inputs, cuts))
    assert torch.equal(torch.cat(parts), whole)

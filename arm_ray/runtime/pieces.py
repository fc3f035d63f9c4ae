"""A layer group's tensors in pieces of rows, and the file they go to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import TensorSpec, WeightFileWriter
from arm_ray.errors import NumericalError
from arm_ray.model.layout import ModelLayout
from arm_ray.schedule import IterationPlan


def group_specs(layout: ModelLayout, group: int) -> list[TensorSpec]:
    """The tensors of a layer group as a merged state stores them."""
    names = layout.groups[group].tensors
    return [TensorSpec(name, torch.float32, layout.shapes[name]) for name in names]


@contextlib.contextmanager
def group_writer(
    directory: Path, group: int, specs: Sequence[TensorSpec]
) -> Iterator[WeightFileWriter]:
    """Write one layer group of a state; the file appears whole when the context ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with WeightFileWriter(states.group_file(directory, group), specs) as writer:
        yield writer


def row_pieces(spec: TensorSpec, elements: int) -> list[slice]:
    """Consecutive rows of a tensor, of about so many elements at a time."""
    rows = spec.shape[0]
    width = max(1, spec.num_bytes // spec.dtype.itemsize // max(1, rows))
    step = max(1, elements // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def not_finite(name: str, plan: IterationPlan) -> NumericalError:
    """The error for a merged tensor that is not finite."""
    return NumericalError(
        f"merging {name} gave NaN, infinity or numbers too large",
        where=f"iteration {plan.iteration}",
        hint="use a smaller method.coefficient",
    )

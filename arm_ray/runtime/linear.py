"""Merging without forward passes: each piece of a tensor goes through all iterations at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.validation import check_finite
from arm_ray.checkpoints.weight_file import SharedWeightFile, TensorSpec
from arm_ray.merging.similarity import SimilaritySums, similarity_sums
from arm_ray.runtime.pieces import (
    group_specs,
    group_writer,
    not_finite,
    pieces_of,
    tensor_inputs,
)
from arm_ray.runtime.shard_spec import GroupReport, ShardSpec
from arm_ray.runtime.weights import WeightStore
from arm_ray.schedule import BASE, IterationPlan

# Elements merged at once: a piece of every state in use should stay in cache.
_PIECE = 1 << 17


Each = Callable[
    [Callable[[tuple[TensorSpec, slice]], "_Piece"], Iterator[tuple[TensorSpec, slice]]],
    Iterator["_Piece"],
]


@dataclass
class _Piece:
    """Some rows of a tensor after each iteration, and what the states' comparison gave."""

    merged: list[tuple[int, Tensor]]
    sums: list[SimilaritySums]


def merge_linear(
    spec: ShardSpec,
    store: WeightStore,
    plans: Sequence[IterationPlan],
    group: int,
    written: frozenset[int],
    model: Sequence[SharedWeightFile],
    known: Mapping[str, object],
    each: Each,
) -> list[GroupReport]:
    """Run consecutive iterations on one layer group; see `LayerShard.merge_linear`.

    Args:
        spec: The shard's.
        store: The shard's weights.
        plans: The iterations.
        group: Index of the layer group.
        written: Iterations whose states are written.
        model: The weight files of the final model.
        known: What is known of the whole model.
        each: `map`, in order, which may run several pieces at a time.
    """
    started = time.monotonic()
    sums: list[list[SimilaritySums]] = [[] for _ in plans]
    num_bytes = [0 for _ in plans]
    tensors = group_specs(spec.layout, group)
    with contextlib.ExitStack() as stack:
        writers = {}
        for position, plan in enumerate(plans):
            if plan.iteration in written:
                directory = states.state_directory(spec.run, plan.iteration)
                writer = stack.enter_context(group_writer(directory, group, tensors))
                writers[plan.iteration] = writer
                num_bytes[position] = writer.num_bytes
        files = [stack.enter_context(file.open()) for file in model]

        def run(item: tuple[TensorSpec, slice]) -> _Piece:
            tensor, rows = item
            piece = _run_piece(spec, store, plans, group, tensor, rows, known)
            for iteration, result in piece.merged:
                if iteration in writers:
                    writers[iteration].write(tensor.name, rows.start, result)
            for file in files:
                if tensor.name in file:
                    file.write(tensor.name, rows.start, piece.merged[-1][1])
            piece.merged = []
            return piece

        items = ((tensor, rows) for tensor in tensors for rows in pieces_of(spec, tensor, _PIECE))
        for piece in each(run, items):
            for collected, part in zip(sums, piece.sums, strict=True):
                collected.append(part)
    store.release(group, (), lambda _state: False)
    share = (time.monotonic() - started) / len(plans)
    return [
        GroupReport(group, tuple(part), 0, (), share, size)
        for part, size in zip(sums, num_bytes, strict=True)
    ]


def _run_piece(
    spec: ShardSpec,
    store: WeightStore,
    plans: Sequence[IterationPlan],
    group: int,
    tensor: TensorSpec,
    rows: slice,
    statistics: Mapping[str, object],
) -> _Piece:
    """The same rows of one tensor after each iteration."""
    known: dict[str, Tensor] = {}
    piece = _Piece([], [])

    def get(state: str) -> Tensor:
        if state not in known:
            known[state] = store.rows(state, group, tensor.name, rows)
        return known[state]

    for plan in plans:
        reference, *contributors = (get(state) for state in plan.inputs)
        inputs = tensor_inputs(
            spec, store, plan, group, tensor, rows, reference, contributors, statistics
        )
        result = spec.method.merge(inputs).tensor
        compared = similarity_sums(result, get(plan.previous), get(BASE))
        if not compared.is_finite:
            # The weights were not looked at before: tell a bad input from a bad coefficient.
            for state, checkpoint in spec.checkpoints.items():
                where = f"{state}: {checkpoint.tensors[tensor.name].file}"
                check_finite(checkpoint.read([tensor.name])[tensor.name], tensor.name, where)
            raise not_finite(tensor.name, plan)
        piece.sums.append(compared)
        known[plan.output] = result
        piece.merged.append((plan.iteration, result))
    return piece

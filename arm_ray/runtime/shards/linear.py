"""Merging without forward passes: each piece of a tensor goes through all iterations at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import (
    SharedWeightFile,
    SharedWriter,
    TensorSpec,
    WeightFileWriter,
    opened_for,
)
from arm_ray.merging.method import takes_models
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.similarity import SimilaritySums, similarity_sums
from arm_ray.merging.watch import check_merged
from arm_ray.model.changes import Changes
from arm_ray.planning.workload import linear_piece
from arm_ray.runtime.shards.facts import ModelFacts, added_in_order
from arm_ray.runtime.shards.pieces import (
    Workers,
    Write,
    WriteBehind,
    checked_rows,
    group_specs,
    group_writer,
    pieces_of,
    tensor_inputs,
)
from arm_ray.runtime.shards.spec import GroupReport, ShardSpec
from arm_ray.runtime.shards.weights import WeightStore, rows_of
from arm_ray.schedule import BASE, IterationPlan

# Up to this a tensor is measured and merged whole, by one thread, and read once.
_LARGEST_WHOLE = 1 << 23
# The same of models as they are, which a round costs less: it makes no task vectors.
_LARGEST_WHOLE_MODELS = 1 << 20

Rows = tuple[TensorSpec, slice]


def merge_linear(
    spec: ShardSpec,
    store: WeightStore,
    plans: Sequence[IterationPlan],
    group: int,
    written: frozenset[int],
    model: Sequence[SharedWeightFile],
    facts: ModelFacts,
    workers: Workers,
    behind: WriteBehind,
) -> list[GroupReport]:
    """Run consecutive iterations on one layer group; see `LayerShard.merge_linear`.

    Args:
        spec: The shard's.
        store: The shard's weights.
        plans: The iterations.
        group: Index of the layer group.
        written: Iterations whose states are written.
        model: The weight files of the final model.
        facts: What is known of the whole model.
        workers: What works on the pieces.
        behind: What writes them.
    """
    started = time.monotonic()
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
        files = stack.enter_context(opened_for(model, [spec.name for spec in tensors]))
        last = plans[-1].iteration
        merge = _GroupMerge(spec, store, group, last, writers, files, workers, behind)
        # Before the files are closed, whatever happens.
        stack.callback(merge.wait_until_written)
        large = []
        for tensor in tensors:
            at = _place(spec, tensor)
            most = _LARGEST_WHOLE
            if takes_models(spec.method, at):
                piece = linear_piece(on_gpu=store.device.type != "cpu")
                most = max(piece, _LARGEST_WHOLE_MODELS)
            if prod(tensor.shape) > most and spec.method.tensor_rounds(1, at):
                large.append(tensor)
        merge.pieces(plans, [tensor for tensor in tensors if tensor not in large], facts.statistics)
        for tensor in large:
            merge.iteration_by_iteration(plans, tensor, facts.statistics)
        for write in merge.writes:
            write.result()
    store.release(group, (), lambda _state: False)
    share = (time.monotonic() - started) / len(plans)
    return [
        GroupReport(
            group,
            tuple(sums for _, sums, _ in merge.changes[plan.iteration].pieces),
            0,
            (),
            share,
            size,
            tuple(merge.changes[plan.iteration].of(spec.layout)),
        )
        for plan, size in zip(plans, num_bytes, strict=True)
    ]


def _place(spec: ShardSpec, tensor: TensorSpec) -> tuple[str, float]:
    """A tensor's name and depth, by which settings may differ."""
    return tensor.name, spec.layout.depth_of(tensor.name)


@dataclass(frozen=True)
class _GroupMerge:
    """What all tensors of a group share.

    Attributes:
        last: The last iteration, whose result goes into the final model.
        writes: What is being written.
        changes: Iteration -> what became of the tensors, piece by piece.
    """

    spec: ShardSpec
    store: WeightStore
    group: int
    last: int
    writers: Mapping[int, WeightFileWriter]
    files: Mapping[str, SharedWriter]
    workers: Workers
    behind: WriteBehind
    writes: list[Future[None]] = field(default_factory=list)
    changes: dict[int, Changes] = field(default_factory=dict)

    def pieces(
        self,
        plans: Sequence[IterationPlan],
        tensors: Sequence[TensorSpec],
        statistics: Mapping[str, object],
        made: Mapping[str, Tensor] | None = None,
        checked: Collection[str] = (),
    ) -> None:
        """Merge and write tensors piece by piece.

        Args:
            plans: The iterations, all of which a piece goes through while it is in cache.
            tensors: Which.
            statistics: What the operator's rounds have found.
            made: State -> the whole tensor; a state that is made here is put into its place. None:
                the rounds over each tensor are not done yet.
            checked: States whose weights have been looked at, in those rounds.
        """
        is_measured, whole = made is not None, made or {}

        def run(item: Rows) -> tuple[str, list[SimilaritySums]]:
            tensor, rows = item
            known = {s: self.store.rows(s, self.group, tensor.name, rows) for s in checked}
            merged, sums = self._run_piece(
                plans, tensor, rows, statistics, whole, known, is_measured=is_measured
            )
            for plan, result in zip(plans, merged, strict=True):
                files: list[Write] = []
                if plan.iteration in self.writers:
                    files.append(self.writers[plan.iteration].write)
                if plan.output in whole:
                    rows_of(whole[plan.output], rows).copy_(result)
                if plan.iteration == self.last and tensor.name in self.files:
                    files.append(self.files[tensor.name].write)
                for write in files:
                    self.writes.extend(self.behind.write(write, tensor.name, rows.start, result))
            return tensor.name, sums

        items = self._items(tensors, measures_tensors=is_measured)
        for name, sums in self.workers.in_order(run, items):
            for plan, part in zip(plans, sums, strict=True):
                self.changes.setdefault(plan.iteration, Changes()).add(name, part)

    def wait_until_written(self) -> None:
        """Wait until nothing is being written."""
        wait(self.writes)

    def iteration_by_iteration(
        self, plans: Sequence[IterationPlan], tensor: TensorSpec, statistics: Mapping[str, object]
    ) -> None:
        """The same for an operator that needs numbers of the whole tensor in each iteration."""
        method, at = self.spec.method, _place(self.spec, tensor)
        made: dict[str, Tensor] = {}
        for plan in plans:
            measured, states = statistics, self._measured_states(plan, tensor)
            for number in range(method.tensor_rounds(len(plan.contributors), at)):
                sums = self._measure(plan, tensor, number, measured, made)
                measured = {**measured, **method.conclude(number, sums, measured, at)}
            if plan is not plans[-1]:
                made[plan.output] = torch.empty(
                    tensor.shape, dtype=torch.float32, device=self.store.device
                )
            self.pieces([plan], [tensor], measured, made, [s for s in states if s not in made])

    def _items(self, tensors: Sequence[TensorSpec], *, measures_tensors: bool) -> Iterator[Rows]:
        elements = linear_piece(on_gpu=self.store.device.type != "cpu")
        for tensor in tensors:
            pieces = pieces_of(self.spec, tensor, elements, measures_tensors=measures_tensors)
            for rows in pieces:
                yield tensor, rows

    def _measure(
        self,
        plan: IterationPlan,
        tensor: TensorSpec,
        number: int,
        statistics: Mapping[str, object],
        made: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """One round over a tensor."""
        states = self._measured_states(plan, tensor)

        def run(item: Rows) -> Mapping[str, Tensor]:
            weights = [self._rows(state, *item, made) for state in states]
            if len(states) < len(plan.inputs):
                # In the place of the reference, which nothing looks at.
                weights.insert(0, weights[0])
            inputs = self._inputs(plan, *item, weights, statistics, is_measured=True)
            return self.spec.method.measure(number, inputs)

        items = self._items([tensor], measures_tensors=True)
        return added_in_order(self.workers.in_order(run, items))

    def _measured_states(self, plan: IterationPlan, tensor: TensorSpec) -> Sequence[str]:
        """The states that the rounds look at: not a reference that is none of the models."""
        is_model = plan.regime == "sliding_window"
        if not is_model and takes_models(self.spec.method, _place(self.spec, tensor)):
            return plan.contributors
        return plan.inputs

    def _inputs(
        self,
        plan: IterationPlan,
        tensor: TensorSpec,
        rows: slice,
        weights: Sequence[Tensor],
        statistics: Mapping[str, object],
        *,
        is_measured: bool,
    ) -> TensorInputs:
        return tensor_inputs(
            self.spec,
            self.store,
            plan,
            self.group,
            tensor,
            rows,
            weights[0],
            weights[1:],
            statistics,
            is_measured=is_measured,
        )

    def _rows(
        self, state: str, tensor: TensorSpec, rows: slice, made: Mapping[str, Tensor]
    ) -> Tensor:
        if state in made:
            return rows_of(made[state], rows)
        return checked_rows(self.spec, self.store, state, self.group, tensor.name, rows)

    def _run_piece(
        self,
        plans: Sequence[IterationPlan],
        tensor: TensorSpec,
        rows: slice,
        statistics: Mapping[str, object],
        made: Mapping[str, Tensor],
        known: dict[str, Tensor],
        *,
        is_measured: bool,
    ) -> tuple[list[Tensor], list[SimilaritySums]]:
        """The same rows of one tensor after each iteration, and the comparisons of states."""
        merged: list[Tensor] = []
        sums: list[SimilaritySums] = []

        def get(state: str) -> Tensor:
            if state not in known:
                known[state] = self._rows(state, tensor, rows, made)
            return known[state]

        for plan in plans:
            weights = [get(state) for state in plan.inputs]
            inputs = self._inputs(plan, tensor, rows, weights, statistics, is_measured=is_measured)
            result = self.spec.method.merge(inputs).tensor
            compared = similarity_sums(result, get(plan.previous), get(BASE))
            by_state = dict(zip(plan.inputs, weights, strict=True))
            check_merged(tensor.name, compared, by_state, plan.iteration)
            sums.append(compared)
            known[plan.output] = result
            merged.append(result)
        return merged, sums

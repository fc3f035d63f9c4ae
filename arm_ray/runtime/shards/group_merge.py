"""Merging one layer group with the activations of an iteration, and writing it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import TensorSpec
from arm_ray.merging.operator import AnyRotation, MergedTensor, TensorInputs
from arm_ray.merging.rotation import RotationFacts
from arm_ray.merging.similarity import SimilaritySums, similarity_sums
from arm_ray.merging.watch import check_merged
from arm_ray.model.architecture import expert_name
from arm_ray.model.changes import Changes
from arm_ray.planning.workload import PIECE, linear_piece
from arm_ray.runtime.shards.captures import Captures
from arm_ray.runtime.shards.facts import ModelFacts, added_in_order
from arm_ray.runtime.shards.pieces import (
    Flushes,
    Workers,
    WriteBehind,
    checked_rows,
    group_specs,
    group_writer,
    is_by_expert,
    pieces_of,
    tensor_inputs,
)
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.weights import WeightStore, host_memory, rows_of
from arm_ray.schedule import BASE, IterationPlan

# One piece of a tensor, and the call that makes what the operator is given of it: so that this
# work is done by the thread that merges the piece.
Piece = tuple[TensorSpec, Callable[[], TensorInputs]]
# What is known of a merged piece: its tensor's name, how many task vectors were rotated, the ranks
# of shifts that lacked some, the comparison of states, and what the rotations are like.
_Facts = tuple[str, int, Sequence[tuple[int, int]], SimilaritySums, Sequence[RotationFacts]]


@dataclass
class MergedGroup:
    """What merging a layer group gave.

    Attributes:
        similarity: The comparisons of states, piece by piece.
        rotated: Rotated task vectors.
        deficient: The tensors whose activation shift was rank-deficient, in words.
        made: The tensors, float32, where merged states live in memory.
        num_bytes: Of the file, where they do not.
        changes: What became of each module.
    """

    similarity: list[SimilaritySums] = field(default_factory=list)
    rotated: int = 0
    deficient: list[str] = field(default_factory=list)
    made: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: int = 0
    changes: Changes = field(default_factory=Changes)


@dataclass(frozen=True)
class GroupMerge:
    """Merges layer groups of a shard whose forward passes have been run.

    Attributes:
        spec: The shard's.
        store: Its weights.
        captures: What its forward passes left.
        workers: What works on the pieces.
        behind: What writes them.
        flushes: What closes the files, once all is written.
        rotations: Iteration and tensor -> rotations, where the tensor is merged several times.
    """

    spec: ShardSpec
    store: WeightStore
    captures: Captures
    workers: Workers
    behind: WriteBehind
    flushes: Flushes
    rotations: dict[tuple[int, str], dict[tuple[int, int], AnyRotation | None]] = field(
        default_factory=dict
    )

    def merge(
        self, plan: IterationPlan, group: int, columns: NDArray[np.int64], facts: ModelFacts
    ) -> MergedGroup:
        """Merge a group, into memory or into its file; see `LayerShard.merge`.

        A file appears once the disk has caught up (`Flushes.wait`).
        """
        found = MergedGroup()
        pieces = self._pieces(plan, group, columns, facts, PIECE)
        if self.store.residency != "disk":
            place = partial(self._place, found.made, self._rooms(group))
            work = partial(self._merge_piece, plan, group, place)
            self._collect(found, self.workers.in_order(work, pieces))
        else:
            self._merge_into_file(found, plan, group, pieces)
        layout = self.spec.layout
        for name in layout.groups[group].tensors:
            for each in layout.captured_as(name):
                self.rotations.pop((plan.iteration, each), None)
        return found

    def _rooms(self, group: int) -> dict[str, Tensor]:
        """Memory for a group of a new state, where it lives in host memory."""
        if self.store.residency == "device" and self.store.device.type != "cpu":
            return {}
        wanted = {
            spec.name: (spec.shape, spec.dtype) for spec in group_specs(self.spec.layout, group)
        }
        return host_memory(wanted, self.store.device)

    def _place(
        self,
        made: dict[str, Tensor],
        rooms: Mapping[str, Tensor],
        spec: TensorSpec,
        rows: slice,
        piece: Tensor,
    ) -> None:
        """Put rows of a tensor into their place in memory."""
        if piece.shape == spec.shape and not rooms:
            made[spec.name] = piece
            return
        whole = made.get(spec.name)
        if whole is None:
            room = rooms.get(spec.name)
            if room is None:
                room = torch.empty(spec.shape, dtype=torch.float32, device=self.store.device)
            # Pieces of one tensor come from several threads.
            whole = made.setdefault(spec.name, room)
        rows_of(whole, rows).copy_(piece)

    def _merge_into_file(
        self, found: MergedGroup, plan: IterationPlan, group: int, pieces: Iterator[Piece]
    ) -> None:
        writes: list[Future[None]] = []
        directory = states.state_directory(self.spec.run, plan.iteration)
        try:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(
                    group_writer(directory, group, group_specs(self.spec.layout, group))
                )

                def put(spec: TensorSpec, rows: slice, piece: Tensor) -> None:
                    writes.extend(self.behind.write(writer.write, spec.name, rows.start, piece))

                work = partial(self._merge_piece, plan, group, put)
                self._collect(found, self.workers.in_order(work, pieces))
                # The disk catches up while the next groups are computed.
                self.flushes.close_after(writes, stack.pop_all())
        except BaseException:
            # The error is not raised while earlier groups are still on their way to the disk.
            wait(writes)
            self.flushes.wait()
            raise
        found.num_bytes = writer.num_bytes

    def _collect(self, found: MergedGroup, merged: Iterator[_Facts]) -> None:
        """Take what merging the pieces gave, in their order."""
        for name, rotated, ranks, sums, rotations in merged:
            found.similarity.append(sums)
            found.changes.add(name, sums, rotations)
            found.rotated += rotated
            found.deficient += [f"{name} ({r} of {n})" for r, n in ranks]

    def trials(
        self,
        plans: Sequence[IterationPlan],
        group: int,
        names: Sequence[str],
        columns: NDArray[np.int64],
        facts: Sequence[ModelFacts],
        dtypes: Mapping[str, torch.dtype],
    ) -> list[dict[str, Tensor]]:
        """Merge tensors of a group with steps of several lengths; nothing is written.

        Args:
            plans: The iteration, once for each step.
            group: Index of the layer group.
            names: The tensors.
            columns: As for `merge`.
            facts: What is known of the whole model, for each step.
            dtypes: Of what is returned, for each tensor.

        Returns:
            For each step, name -> tensor on the device: rounded, the bits that `merge` writes.
        """
        shapes, device = self.spec.layout.shapes, self.store.device
        made = [
            {name: torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in names}
            for _ in plans
        ]

        def work(piece: Piece) -> None:
            spec, make_inputs = piece
            inputs = make_inputs()
            by_step = [
                replace(self._of_step(inputs, plan), statistics=known.statistics)
                for plan, known in zip(plans, facts, strict=True)
            ]
            merged = self.spec.method.merge_steps(by_step)
            expert = self._expert(spec, inputs.rows)
            for found, tensor in zip(made, merged, strict=True):
                rows = self._piece(tensor, spec.name, expert)
                rows_of(found[spec.name], inputs.rows).copy_(rows)

        # Each step goes over a piece several times: what stays in a core's cache is faster.
        elements = linear_piece(on_gpu=device.type != "cpu")
        pieces = self._pieces(plans[0], group, columns, facts[0], elements, names)
        for _ in self.workers.in_order(work, pieces):
            pass
        return made

    def measure(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64] | None,
        number: int,
        facts: ModelFacts,
    ) -> dict[str, Tensor]:
        """One round's numbers of a group; see `LayerShard.measure`."""
        method = self.spec.method
        elements = linear_piece(on_gpu=self.store.device.type != "cpu")
        pieces = self._pieces(plan, group, columns, facts, elements)
        sums = self.workers.in_order(lambda p: method.measure(number, p[1]()), pieces)
        return {name: value.cpu() for name, value in added_in_order(sums).items()}

    def _pieces(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64] | None,
        facts: ModelFacts,
        elements: int,
        names: Sequence[str] | None = None,
    ) -> Iterator[Piece]:
        """A group's tensors, each whole, or row by row in pieces of about so many elements."""
        for spec in group_specs(self.spec.layout, group):
            if names is not None and spec.name not in names:
                continue
            for rows in pieces_of(self.spec, spec, elements):
                yield spec, partial(self._inputs, plan, group, spec, rows, columns, facts)

    def _inputs(
        self,
        plan: IterationPlan,
        group: int,
        spec: TensorSpec,
        rows: slice,
        columns: NDArray[np.int64] | None,
        facts: ModelFacts,
    ) -> TensorInputs:
        expert = self._expert(spec, rows)
        weights = [
            self._matrix(self._rows(state, group, spec.name, rows), spec.name, expert)
            for state in plan.inputs
        ]
        inputs = tensor_inputs(
            self.spec,
            self.store,
            plan,
            group,
            spec,
            rows,
            weights[0],
            weights[1:],
            facts.statistics,
        )
        moments = [self._matrix(m, spec.name, expert) for m in inputs.second_moments]
        inputs = self._of_step(replace(inputs, second_moments=moments), plan)
        if columns is None or not self.spec.method.needs_activations:
            return inputs
        shifts: list[Tensor] = []
        name = spec.name if expert is None else expert_name(spec.name, expert)
        rotations = self._known_rotations(plan, name)
        blocks = self.spec.layout.blocks.get(spec.name, ())
        if self.spec.method.settings.rotation.fused == "whole" or not inputs.is_linear:
            blocks = ()
        most = len(plan.contributors) * max(1, len(blocks))
        is_known = rotations is not None and len(rotations) == most
        if (
            self.spec.method.needs_outputs
            and inputs.is_linear
            and not (is_known and not self.spec.method.operator.activations)
        ):
            shifts = self.captures.shifts(plan, group, spec.name, weights, columns, expert)
        relaxation = self.captures.relaxation(plan, spec.name, columns)
        if spec.name == self.spec.layout.embedding and facts.head_relaxation is not None:
            relaxation = facts.head_relaxation.to(self.store.device)
        scales = self.captures.scales(plan, spec.name, columns, facts.largest_information)
        return replace(
            inputs,
            shifts=shifts,
            relaxation=relaxation,
            scales=scales,
            blocks=blocks,
            rotations=rotations,
        )

    def _rows(self, state: str, group: int, name: str, rows: slice) -> Tensor:
        if self.spec.method.needs_forward:
            # Looked at before the first iteration.
            return self.store.rows(state, group, name, rows)
        return checked_rows(self.spec, self.store, state, group, name, rows)

    def _expert(self, spec: TensorSpec, rows: slice) -> int | None:
        """Which expert of a tensor of all experts a piece is; None: it is no expert."""
        return rows.start if is_by_expert(self.spec, spec) else None

    def _of_step(self, inputs: TensorInputs, plan: IterationPlan) -> TensorInputs:
        if plan.step is None:
            return inputs
        layer, num_layers = self.spec.layout.layer_of(inputs.name), self.spec.layout.num_layers
        return replace(
            inputs,
            coefficient=plan.step.coefficient,
            factors=plan.step.factors_at(layer, num_layers),
        )

    def _known_rotations(
        self, plan: IterationPlan, name: str
    ) -> dict[tuple[int, int], AnyRotation | None] | None:
        """Where a tensor's rotations are kept, if it is merged several times."""
        if not (self.spec.method.tries_steps and self.spec.method.settings.rotates):
            return None
        return self.rotations.setdefault((plan.iteration, name), {})

    def _merge_piece(
        self,
        plan: IterationPlan,
        group: int,
        put: Callable[[TensorSpec, slice, Tensor], None],
        piece: Piece,
    ) -> _Facts:
        spec, make_inputs = piece
        inputs = make_inputs()
        result = self.spec.method.merge(inputs)
        expert = self._expert(spec, inputs.rows)
        sums = self._compare(plan, group, inputs, result, expert)
        put(spec, inputs.rows, self._piece(result.tensor, spec.name, expert))
        # Not the tensor: it need not wait for those of other threads.
        return spec.name, result.rotated, result.rank_deficient, sums, result.rotations

    def _compare(
        self,
        plan: IterationPlan,
        group: int,
        inputs: TensorInputs,
        result: MergedTensor,
        expert: int | None,
    ) -> SimilaritySums:
        by_state = dict(zip(plan.inputs, (inputs.reference, *inputs.contributors), strict=True))
        merged = dict(by_state)
        for state in (plan.previous, BASE):
            if state not in by_state:
                rows = self.store.rows(state, group, inputs.name, inputs.rows)
                by_state[state] = self._matrix(rows, inputs.name, expert)
        sums = similarity_sums(result.tensor, by_state[plan.previous], by_state[BASE])
        check_merged(inputs.name, sums, merged, plan.iteration)
        return sums

    def _matrix(self, piece: Tensor, name: str, expert: int | None) -> Tensor:
        """A piece as it is merged: of an expert, its matrix `[d_out, d_in]` alone."""
        if expert is None:
            return piece
        return piece[0].T.contiguous() if name in self.spec.layout.transposed else piece[0]

    def _piece(self, matrix: Tensor, name: str, expert: int | None) -> Tensor:
        """The same back again, as it is stored."""
        if expert is None:
            return matrix
        return (matrix.T if name in self.spec.layout.transposed else matrix)[None]

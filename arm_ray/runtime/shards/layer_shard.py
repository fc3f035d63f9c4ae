"""One actor's part of the model: it runs, merges and writes its own layer groups.

A plain class; the driver makes it a Ray actor. It holds, of each state that the iteration reads,
its own layers and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch
from arm_ray.checkpoints import states
from arm_ray.checkpoints.remote import LocalCopy, local_copy
from arm_ray.checkpoints.validation import check_finite
from arm_ray.checkpoints.weight_file import SharedWeightFile, TensorSpec, WeightFileWriter
from arm_ray.config import scratch_path
from arm_ray.errors import about
from arm_ray.merging.operator import MergedTensor, TensorInputs
from arm_ray.merging.similarity import SimilaritySums, similarity_sums
from arm_ray.model.group import GroupRunner, Templates
from arm_ray.model.layout import EMBEDDING, LM_HEAD
from arm_ray.runtime.shards import scratch
from arm_ray.runtime.shards.captures import Captures, forward_states
from arm_ray.runtime.shards.linear import merge_linear
from arm_ray.runtime.shards.node_files import COPIES, send_file
from arm_ray.runtime.shards.pieces import (
    group_specs,
    group_writer,
    not_finite,
    pieces_of,
    tensor_inputs,
)
from arm_ray.runtime.shards.rate import RateLimit
from arm_ray.runtime.shards.scratch import Elsewhere
from arm_ray.runtime.shards.spec import GroupReport, ShardSpec, ShardUsage
from arm_ray.runtime.shards.transport import pack_tensor, unpack_tensor
from arm_ray.runtime.shards.weights import WeightStore
from arm_ray.runtime.shards.write_behind import WriteBehind
from arm_ray.schedule import BASE, IterationPlan, states_read_after

# Elements of a tensor that are merged at once where it needs no activations.
_PIECE = 1 << 24
# The same for numbers over the whole model: few enough to stay in cache.
_MEASURED_PIECE = 1 << 20
# Names of what is known of the whole model from the forward passes.
HEAD_RELAXATION = "head relaxation"
LARGEST_INFORMATION = "largest information"


_T = TypeVar("_T")
_R = TypeVar("_R")


class LayerShard:
    """Runs, merges and writes the layer groups of one shard."""

    def __init__(self, spec: ShardSpec) -> None:
        # The sums of a matrix product depend on the number of threads: it is part of the result.
        torch.set_num_threads(spec.threads)
        torch.set_float32_matmul_precision("highest")
        if spec.niceness:
            os.nice(spec.niceness)
        self._device = torch.device(spec.device)
        self._disk = RateLimit(spec.disk_bytes_per_s)
        self._usage = ShardUsage()
        self._sent: dict[int, int] = {}
        self._usage_lock = threading.Lock()
        self._open(spec)
        self._runners: dict[int, GroupRunner] = {}
        self._templates: Templates = {}
        self._hidden: dict[tuple[int, str, int], Tensor] = {}
        # torch and MKL keep the number of threads for each thread that calls them.
        self._workers = ThreadPoolExecutor(
            spec.threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._behind = WriteBehind(self._device)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushes: list[Future[None]] = []
        self._last_wanted = sys.maxsize
        if spec.method.needs_forward:
            # Here the imports of the model's code take no time of an iteration.
            self._runner(spec.groups[0])

    def _open(self, spec: ShardSpec) -> None:
        """Take the checkpoints and the run directory of a spec."""
        # What cannot be read in place is copied: the shard's own groups, each when it is needed.
        copies = scratch_path(spec.scratch) / COPIES
        group_tensors = tuple(group.tensors for group in spec.layout.groups)
        self._spec = replace(
            spec,
            checkpoints={
                label: given
                if given.is_local
                else local_copy(given, copies, group_tensors, self._count_fetched)
                for label, given in spec.checkpoints.items()
            },
        )
        self._store = WeightStore(
            spec.layout,
            self._spec.checkpoints,
            spec.run,
            self._device,
            spec.compute_dtype,
            spec.residency,
            spec.second_moments,
            self._disk,
        )
        self._captures = Captures(
            spec.layout,
            spec.method.settings,
            spec.method.needs_outputs,
            self._store,
            self._device,
            spec.compute_dtype,
        )

    def sees(self, file: Path, content: str) -> bool:
        """Whether a file that the driver has written is here too."""
        return scratch.sees(file, content)

    def remove_copies(self) -> None:
        """Remove the copies of what lies elsewhere from this node's disk."""
        for given in self._spec.checkpoints.values():
            if isinstance(given, LocalCopy):
                shutil.rmtree(given.copies, ignore_errors=True)

    def missing_files(self) -> list[str]:
        """Files of checkpoints that the shard's layers need and that are not on this node."""
        given = {**self._spec.second_moments, **self._spec.checkpoints}
        return scratch.missing_files(given, self._own_tensors())

    def use_scratch(self, name: str, origin: Any, fingerprints: Mapping[str, str]) -> None:
        """Keep merged states on the node's own disk, and fetch what is not on this node.

        Args:
            name: The run's directory below `runtime.shards.scratch`.
            origin: `NodeFiles` of the node where the driver has opened the checkpoints.
            fingerprints: State name -> fingerprint of its checkpoint, as taken there.

        Raises:
            NotACheckpointError: A checkpoint is not here, and of a format that is not fetched.
        """
        spec = self._spec
        self._open(
            replace(
                spec,
                run=scratch_path(spec.scratch) / name,
                checkpoints={
                    label: scratch.reachable(
                        label, given, self._own_tensors(), origin, fingerprints[label]
                    )
                    for label, given in spec.checkpoints.items()
                },
            )
        )

    def _own_tensors(self) -> list[str]:
        return [name for g in self._spec.groups for name in self._spec.layout.groups[g].tensors]

    def fetch_groups(self, wanted: Sequence[Elsewhere]) -> None:
        """Bring layer groups of merged states here, that another node has."""
        for there in wanted:
            self._count_fetched(scratch.fetch_group(self._spec.run, there))

    def deliver(self, iteration: int, group: int, files: Any, directory: Path) -> int:
        """Send a layer group of a merged state to `directory` on another node; returns bytes."""
        own = states.state_directory(self._spec.run, iteration)
        return send_file(states.group_file(own, group), files, states.group_file(directory, group))

    def assemble(
        self, iteration: int, group: int, model: Sequence[SharedWeightFile], files: Any
    ) -> int:
        """Send a layer group to its places in the final model (`scratch.assemble`)."""
        own = states.state_directory(self._spec.run, iteration)
        return scratch.assemble(own, group, group_specs(self._spec.layout, group), model, files)

    def ready(self) -> str:
        """Answer once the actor runs: the device's name."""
        if self._device.type == "cuda":
            return str(torch.cuda.get_device_name(self._device))
        return self._device.type

    def abandon(self, iteration: int) -> None:
        """Do nothing more for iterations after this one: calls that wait return at once."""
        self._last_wanted = iteration

    def check_weights(self) -> int:
        """Look for NaN and infinity in the shard's layers of all checkpoints; returns bytes read.

        Raises:
            CorruptCheckpointError: Says in which tensor of which checkpoint.
        """
        total = 0
        for label, checkpoint in self._spec.checkpoints.items():
            for index in self._spec.groups:
                # Tensor by tensor, memory-mapped: nothing of it stays.
                for name in self._spec.layout.groups[index].tensors:
                    tensor = checkpoint.read([name])[name]
                    with about(label):
                        check_finite(tensor, name, f"{label}: {checkpoint.tensors[name].file}")
                    total += tensor.nbytes
                    self._disk.spend(tensor.nbytes)
        return total

    def forward(
        self,
        plan: IterationPlan,
        chunk: range,
        num_samples: int,
        state: str,
        micro_index: int,
        micro_batch: MicroBatch,
        hidden: Tensor | NDArray[np.generic] | None,
    ) -> Tensor | NDArray[np.generic] | None:
        """Run one micro-batch of one input state through a chunk of the shard's layer groups.

        Args:
            plan: The iteration.
            chunk: Layer groups, one of `ShardSpec.chunks`.
            num_samples: Different samples in the iteration's mini-batch.
            state: Name of the input state.
            micro_index: Which micro-batch it is.
            micro_batch: Its token ids and lengths.
            hidden: `[batch, tokens, hidden]` from the shard before; None for the model's first
                chunk, which embeds the token ids, and for a shard's later chunks, which go on
                with what the chunk before left here.

        Returns:
            The hidden states, from the last chunk of a shard that is not the last; else None. A
            tensor for a direct transport, an array (`pack_tensor`) for the object store.
        """
        started = time.monotonic()
        # OpenMP keeps this setting for each thread, and Ray may call from another one.
        torch.set_num_threads(self._spec.threads)
        if isinstance(hidden, Tensor) and hidden.numel() == 0:
            # The shard before was told first that this iteration is abandoned.
            self.abandon(min(self._last_wanted, plan.iteration - 1))
        if plan.iteration > self._last_wanted:
            return self._nothing(chunk)
        self._read_ahead(plan, chunk)
        key = (plan.iteration, state, micro_index)
        if chunk[0] == 0:
            ids = torch.from_numpy(micro_batch.input_ids.copy()).to(self._device)
            current = self._store.embed(state, ids)
        elif hidden is not None:
            if not isinstance(hidden, Tensor):
                hidden = unpack_tensor(hidden, self._spec.compute_dtype)
            current = hidden.to(self._device)
        else:
            current = self._hidden.pop(key)
        lengths = torch.from_numpy(micro_batch.lengths.copy()).to(self._device)
        positions = torch.from_numpy(micro_batch.sample_positions.copy()).to(self._device)
        samples = (plan, state, micro_index, num_samples, positions, lengths)
        if chunk[0] == 0:
            self._captures.collect_embedding(*samples, current)
        wanted = self._captures.wanted(plan, state)
        for index in chunk:
            weights = self._store.layers(state, index)
            output = self._runner(index).forward(weights, current, lengths, wanted)
            self._captures.collect(*samples, output)
            current = output.hidden
        if chunk[-1] == len(self._spec.layout.groups) - 1:
            self._captures.collect_tail(*samples, current, self._runner(chunk[-1]))
        self._count(forward_seconds=time.monotonic() - started)
        if chunk[-1] != self._spec.groups[-1]:
            self._hidden[key] = current
            return None
        if chunk[-1] == len(self._spec.layout.groups) - 1:
            return None
        with self._usage_lock:
            self._sent[plan.iteration] = self._sent.get(plan.iteration, 0) + current.nbytes
        return pack_tensor(current) if self._spec.transport == "object_store" else current

    def merge(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64],
        known: Mapping[str, object] | None = None,
    ) -> GroupReport | None:
        """Merge one layer group of an iteration, write it, and release what is not read again.

        Args:
            plan: The iteration, whose forward passes this shard has run.
            group: Index of the layer group.
            columns: `[N]`: which of the different samples each sample of the mini-batch is.
            known: What is known of the whole model.

        Returns:
            What came out; None if the iteration was abandoned.
        """
        started = time.monotonic()
        torch.set_num_threads(self._spec.threads)
        if plan.iteration > self._last_wanted:
            # Nothing may appear in the state's directory once the driver has removed it.
            wait(self._flushes)
            return None
        directory = states.state_directory(self._spec.run, plan.iteration)
        similarity: list[SimilaritySums] = []
        kept: dict[str, list[Tensor]] = {}
        writes: list[Future[None]] = []
        rotated, deficient = 0, []
        specs = group_specs(self._spec.layout, group)
        pieces = (
            (spec, inputs)
            for spec in specs
            for inputs in self._pieces(plan, group, spec, columns, known or {}, _PIECE)
        )
        try:
            with contextlib.ExitStack() as stack:
                # What the store keeps is read from the file once more at the very end, if at all.
                is_read_again = not self._store.keeps_new_states
                writer = stack.enter_context(
                    group_writer(directory, group, specs, is_read_again=is_read_again)
                )
                for spec, result, sums in self._in_order(
                    partial(self._merge_piece, plan, group, writer, writes), pieces
                ):
                    similarity.append(sums)
                    rotated += result.rotated
                    deficient += [f"{spec.name} ({r} of {n})" for r, n in result.rank_deficient]
                    if self._store.keeps_new_states:
                        kept.setdefault(spec.name, []).append(result.tensor)
                # The disk catches up while the next groups are computed.
                self._flushes.append(self._flusher.submit(_close, stack.pop_all(), writes))
        except BaseException:
            # The error is not told while earlier groups are still on their way to the disk.
            wait([*writes, *self._flushes])
            raise
        if group == self._spec.groups[-1]:
            self._wait_until_durable()
        self._disk.spend(writer.num_bytes)
        self._store.keep(plan.output, group, kept)
        self._release(plan, group)
        seconds = time.monotonic() - started
        self._count(merge_seconds=seconds)
        return GroupReport(
            group, tuple(similarity), rotated, tuple(deficient), seconds, writer.num_bytes
        )

    def adopt(self, plan: IterationPlan, group: int, report: GroupReport) -> GroupReport:
        """Take over a layer group that is merged and written already, by a shard that is gone."""
        self._release(plan, group)
        return report

    def _release(self, plan: IterationPlan, group: int) -> None:
        """Let go of what no later iteration reads of a group that is merged."""
        read_again = states_read_after(
            self._spec.schedule, self._spec.num_candidates, plan.iteration
        )
        self._store.release(
            group, forward_states(self._spec.method.settings, plan), read_again.__contains__
        )
        self._captures.drop(plan, self._spec.layout.groups[group].tensors)
        if group == self._spec.groups[-1]:
            self._captures.drop_iteration(plan.iteration)

    def summarise(self, plan: IterationPlan, columns: NDArray[np.int64]) -> dict[str, object]:
        """What other shards need of this one's activations, once all forward passes are over."""
        # Only an embedding that is also the head waits for what the last layers know.
        is_tied = LM_HEAD not in self._spec.layout.shapes
        relaxes = is_tied and self._spec.method.settings.aim.tied == "relax"
        relaxation = self._captures.relaxation(plan, LM_HEAD, columns) if relaxes else None
        return {
            HEAD_RELAXATION: None if relaxation is None else relaxation.cpu(),
            LARGEST_INFORMATION: self._captures.largest_information(plan),
        }

    def measure(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64] | None,
        number: int,
        known: Mapping[str, object],
    ) -> dict[str, Tensor]:
        """One round's numbers of one layer group (`merging.operator.Statistics`).

        Args:
            plan: The iteration.
            group: Index of the layer group.
            columns: As for `merge`; None without forward passes.
            number: Which round, 0-based.
            known: What is known of the whole model.
        """
        torch.set_num_threads(self._spec.threads)
        method = self._spec.method
        pieces = (
            inputs
            for spec in group_specs(self._spec.layout, group)
            for inputs in self._pieces(plan, group, spec, columns, known, _MEASURED_PIECE)
        )
        totals: dict[str, Tensor] = {}
        for sums in self._in_order(lambda inputs: method.measure(number, inputs()), pieces):
            for name, value in sums.items():
                totals[name] = totals[name] + value if name in totals else value
        self._store.release_unless_resident(group)
        return {name: value.cpu() for name, value in totals.items()}

    def release_forward(self, chunk: range) -> None:
        """Let go of a chunk's weights where they do not stay, before other chunks are run."""
        for group in chunk:
            self._store.release_unless_resident(group)

    def merge_linear(
        self,
        plans: Sequence[IterationPlan],
        group: int,
        written: frozenset[int],
        model: Sequence[SharedWeightFile],
        known: Mapping[str, object] | None = None,
    ) -> list[GroupReport]:
        """Run all iterations on one layer group, for an operator that needs no activations.

        Each piece of a tensor goes through the whole schedule while it is in cache: every input
        byte is read once, and only what was asked for is written.

        Args:
            plans: Consecutive iterations.
            group: Index of the layer group.
            written: Iterations whose states are written.
            model: The weight files of the final model, which the last iteration's result goes to.
            known: What is known of the whole model, for an operator that asks for it.

        Returns:
            One report for each iteration.
        """
        torch.set_num_threads(self._spec.threads)
        reports = merge_linear(
            self._spec,
            self._store,
            plans,
            group,
            written,
            model,
            known or {},
            self._in_order,
            self._behind,
        )
        members = self._spec.layout.groups[group].tensors
        exported = (s.num_bytes for file in model for s in file.specs if s.name in members)
        self._disk.spend(sum(report.num_bytes for report in reports) + sum(exported))
        self._count(merge_seconds=sum(report.seconds for report in reports))
        return reports

    def take_usage(self, iteration: int) -> ShardUsage:
        """What was done since the last call, and sent for an iteration that is finished."""
        with self._usage_lock:
            usage, self._usage = self._usage, ShardUsage()
            return replace(usage, sent_bytes=self._sent.pop(iteration, 0))

    def _count(self, **added: float) -> None:
        # Other threads read ahead, and take what was counted.
        with self._usage_lock:
            usage = self._usage
            self._usage = replace(usage, **{k: getattr(usage, k) + v for k, v in added.items()})

    def _count_fetched(self, num_bytes: int) -> None:
        self._count(fetched_bytes=num_bytes)

    def export(self, directory: Path, file: states.ExportFile, iteration: int) -> int:
        """Write one weight file of the final model from the state of `iteration`."""
        group_of = {
            name: group.index for group in self._spec.layout.groups for name in group.tensors
        }
        state = states.state_directory(self._spec.run, iteration)
        num_bytes = states.write_export_file(directory, file, state, group_of)
        self._disk.spend(num_bytes + sum(prod(spec.shape) * 4 for spec in file.specs))
        return num_bytes

    def peak_bytes(self) -> int:
        """Largest resident memory of the process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _wait_until_durable(self) -> None:
        """Wait until all merged groups are whole files on disk.

        Raises:
            OSError: The disk is full.
        """
        flushes, self._flushes = self._flushes, []
        wait(flushes)
        for flush in flushes:
            flush.result()

    def _runner(self, index: int) -> GroupRunner:
        if index not in self._runners:
            spec = self._spec
            self._runners[index] = GroupRunner(
                spec.layout,
                spec.layout.groups[index],
                self._device,
                spec.compute_dtype,
                self._templates,
            )
        return self._runners[index]

    def _nothing(self, chunk: range) -> Tensor | None:
        """What `forward` returns of an abandoned iteration: of the right kind, but empty."""
        sends = chunk[-1] == self._spec.groups[-1] != len(self._spec.layout.groups) - 1
        return torch.zeros(0) if sends else None

    def _read_ahead(self, plan: IterationPlan, chunk: range) -> None:
        following = chunk[-1] + 1
        if following in self._spec.groups:
            self._store.read_ahead([*plan.inputs, plan.previous, BASE], following)

    def _pieces(
        self,
        plan: IterationPlan,
        group: int,
        spec: TensorSpec,
        columns: NDArray[np.int64] | None,
        known: Mapping[str, object],
        elements: int,
    ) -> Iterator[Callable[[], TensorInputs]]:
        """What the operator is given of one tensor: all of it, or row by row in large pieces.

        Yields calls that make it, so that the work is done where the piece is merged.
        """
        for rows in pieces_of(self._spec, spec, elements):
            yield partial(self._inputs, plan, group, spec, rows, columns, known)

    def _inputs(
        self,
        plan: IterationPlan,
        group: int,
        spec: TensorSpec,
        rows: slice,
        columns: NDArray[np.int64] | None,
        known: Mapping[str, object],
    ) -> TensorInputs:
        reference, *contributors = (
            self._store.rows(state, group, spec.name, rows) for state in plan.inputs
        )
        inputs = tensor_inputs(
            self._spec, self._store, plan, group, spec, rows, reference, contributors, known
        )
        if columns is None:
            return inputs
        shifts: list[Tensor] = []
        if self._spec.method.needs_outputs and spec.name in self._spec.layout.rotated:
            chosen = torch.from_numpy(columns.copy()).to(self._device)
            shifts = [
                s[:, chosen]
                for s in self._captures.shifts(plan, group, spec.name, [reference, *contributors])
            ]
        relaxation = self._captures.relaxation(plan, spec.name, columns)
        head = cast("Tensor | None", known.get(HEAD_RELAXATION))
        if spec.name == EMBEDDING and head is not None:
            relaxation = head.to(self._device)
        largest = cast("dict[str, float] | None", known.get(LARGEST_INFORMATION))
        scales = self._captures.scales(plan, spec.name, columns, largest)
        return replace(inputs, shifts=shifts, relaxation=relaxation, scales=scales)

    def _in_order(self, work: Callable[[_T], _R], items: Iterator[_T]) -> Iterator[_R]:
        """`map` over pieces, as many at a time as there are threads, in order.

        The products of one tensor are too small to share: each piece has one thread to itself, so
        what comes out does not depend on how many there are. A GPU takes one operation after the
        other anyway, and torch's CUDA factorisations must not begin in two threads at once.
        """
        if self._spec.threads == 1 or self._device.type != "cpu":
            yield from map(work, items)
            return
        running: deque[Future[_R]] = deque()
        for item in items:
            running.append(self._workers.submit(work, item))
            if len(running) > self._spec.threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _merge_piece(
        self,
        plan: IterationPlan,
        group: int,
        writer: WeightFileWriter,
        writes: list[Future[None]],
        piece: tuple[TensorSpec, Callable[[], TensorInputs]],
    ) -> tuple[TensorSpec, MergedTensor, SimilaritySums]:
        spec, inputs = piece
        given = inputs()
        result = self._spec.method.merge(given)
        sums = self._compare(plan, group, given, result)
        writes += self._behind.write(writer.write, spec.name, given.rows.start, result.tensor)
        return spec, result, sums

    def _compare(
        self, plan: IterationPlan, group: int, inputs: TensorInputs, result: MergedTensor
    ) -> SimilaritySums:
        by_state = dict(zip(plan.inputs, (inputs.reference, *inputs.contributors), strict=True))
        for state in (plan.previous, BASE):
            if state not in by_state:
                by_state[state] = self._store.rows(state, group, inputs.name, inputs.rows)
        sums = similarity_sums(result.tensor, by_state[plan.previous], by_state[BASE])
        if not sums.is_finite:
            raise not_finite(inputs.name, plan)
        return sums


def _close(files: contextlib.ExitStack, writes: Sequence[Future[None]]) -> None:
    """Close a group's file once all of it is written; what failed leaves no file."""
    with files:
        wait(writes)
        for write in writes:
            write.result()

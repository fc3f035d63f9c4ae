"""One actor's part of the model: it runs, merges and writes its own layer groups.

A plain class; the driver makes it a Ray actor. It holds, of each state that the iteration reads,
its own layers and nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch
from arm_ray.checkpoints.weight_file import SharedWeightFile
from arm_ray.model.group import Decoder
from arm_ray.model.imports import set_own_process
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.node_files import NodeFiles
from arm_ray.runtime.shards.captures import Captures, MicroPass, wanted_of
from arm_ray.runtime.shards.facts import NOTHING_KNOWN, ModelFacts
from arm_ray.runtime.shards.files import ShardFiles
from arm_ray.runtime.shards.group_merge import GroupMerge
from arm_ray.runtime.shards.linear import merge_linear
from arm_ray.runtime.shards.losses import ShardLosses
from arm_ray.runtime.shards.made_states import MadeStates
from arm_ray.runtime.shards.meter import (
    DeviceMemory,
    Meter,
    RateLimit,
    ShardUsage,
    device_memory,
    peak_bytes,
)
from arm_ray.runtime.shards.pieces import Flushes, Workers, WriteBehind
from arm_ray.runtime.shards.spec import GroupReport, ShardSpec
from arm_ray.runtime.shards.transport import pack_tensor, prepare_transport, unpack_tensor
from arm_ray.runtime.shards.weights import WeightStore, share_base
from arm_ray.schedule import BASE, IterationPlan

if TYPE_CHECKING:
    from ray import ObjectRef

_P = ParamSpec("_P")
_R = TypeVar("_R")
# States are sent elsewhere beside the iterations that a shard works on.
BESIDE = {"concurrency_group": "deliver"}
# Calls that must get through while work is queued.
CONTROL = {"concurrency_group": "control"}


class LayerShard:
    """Runs, merges and writes the layer groups of one shard."""

    _store: WeightStore

    def __init__(self, spec: ShardSpec) -> None:
        if spec.environment is not None:
            os.environ.update(spec.environment)
            set_own_process()
        # The sums of a matrix product depend on the number of threads: it is part of the result.
        torch.set_num_threads(spec.threads)
        torch.set_float32_matmul_precision("highest")
        if spec.niceness:
            os.nice(spec.niceness)
        self._device = torch.device(spec.device)
        self._disk, self._meter = RateLimit(spec.disk_bytes_per_s), Meter()
        self._workers = Workers(spec.workers or spec.threads, self._device)
        self._behind, self._flushes = WriteBehind(self._device), Flushes()
        self._last_spec: ShardSpec | None = None
        self._open(ShardFiles(spec, self._meter, self._disk))
        self._begin()
        if spec.method.needs_forward:
            # Here the imports of the model's code take no time of an iteration.
            self._decoder.runner(spec.groups[0])

    def _begin(self) -> None:
        self._hidden: dict[tuple[int, str, int], Tensor] = {}
        self._last_wanted = sys.maxsize

    def begin_again(self, spec: ShardSpec | None) -> None:
        """Take another merge, with as many threads on the same device.

        Args:
            spec: What it is given; None: it only lets go of all but the base's weights (`ShardSpec.
                kept_base`) until another merge comes.
        """
        if spec is not None:
            self._disk = RateLimit(spec.disk_bytes_per_s)
        files = self._files if spec is None else ShardFiles(spec, self._meter, self._disk)
        self._open(files)
        self._begin()

    def _open(self, files: ShardFiles) -> None:
        """Take the checkpoints and the run directory of a shard's files."""
        spec, last = files.spec, self._last_spec
        before = self._store if last is not None and spec.is_of_same_base(last) else None
        self._files, self._spec, self._last_spec = files, spec, spec
        self._decoder = Decoder(spec.layout, self._device, spec.compute_dtype)
        self._store = WeightStore(
            spec.layout,
            spec.checkpoints,
            spec.run,
            self._decoder,
            spec.residency,
            spec.second_moments,
            self._disk,
        )
        if before is not None:
            share_base(before, self._store, spec.groups)
        self._states = MadeStates(spec, self._store, self._workers, self._behind, self._disk)
        self._captures = Captures(spec.layout, spec.method, self._store, spec.compute_dtype)
        self._merging = GroupMerge(
            spec, self._store, self._captures, self._workers, self._behind, self._flushes
        )
        self._losses = ShardLosses(spec, self._store, self._merging, self._decoder)

    def on(self, part: str, method: str, *arguments: Any) -> Any:
        """Call a method of a part of the shard; see `call_losses`, `call_files`, `call_states`.

        Args:
            part: `losses`, `files` or `states`.
            method: Its name.
            arguments: What it is given.
        """
        started = time.monotonic()
        found = getattr(getattr(self, f"_{part}"), method)(*arguments)
        if part == "losses":
            self._meter.worked("forward", time.monotonic() - started)
        return found

    def use_scratch(
        self, name: str, origin: Handle[NodeFiles], fingerprints: Mapping[str, str]
    ) -> None:
        """Work on the node's own disk from now on; see `ShardFiles.moved_to`."""
        self._open(self._files.moved_to(name, origin, fingerprints))

    def ready(self) -> str:
        """Answer once the actor runs, and can be sent tensors: the device's name."""
        if self._spec.transport != "object_store":
            prepare_transport()
        if self._device.type == "cuda":
            return str(torch.cuda.get_device_name(self._device))
        return self._device.type

    def device_memory(self) -> DeviceMemory:
        """Memory of its GPU."""
        return device_memory(self._device)

    def abandon(self, iteration: int) -> None:
        """Do nothing more for iterations after this one: calls that wait return at once."""
        self._last_wanted = iteration
        self._states.end_with(iteration)

    def forward(
        self,
        plan: IterationPlan,
        chunk: range,
        num_samples: int,
        state: str,
        micro_index: int,
        micro_batch: MicroBatch,
        hidden: Tensor | NDArray[np.generic] | None,
        is_end: bool = False,
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
                chunk, which embeds the token ids, and where the layers before are this shard's
                too: it goes on with what they left here.
            is_end: Whether no layers are run after these, though there are some.

        Returns:
            The hidden states, where the layers that follow are another shard's and are run; else
            None. A tensor for a direct transport, an array (`pack_tensor`) for the object store.
        """
        started = time.monotonic()
        # OpenMP keeps this setting for each thread, and Ray may call from another one.
        torch.set_num_threads(self._spec.threads)
        if isinstance(hidden, Tensor) and hidden.numel() == 0:
            # The shard before was told first that this iteration is abandoned.
            self.abandon(min(self._last_wanted, plan.iteration - 1))
        if plan.iteration > self._last_wanted:
            # Of the right kind, but empty.
            sends = not is_end and self._spec.sends_after(chunk)
            return torch.zeros(0, device=self._device) if sends else None
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
        micro = MicroPass(plan, state, micro_index, num_samples, positions, lengths)
        if chunk[0] == 0:
            self._captures.collect_embedding(micro, current)
        wanted = wanted_of(self._spec.method, plan, state)
        for index in chunk:
            weights = self._store.layers(state, index)
            output = self._decoder.runner(index).forward(weights, current, lengths, wanted)
            self._captures.collect(micro, index, output)
            current = output.hidden
        if chunk[-1] == len(self._spec.layout.groups) - 1:
            self._captures.collect_tail(micro, current, self._decoder)
        self._meter.worked("forward", time.monotonic() - started)
        if is_end or not self._spec.sends_after(chunk):
            if not is_end and chunk.stop in self._spec.groups:
                self._hidden[key] = current
            return None
        self._meter.count_sent(plan.iteration, current.nbytes)
        return pack_tensor(current) if self._spec.transport == "object_store" else current

    def merge(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64],
        facts: ModelFacts = NOTHING_KNOWN,
    ) -> GroupReport | None:
        """Merge one layer group of an iteration, and release what is not read again.

        Args:
            plan: The iteration, whose forward passes this shard has run.
            group: Index of the layer group.
            columns: `[N]`: which of the different samples each sample of the mini-batch is.
            facts: What is known of the whole model.

        Returns:
            What came out; None if the iteration was abandoned.
        """
        started = time.monotonic()
        torch.set_num_threads(self._spec.threads)
        if plan.iteration > self._last_wanted:
            # Nothing may appear in the state's directory once the driver has removed it.
            self._flushes.wait()
            return None
        self._captures.check(plan, group)
        merged = self._merging.merge(plan, group, columns, facts)
        if group == self._spec.groups[-1]:
            self._flushes.finish()
        num_bytes = merged.num_bytes
        if self._store.residency != "disk":
            num_bytes = self._states.keep(plan, group, merged.made)
        else:
            self._disk.spend(num_bytes)
        self._release(plan, group)
        seconds = time.monotonic() - started
        self._meter.worked("merge", seconds)
        return GroupReport(
            group,
            tuple(merged.similarity),
            merged.rotated,
            tuple(merged.deficient),
            seconds,
            num_bytes,
            tuple(merged.changes.of(self._spec.layout)),
        )

    def adopt(self, plan: IterationPlan, group: int, report: GroupReport) -> GroupReport:
        """Take over a layer group that is merged and written already, by a shard that is gone."""
        if group == self._spec.groups[-1]:
            # The groups before it are this shard's work, and perhaps still being written.
            self._flushes.finish()
        self._release(plan, group)
        return report

    def _release(self, plan: IterationPlan, group: int) -> None:
        """Let go of what no later iteration reads of a group that is merged."""
        self._states.release(plan, group)
        self._captures.drop(plan, self._spec.layout.groups[group].tensors)
        if group == self._spec.groups[-1]:
            self._captures.drop_iteration(plan.iteration)

    def summarise(self, plan: IterationPlan, columns: NDArray[np.int64]) -> ModelFacts:
        """What other shards need of this one's activations, once all forward passes are over."""
        # Only an embedding that is also the head waits for what the last layers know.
        tied, step = self._spec.layout.tied_copy, self._spec.method.relaxation
        relaxation = None
        if tied is not None and step is not None and step.relaxes_tied_head:
            relaxation = self._captures.relaxation(plan, tied, columns)
        return ModelFacts(
            head_relaxation=None if relaxation is None else relaxation.cpu(),
            largest_information=self._captures.largest_information(plan),
        )

    def measure(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64] | None,
        number: int,
        facts: ModelFacts,
    ) -> dict[str, Tensor]:
        """One round's numbers of one layer group (`merging.operator.Statistics`).

        Args:
            plan: The iteration.
            group: Index of the layer group.
            columns: As for `merge`; None without forward passes.
            number: Which round, 0-based.
            facts: What is known of the whole model.
        """
        torch.set_num_threads(self._spec.threads)
        if columns is not None:
            self._captures.check(plan, group)
        found = self._merging.measure(plan, group, columns, number, facts)
        self._store.release_unless_resident(group, mapped=columns is None)
        return found

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
        facts: ModelFacts = NOTHING_KNOWN,
    ) -> list[GroupReport]:
        """Run all iterations on one layer group, for an operator that needs no activations.

        Each piece of a tensor goes through the whole schedule while it is in cache: every input
        byte is read once, and only what was asked for is written.

        Args:
            plans: Consecutive iterations.
            group: Index of the layer group.
            written: Iterations whose states are written.
            model: The weight files of the final model, which the last iteration's result goes to.
            facts: What is known of the whole model, for an operator that asks for it.

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
            facts,
            self._workers,
            self._behind,
        )
        members = self._spec.layout.groups[group].tensors
        exported = (s.num_bytes for file in model for s in file.specs if s.name in members)
        self._disk.spend(sum(report.num_bytes for report in reports) + sum(exported))
        self._meter.worked("merge", sum(report.seconds for report in reports))
        return reports

    def take_usage(self, iteration: int) -> ShardUsage:
        """What was done since the last call, and sent for an iteration that is finished."""
        return self._meter.take(iteration)

    def peak_bytes(self) -> int:
        """Largest resident memory of the process so far."""
        return peak_bytes()

    def _read_ahead(self, plan: IterationPlan, chunk: range) -> None:
        following = next((group for group in self._spec.groups if group >= chunk.stop), None)
        if following is not None:
            self._store.read_ahead([*plan.inputs, plan.previous, BASE], following)


def call_losses(
    shard: Handle[LayerShard],
    options: Mapping[str, Any],
    method: Callable[Concatenate[ShardLosses, _P], _R],
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> ObjectRef[_R]:
    """Call a method of a shard's `ShardLosses` with options of the call; returns at once."""
    assert not kwargs
    return shard.call_with(options, LayerShard.on, "losses", method.__name__, *args)


def call_states(
    shard: Handle[LayerShard],
    options: Mapping[str, Any],
    method: Callable[Concatenate[MadeStates, _P], _R],
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> ObjectRef[_R]:
    """Call a method of a shard's `MadeStates` with options of the call; returns at once."""
    assert not kwargs
    return shard.call_with(options, LayerShard.on, "states", method.__name__, *args)


def call_files(
    shard: Handle[LayerShard],
    method: Callable[Concatenate[ShardFiles, _P], _R],
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> ObjectRef[_R]:
    """Call a method of a shard's `ShardFiles`; returns at once."""
    assert not kwargs
    options = BESIDE if method is ShardFiles.deliver else {}
    return shard.call_with(options, LayerShard.on, "files", method.__name__, *args)

"""The driver of a streaming merge: it submits work to the layer shards and holds no weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.console import Console

from arm_ray.calibration.minibatch import MicroBatch, micro_batches, unique_samples
from arm_ray.calibration.stream import CalibrationStream
from arm_ray.checkpoints import states
from arm_ray.config import MergeConfig
from arm_ray.errors import ArmRayError, WorkerError
from arm_ray.events import IterationFinished, Warned
from arm_ray.merging.similarity import cosine
from arm_ray.model.partition import balanced_partition
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.layer_shard import GroupReport
from arm_ray.runtime.progress import MergeProgress
from arm_ray.runtime.run_directory import RunDirectory
from arm_ray.schedule import (
    BASE,
    IterationPlan,
    has_converged,
    iteration_of,
    plan_iteration,
    should_stop,
    states_needed_after,
)

_MAX_MICRO_BATCH_SAMPLES = 64
_POLL_S = 0.5


@dataclass
class _InFlight:
    """An iteration that is submitted: its plan, and the references to what it returns."""

    plan: IterationPlan
    forwards: list[Any]
    merges: list[Any]
    started: float


class StreamingDriver:
    """Runs iterations of the schedule on layer shards that are placed already.

    Args:
        config: The configuration.
        inputs: The checked checkpoints.
        run: The run directory, open.
        actors: The layer shards' handles, in the order of the layers.
        stream: The calibration stream; None where the operator needs no activations.
        console: Where progress goes.
    """

    def __init__(
        self,
        config: MergeConfig,
        inputs: MergeInputs,
        run: RunDirectory,
        actors: Sequence[Any],
        stream: CalibrationStream | None,
        console: Console,
    ) -> None:
        self._config, self._inputs, self._run = config, inputs, run
        self._actors, self._stream, self._console = actors, stream, console
        self._ranges = shard_ranges(inputs, len(actors))

    def check_weights(self) -> int:
        """Have every shard look for NaN and infinity in its layers; returns bytes read."""
        return sum(self._get([actor.check_weights.remote() for actor in self._actors]))

    def iterate(self, stop_after: int | None = None) -> str:
        """Run from the first iteration that is not done to the end of the schedule.

        Args:
            stop_after: Halt after this iteration, although the schedule goes on.

        Returns:
            Why it ended: `max_iterations`, `converged` or `stop_after`.
        """
        schedule, run = self._config.schedule, self._run
        last = run.finished.get(run.last_iteration)
        if last and should_stop(schedule, last.iteration, last.task_vector_cosine):
            return self._reason(last)
        first = run.last_iteration + 1
        units = len(self._inputs.layout.groups) + self._num_forwards(first)
        progress = MergeProgress(self._console, first, schedule.max_iterations, units)
        with progress.shown():
            for iteration in range(first, schedule.max_iterations + 1):
                if stop_after is not None and iteration > stop_after:
                    return "stop_after"
                manifest = self._finish(self._submit(iteration), progress)
                run.finished[iteration] = manifest
                run.prune(len(self._config.candidates), iteration)
                if should_stop(schedule, iteration, manifest.task_vector_cosine):
                    return self._reason(manifest)
        raise AssertionError("the schedule did not end")

    def export(self) -> int:
        """Write `model/` from the last state, each weight file by one of the shards; bytes."""
        iteration = self._run.last_iteration
        partial = self._run.path / "model.partial"
        partial.mkdir()
        files = states.plan_export(
            self._inputs.layout.shapes,
            self._inputs.storage_dtypes,
            int(self._config.runtime.max_weight_file_gb * 1e9),
        )
        actors = self._actors
        sizes = self._get(
            [
                actors[i % len(actors)].export.remote(partial, file, iteration)
                for i, file in enumerate(files)
            ]
        )
        states.write_export_index(partial, files)
        dtype = self._inputs.storage_dtypes[self._inputs.layout.groups[0].tensors[-1]]
        states.write_companions(partial, self._inputs.model_config(dtype), self._inputs.tokenizer)
        return int(sum(sizes))

    def peak_bytes(self) -> tuple[int, ...]:
        """Largest resident memory of each shard so far."""
        return tuple(self._get([actor.peak_bytes.remote() for actor in self._actors]))

    def _reason(self, manifest: states.StateManifest) -> str:
        converged = has_converged(self._config.schedule, manifest.task_vector_cosine)
        return "converged" if converged else "max_iterations"

    def _plan(self, iteration: int) -> IterationPlan:
        return plan_iteration(self._config.schedule, len(self._config.candidates), iteration)

    def _micro_batches(self, iteration: int) -> tuple[list[MicroBatch], NDArray[np.int64]]:
        """Micro-batches of the different samples, and each sample's position among these."""
        if self._stream is None:
            return [], np.zeros(0, dtype=np.int64)
        different, columns = unique_samples(self._stream.batch(iteration))
        micro = micro_batches(
            different,
            max_tokens=self._config.runtime.micro_batch_tokens,
            max_samples=_MAX_MICRO_BATCH_SAMPLES,
        )
        return micro, columns

    def _num_forwards(self, iteration: int) -> int:
        count = len(self._micro_batches(iteration)[0]) * len(self._plan(iteration).inputs)
        return count * len(self._actors)

    def _submit(self, iteration: int) -> _InFlight:
        """Submit an iteration, stage by stage; an actor takes its calls in this order."""
        plan = self._plan(iteration)
        batches, columns = self._micro_batches(iteration)
        num_samples = sum(len(batch.lengths) for batch in batches)
        micro = [ray.put(batch) for batch in batches]
        hidden: dict[tuple[str, int], Any] = {}
        flight = _InFlight(plan, [], [], time.monotonic())
        needed = states_needed_after(self._config.schedule, len(self._config.candidates), iteration)
        keep = frozenset(needed | set(self._checkpoints_needed_after(iteration)))
        for actor, groups in zip(self._actors, self._ranges, strict=True):
            for index, batch in enumerate(micro):
                for state in plan.inputs:
                    before = hidden.get((state, index))
                    ref = actor.forward.remote(plan, num_samples, state, batch, before)
                    hidden[state, index] = ref
                    flight.forwards.append(ref)
            flight.merges += [actor.merge.remote(plan, group, columns, keep) for group in groups]
        return flight

    def _checkpoints_needed_after(self, iteration: int) -> set[str]:
        last = self._config.schedule.max_iterations
        later = (self._plan(t) for t in range(iteration + 1, last + 1))
        names = {name for plan in later for name in (*plan.inputs, plan.previous)}
        return {BASE} | {name for name in names if iteration_of(name) is None}

    def _finish(self, flight: _InFlight, progress: MergeProgress) -> states.StateManifest:
        """Wait for an iteration, publish its state and write it down."""
        plan = flight.plan
        self._watch(flight, progress)
        reports: list[GroupReport] = self._get(flight.merges)
        sums = [part for report in reports for part in report.similarity]
        manifest = states.StateManifest(
            plan.iteration,
            plan.regime,
            plan.reference,
            plan.contributors,
            cosine(part.weights for part in sums),
            cosine(part.task_vectors for part in sums),
        )
        self._publish(manifest)
        seconds = time.monotonic() - flight.started
        self._record(manifest, reports, seconds)
        progress.finish_iteration(
            plan.iteration,
            plan.regime,
            manifest.weight_cosine,
            manifest.task_vector_cosine,
            seconds,
        )
        return manifest

    def _watch(self, flight: _InFlight, progress: MergeProgress) -> None:
        groups = self._inputs.layout.groups
        pending = [*flight.forwards, *flight.merges]
        merged = set(flight.merges)
        layers = 0
        while pending:
            done, pending = ray.wait(pending, timeout=_POLL_S)
            # An error surfaces here, not after the whole iteration.
            self._get([ref for ref in done if ref in merged])
            for ref in done:
                if ref in merged:
                    group = groups[flight.merges.index(ref)]
                    layers += group.end_layer - group.first_layer
                progress.advance(flight.plan.iteration, layers, self._inputs.layout.num_layers)

    def _publish(self, manifest: states.StateManifest) -> None:
        layout = self._inputs.layout
        states.publish_state(
            states.state_directory(self._run.path, manifest.iteration),
            manifest,
            [group.tensors for group in layout.groups],
            states.total_bytes(layout.shapes, torch.float32.itemsize),
            self._inputs.model_config(torch.float32),
            self._inputs.tokenizer,
        )

    def _record(
        self, manifest: states.StateManifest, reports: Sequence[GroupReport], seconds: float
    ) -> None:
        deficient = tuple(text for report in reports for text in report.rank_deficient)
        if deficient:
            self._run.events.write(
                Warned(
                    f"iteration {manifest.iteration}: the activation shift of {len(deficient)} "
                    f"tensor(s) is rank-deficient (equal samples, or frozen layers); rotated by "
                    f"fewer directions: {', '.join(deficient)}"
                )
            )
        forward = self._get([actor.take_forward_seconds.remote() for actor in self._actors])
        self._run.events.write(
            IterationFinished(
                manifest.iteration,
                manifest.regime,
                manifest.reference,
                manifest.contributors,
                manifest.weight_cosine,
                manifest.task_vector_cosine,
                sum(report.rotated for report in reports),
                deficient,
                round(seconds, 3),
                round(sum(forward), 3),
                round(sum(report.seconds for report in reports), 3),
                sum(report.num_bytes for report in reports),
            )
        )

    def _get(self, refs: list[Any]) -> list[Any]:
        return get_results(refs)


def get_results(refs: list[Any]) -> list[Any]:
    """`ray.get`, with arm_ray's own errors as they were raised, and a plain one for lost actors.

    Raises:
        ArmRayError: As an actor raised it.
        WorkerError: An actor was lost, or failed unexpectedly.
    """
    try:
        return list(ray.get(refs))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ArmRayError):
            raise error.cause from None
        if isinstance(error.cause, OSError):
            raise WorkerError(
                "a layer shard cannot read or write a file",
                got=error.cause,
                hint="check the disk; run the same command again to go on",
            ) from error
        raise
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            "a layer shard was lost",
            got=" ".join(str(error).split())[:500],
            hint="if it ran out of memory, use more runtime.layer_shards or nodes; "
            "run the same command again to go on after the last complete iteration",
        ) from None


def shard_ranges(inputs: MergeInputs, num_shards: int) -> list[range]:
    """The layer groups of each shard, balanced by bytes."""
    sizes = [group.num_bytes for group in inputs.layout.groups]
    return balanced_partition(sizes, num_shards)

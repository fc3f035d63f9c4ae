"""The driver of a streaming merge: it submits work to the layer shards and holds no weights."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch, micro_batches, unique_samples
from arm_ray.calibration.stream import CalibrationStream
from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import SharedWeightFile
from arm_ray.config import MergeConfig
from arm_ray.errors import ShardLostError, TransportError
from arm_ray.events import IterationFinished, Warned
from arm_ray.merging.method import Method
from arm_ray.merging.similarity import cosines
from arm_ray.model.layout import LM_HEAD
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.merge.state_storage import StateStorage
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.scoring.state_scoring import StateScoring
from arm_ray.runtime.session.progress import MergeProgress
from arm_ray.runtime.shards.captures import forward_states
from arm_ray.runtime.shards.layer_shard import HEAD_RELAXATION, LARGEST_INFORMATION
from arm_ray.runtime.shards.placement import ShardGang
from arm_ray.runtime.shards.spec import GroupReport, ShardSpec, ShardUsage
from arm_ray.schedule import (
    IterationPlan,
    has_converged,
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


# Iteration and layer group -> what merging it gave.
Merged = dict[tuple[int, int], GroupReport]


class StreamingDriver:
    """Runs iterations of the schedule on layer shards that are placed already.

    Args:
        config: The configuration.
        inputs: The checked checkpoints.
        run: The run directory, open.
        gang: The layer shards' actors, placed.
        specs: What each of them was given, in the same order.
        method: How they are merged.
        stream: The calibration stream; None where no activations are needed.
        console: Where progress goes.
        scoring: Scores the states beside the merge; None where nothing is scored.
        storage: Where the states lie.
        merged: What earlier shards of this run have merged of iterations that are not finished;
            what these merge is added, and what is finished taken out.
        has_grown: Asked between two iterations: whether there is room for more shards by now.
    """

    def __init__(
        self,
        config: MergeConfig,
        inputs: MergeInputs,
        run: RunDirectory,
        gang: ShardGang,
        specs: Sequence[ShardSpec],
        method: Method,
        stream: CalibrationStream | None,
        console: Console,
        scoring: StateScoring | None,
        storage: StateStorage,
        merged: Merged,
        has_grown: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._inputs, self._run = config, inputs, run
        self._gang, self._specs, self._method = gang, specs, method
        self._actors = gang.actors
        self._stream, self._console = stream, console
        self._scoring, self._storage = scoring, storage
        self._merged, self._has_grown = merged, has_grown
        self._last_finished = 0.0
        self._is_exported = False

    def check_weights(self) -> int:
        """Have every shard look for NaN and infinity in its layers; returns bytes read."""
        return sum(self._get([actor.check_weights.remote() for actor in self._actors]))

    def iterate(self, stop_after: int | None = None) -> str:
        """Run from the first iteration that is not done to the end of the schedule.

        Iterations are submitted ahead of their turn (`runtime.lookahead`): an actor starts on the
        next one as soon as it has merged its own layers, while later layers still work on this
        one. Should an iteration turn out to be the last, those after it are dropped.

        Args:
            stop_after: Halt after this iteration, although the schedule goes on.

        Returns:
            Why it ended: `max_iterations`, `converged`, `patience` or `stop_after`; `regroup`
            where it goes on with more shards.
        """
        schedule, run = self._config.schedule, self._run
        done = run.finished.get(run.last_iteration)
        if done and self._ends_with(done):
            return self._reason(done)
        following = run.last_iteration + 1
        last = min(schedule.max_iterations, stop_after or schedule.max_iterations)
        if following > last:
            return "stop_after"
        progress = MergeProgress(self._console, following, last, len(self._inputs.layout.groups))
        with progress.shown():
            if self._method.needs_forward and self._in_phases:
                final = self._iterate_in_phases(following, last, progress)
            elif self._method.needs_forward:
                final = self._iterate_in_wavefront(following, last, progress)
            elif self._method.has_statistics:
                final = self._iterate_linear_by_iteration(following, last, progress)
            else:
                final = self._iterate_linear(following, last, progress)
        if final is None:
            return "stop_after" if run.last_iteration >= last else "regroup"
        return self._reason(final)

    def _iterate_in_wavefront(
        self, following: int, last: int, progress: MergeProgress
    ) -> states.StateManifest | None:
        """Run iterations as far as `last`; returns the one that ended the schedule, or None."""
        flights: deque[_InFlight] = deque()
        while flights or following <= last:
            while following <= last and len(flights) <= self._config.runtime.lookahead:
                flights.append(self._submit(following))
                following += 1
            try:
                manifest = self._finish(flights[0], progress)
            except (ShardLostError, TransportError):
                for flight in flights:
                    self._keep_merged(flight)
                raise
            flights.popleft()
            if self._ends_with(manifest):
                self._drop(flights, manifest.iteration)
                return manifest
            if manifest.iteration < last and self._has_grown():
                self._abandon(flights, manifest.iteration)
                return None
        return None

    def _keep_merged(self, flight: _InFlight) -> None:
        """Take note of the layer groups of an iteration that are merged, whatever became of it."""
        done, _ = ray.wait(flight.merges, num_returns=len(flight.merges), timeout=0)
        for ref in done:
            with contextlib.suppress(ray.exceptions.RayError):
                report: GroupReport | None = ray.get(ref)
                if report is not None:
                    self._merged[flight.plan.iteration, report.group] = report

    @property
    def _in_phases(self) -> bool:
        """Whether all layers must have been run before the first is merged."""
        method = self._config.method
        relaxes_embedding = (
            "aim" in method.steps
            and method.aim.tied == "relax"
            and LM_HEAD not in self._inputs.layout.shapes
        )
        shifts_by_all = "acm" in method.steps and method.acm.shift == "global"
        return self._method.has_statistics or relaxes_embedding or shifts_by_all

    def _iterate_in_phases(
        self, following: int, last: int, progress: MergeProgress
    ) -> states.StateManifest | None:
        """One iteration after the other: run all layers, measure all, merge all."""
        for iteration in range(following, last + 1):
            started = time.monotonic()
            plan = self._plan(iteration)
            batches, columns = self._micro_batches(plan)
            self._get(self._submit_forwards(plan, batches))
            summaries = self._get([a.summarise.remote(plan, columns) for a in self._actors])
            known = self._measure(plan, columns, _joined(summaries))
            merges = [
                actor.merge.remote(plan, group, columns, known)
                for actor, spec in zip(self._actors, self._specs, strict=True)
                for group in spec.groups
            ]
            manifest = self._finish(_InFlight(plan, [], merges, started), progress)
            if self._ends_with(manifest):
                return manifest
            if iteration < last and self._has_grown():
                break
        return None

    def _iterate_linear_by_iteration(
        self, following: int, last: int, progress: MergeProgress
    ) -> states.StateManifest | None:
        """Without forward passes, but with numbers over the whole model in each iteration."""
        for iteration in range(following, last + 1):
            started = time.monotonic()
            plan = self._plan(iteration)
            known = self._measure(plan, None, {})
            is_end = iteration == self._config.schedule.max_iterations
            columns, written = self._run_linear([plan], is_end, known)
            reports = [report for [report] in columns]
            manifest = _manifest(plan, reports)
            if iteration in written:
                self._publish(manifest)
            self._record(manifest, reports, time.monotonic() - started, progress)
            if self._ends_with(manifest):
                return manifest
            if iteration < last and self._has_grown():
                break
        return None

    def _measure(
        self, plan: IterationPlan, columns: NDArray[np.int64] | None, known: Mapping[str, object]
    ) -> Mapping[str, object]:
        """The operator's rounds over the whole model; sums are taken in the order of the layers."""
        for number in range(self._method.rounds(len(plan.contributors))):
            parts = self._get(
                [
                    actor.measure.remote(plan, group, columns, number, known)
                    for actor, spec in zip(self._actors, self._specs, strict=True)
                    for group in spec.groups
                ]
            )
            sums = {name: sum_in_order(part[name] for part in parts) for name in parts[0]}
            known = {**known, **self._method.conclude(number, sums, known)}
        return known

    def _iterate_linear(
        self, following: int, last: int, progress: MergeProgress
    ) -> states.StateManifest | None:
        """The same for an operator without activations: all iterations in one pass."""
        is_end = last == self._config.schedule.max_iterations
        while True:
            plans = [self._plan(t) for t in range(following, last + 1)]
            by_group, written = self._run_linear(plans, is_end)
            columns = list(zip(*by_group, strict=True))
            manifests = [_manifest(*pair) for pair in zip(plans, columns, strict=True)]
            ending = next((m for m in manifests if self._ends_with(m)), None)
            if ending is None or ending.iteration == last:
                break
            # It converged earlier: the iterations after that were for nothing. Once more.
            for extra in range(ending.iteration + 1, last + 1):
                self._storage.discard(extra)
            last, is_end = ending.iteration, True
        for manifest, column in zip(manifests, columns, strict=True):
            if manifest.iteration in written:
                self._publish(manifest)
            self._record(manifest, column, sum(report.seconds for report in column), progress)
        return ending

    def _run_linear(
        self,
        plans: Sequence[IterationPlan],
        is_end: bool,
        known: Mapping[str, object] | None = None,
    ) -> tuple[list[list[GroupReport]], set[int]]:
        """All groups through all iterations, and into the final model if that is the end.

        Returns:
            Of each group the reports, and the iterations whose states are written.
        """
        last = plans[-1].iteration
        config = self._config
        makes_adapter = config.output_format == "adapter"
        # An adapter is made from the last state, also where none is kept.
        keeps_last = config.keep_states == "last" or makes_adapter
        written = {last} if keeps_last else set[int]()
        if not is_end:
            needed = states_needed_after(config.schedule, len(config.candidates), last)
            written = {plan.iteration for plan in plans if plan.output in needed}
        if config.keep_states == "all":
            written = {plan.iteration for plan in plans}
        writes_model = is_end and not makes_adapter
        if not self._storage.is_shared:
            # The model is put together from what each node has.
            writes_model = False
            written.add(last)
        if self._scoring is not None:
            written |= {p.iteration for p in plans if self._scoring.is_due(p.iteration)} | {last}
            # Which state becomes the model is known when all are scored.
            writes_model = writes_model and not self._scoring.may_choose_earlier
        files = self._create_model_files() if writes_model else []
        refs = [
            actor.merge_linear.remote(plans, group, frozenset(written), files, known)
            for actor, spec in zip(self._actors, self._specs, strict=True)
            for group in spec.groups
        ]
        reports = self._get(refs)
        for file in files:
            file.sync()
        return reports, written

    def _create_model_files(self) -> list[SharedWeightFile]:
        shutil.rmtree(self._run.partial_model, ignore_errors=True)
        self._run.partial_model.mkdir()
        files = [
            SharedWeightFile(self._run.partial_model / file.name, file.specs)
            for file in self._model_files()
        ]
        for file in files:
            file.create()
        self._is_exported = True
        return files

    def _model_files(self) -> list[states.ExportFile]:
        return states.plan_export(
            self._inputs.layout.shapes,
            self._inputs.storage_dtypes,
            int(self._config.runtime.max_weight_file_gb * 1e9),
        )

    def _ends_with(self, manifest: states.StateManifest) -> bool:
        schedule = self._config.schedule
        if should_stop(schedule, manifest.iteration, manifest.task_vector_cosine):
            return True
        return self._scoring is not None and self._scoring.stops(manifest.iteration)

    def _drop(self, flights: Sequence[_InFlight], last: int) -> None:
        """Let go of speculative iterations, and remove what they have written."""
        if not flights:
            return
        self._abandon(flights, last)
        for flight in flights:
            self._storage.discard(flight.plan.iteration)

    def _abandon(self, flights: Sequence[_InFlight], last: int) -> None:
        """Do nothing more for iterations after `last`, and wait until that is so."""
        self._get(
            [a.abandon.options(concurrency_group="control").remote(last) for a in self._actors]
        )
        for flight in flights:
            # Only that they are over matters, not what they return.
            ray.wait(flight.merges, num_returns=len(flight.merges))
            self._keep_merged(flight)

    def export(self, iteration: int) -> int:
        """Complete the final model in its unfinished directory; returns bytes of weights.

        Each weight file is written by one of the shards from the state, unless a linear merge has
        written it already.

        Args:
            iteration: Whose state becomes the model.
        """
        partial, files = self._run.partial_model, self._model_files()
        if not self._is_exported:
            self._storage.write_model(files, iteration)
        states.write_export_index(partial, files)
        dtype = self._inputs.storage_dtypes[self._inputs.layout.groups[0].tensors[-1]]
        states.write_companions(partial, self._inputs.model_config(dtype), self._inputs.tokenizer)
        return sum(file.num_bytes for file in files)

    def peak_bytes(self) -> tuple[int, ...]:
        """Largest resident memory of each shard so far; empty where one is lost by now."""
        try:
            return tuple(self._get([actor.peak_bytes.remote() for actor in self._actors]))
        except ShardLostError:
            return ()

    def _reason(self, manifest: states.StateManifest) -> str:
        if has_converged(self._config.schedule, manifest.task_vector_cosine):
            return "converged"
        is_last = manifest.iteration >= self._config.schedule.max_iterations
        return "max_iterations" if is_last else "patience"

    def _plan(self, iteration: int) -> IterationPlan:
        return plan_iteration(self._config.schedule, len(self._config.candidates), iteration)

    def _micro_batches(self, plan: IterationPlan) -> tuple[list[MicroBatch], NDArray[np.int64]]:
        """Micro-batches of the different samples, and each sample's position among these."""
        if self._stream is None:
            return [], np.zeros(0, dtype=np.int64)
        different, columns = unique_samples(self._stream.batch(plan.draw))
        micro = micro_batches(
            different,
            max_tokens=self._config.runtime.micro_batch_tokens,
            max_samples=_MAX_MICRO_BATCH_SAMPLES,
        )
        return micro, columns

    def _submit(self, iteration: int) -> _InFlight:
        """Submit an iteration, stage by stage; an actor takes its calls in this order.

        What shards that are gone have merged of it is taken over, and states are run only as far as
        the last layer group that is still to be merged.
        """
        plan = self._plan(iteration)
        batches, columns = self._micro_batches(plan)
        flight = _InFlight(plan, [], [], time.monotonic())
        groups = range(len(self._inputs.layout.groups))
        kept = {
            group: self._merged[iteration, group]
            for group in groups
            if (iteration, group) in self._merged and self._storage.has_group(iteration, group)
        }
        end = max((group for group in groups if group not in kept), default=-1) + 1
        for actor, chunk, forwards in self._chunks(plan, batches, end):
            flight.forwards += forwards
            flight.merges += [
                actor.adopt.remote(plan, group, kept[group])
                if group in kept
                else actor.merge.remote(plan, group, columns)
                for group in chunk
            ]
        return flight

    def _submit_forwards(self, plan: IterationPlan, batches: Sequence[MicroBatch]) -> list[Any]:
        """Submit the forward passes alone; returns what ends with them."""
        refs: list[Any] = []
        for actor, chunk, forwards in self._chunks(plan, batches):
            refs += [*forwards, actor.release_forward.remote(chunk)]
        return refs

    def _chunks(
        self, plan: IterationPlan, batches: Sequence[MicroBatch], end: int | None = None
    ) -> Iterator[tuple[Any, range, list[Any]]]:
        """Submit forward calls by chunk: the actor, its layers, and those that send nothing.

        Args:
            plan: The iteration.
            batches: Its micro-batches.
            end: No forward pass is needed from this layer group on; None: all are.
        """
        if end is None:
            end = len(self._inputs.layout.groups)
        num_samples = sum(len(batch.lengths) for batch in batches)
        micro = [ray.put(batch) for batch in batches]
        hidden: dict[tuple[int, str], Any] = {}
        run_states = forward_states(self._config.method, plan)
        for actor, spec in zip(self._actors, self._specs, strict=True):
            is_last_shard = spec is self._specs[-1]
            for chunk in spec.chunks:
                if chunk[0] >= end:
                    yield actor, chunk, []
                    continue
                sends = chunk == spec.chunks[-1] and not is_last_shard and chunk[-1] + 1 < end
                forward = actor.forward
                if sends and self._gang.transport != "object_store":
                    forward = forward.options(tensor_transport=self._gang.transport)
                ending: list[Any] = []
                for index, batch in enumerate(micro):
                    for state in run_states:
                        # Later chunks of a shard find the hidden states where the first left them.
                        before = hidden.pop((index, state), None)
                        ref = forward.remote(plan, chunk, num_samples, state, index, batch, before)
                        if sends:
                            hidden[index, state] = ref
                        else:
                            ending.append(ref)
                yield actor, chunk, ending

    def _finish(self, flight: _InFlight, progress: MergeProgress) -> states.StateManifest:
        """Wait for an iteration, publish its state and write it down."""
        self._watch(flight, progress)
        reports: list[GroupReport] = self._get(flight.merges)
        manifest = _manifest(flight.plan, reports)
        self._publish(manifest)
        for group in range(len(self._inputs.layout.groups)):
            self._merged.pop((manifest.iteration, group), None)
        # Iterations overlap: what counts is the time since the one before was done.
        now = time.monotonic()
        seconds = now - max(flight.started, self._last_finished)
        self._last_finished = now
        self._record(manifest, reports, seconds, progress)
        return manifest

    def _watch(self, flight: _InFlight, progress: MergeProgress) -> None:
        """Show progress until the iteration's groups are merged; an error surfaces at once."""
        layout = self._inputs.layout
        by_ref = dict(zip(flight.merges, layout.groups, strict=True))
        pending = [*flight.forwards, *flight.merges]
        layers = 0
        while pending:
            done, pending = ray.wait(pending, timeout=_POLL_S)
            self._get(done)
            for ref in done:
                if ref in by_ref:
                    layers += by_ref[ref].end_layer - by_ref[ref].first_layer
                    progress.advance(flight.plan.iteration, layers, layout.num_layers)

    def _publish(self, manifest: states.StateManifest) -> None:
        self._storage.wrote(manifest.iteration)
        if not self._storage.is_shared and not self._is_wanted_whole(manifest.iteration):
            # Its weights stay on the nodes.
            states.publish_manifest(
                states.state_directory(self._run.path, manifest.iteration), manifest
            )
            return
        self._publish_whole(manifest)

    def _is_wanted_whole(self, iteration: int) -> bool:
        """Whether a state is wanted in the run directory, not only on the nodes."""
        if self._config.keep_states == "all" or self._config.output_format == "adapter":
            return True
        if self._run.url is not None:
            return True  # each state is uploaded from there
        return self._scoring is not None and self._scoring.is_due(iteration)

    def bring_home(self, iterations: Iterable[int]) -> None:
        """Have whole states in the run directory, so that others can go on from there."""
        for iteration in iterations:
            if not self._storage.is_shared and iteration in self._run.finished:
                self._publish_whole(self._run.finished[iteration])

    def _publish_whole(self, manifest: states.StateManifest) -> None:
        layout = self._inputs.layout
        self._storage.gather(manifest.iteration)
        states.publish_state(
            states.state_directory(self._run.path, manifest.iteration),
            manifest,
            [group.tensors for group in layout.groups],
            states.total_bytes(layout.shapes, torch.float32.itemsize),
            self._inputs.model_config(torch.float32),
            self._inputs.tokenizer,
        )

    def _record(
        self,
        manifest: states.StateManifest,
        reports: Sequence[GroupReport],
        seconds: float,
        progress: MergeProgress,
    ) -> None:
        self._run.finished[manifest.iteration] = manifest
        held: set[int] = set()
        if self._scoring is not None:
            self._scoring.state_finished(manifest.iteration)
            held = self._scoring.held()
        self._run.prune(len(self._config.candidates), manifest.iteration, held)
        self._storage.forget_pruned()
        progress.finish_iteration(
            manifest.iteration,
            manifest.regime,
            manifest.weight_cosine,
            manifest.task_vector_cosine,
            seconds,
        )
        deficient = tuple(text for report in reports for text in report.rank_deficient)
        if deficient:
            self._run.events.write(
                Warned(
                    f"iteration {manifest.iteration}: the activation shift of {len(deficient)} "
                    f"tensor(s) is rank-deficient (equal samples, or frozen layers); rotated by "
                    f"fewer directions: {', '.join(deficient)}"
                )
            )
        # Not behind the iterations that are submitted already.
        control = {"concurrency_group": "control"}
        usage: list[ShardUsage] = self._get(
            [a.take_usage.options(**control).remote(manifest.iteration) for a in self._actors]
        )
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
                round(sum(shard.forward_seconds for shard in usage), 3),
                round(sum(report.seconds for report in reports), 3),
                sum(report.num_bytes for report in reports),
                tuple(round(u.forward_seconds + u.merge_seconds, 3) for u in usage),
                sum(shard.sent_bytes for shard in usage),
                sum(usage[i].sent_bytes for i in self._gang.crossings),
                sum(shard.fetched_bytes for shard in usage),
            )
        )

    def _get(self, refs: list[Any]) -> list[Any]:
        return get_results(refs)


def _joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """What all shards together know from the forward passes."""
    relaxations = [s[HEAD_RELAXATION] for s in summaries if s[HEAD_RELAXATION] is not None]
    largest: dict[str, float] = {}
    for summary in summaries:
        for state, value in summary[LARGEST_INFORMATION].items():
            largest[state] = max(largest.get(state, 0.0), value)
    return {
        HEAD_RELAXATION: relaxations[0] if relaxations else None,
        LARGEST_INFORMATION: largest or None,
    }


def sum_in_order(parts: Iterable[Tensor]) -> Tensor:
    """A sum whose bits do not depend on who computed the parts."""
    first, *others = parts
    total = first.clone()
    for part in others:
        total += part
    return total


def _manifest(plan: IterationPlan, reports: Sequence[GroupReport]) -> states.StateManifest:
    parts = [part for report in reports for part in report.similarity]
    return states.StateManifest(
        plan.iteration, plan.regime, plan.reference, plan.contributors, *cosines(parts)
    )

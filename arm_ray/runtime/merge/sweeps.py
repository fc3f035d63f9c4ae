"""The order in which the iterations of a schedule go through the layers.

| sweep | forward passes | facts of the whole model |
|---|---|---|
| `stepped.SteppedSweep` | of the samples, and of states that are tried | as the operator needs |
| `WavefrontSweep` | yes | none: iterations overlap |
| `PhasesSweep` | yes | run all layers, measure all, merge all |
| `LinearSweep` | no | none: each piece of a tensor goes through all iterations |
| `LinearByIterationSweep` | no | measure all, merge all |
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arm_ray.checkpoints.states import StateManifest
from arm_ray.errors import ArmRayError, ShardLostError, TransportError
from arm_ray.events import IterationFinished, Warned
from arm_ray.merging.similarity import cosines
from arm_ray.runtime.cluster.calls import get_results, wait_for
from arm_ray.runtime.merge.dispatch import Dispatcher, Flight, PartialMerges
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.promise import Promise
from arm_ray.runtime.merge.publisher import Publisher
from arm_ray.runtime.merge.state_storage import StateStorage
from arm_ray.runtime.session.progress import MergeProgress
from arm_ray.runtime.shards.facts import NOTHING_KNOWN, ModelFacts
from arm_ray.runtime.shards.spec import GroupReport
from arm_ray.schedule import IterationPlan, states_needed_after

_POLL_S = 0.5


@dataclass(frozen=True)
class SweepParts:
    """What a sweep works with.

    Attributes:
        job: The merge.
        dispatcher: Submits calls to the shards.
        storage: Where the states lie.
        publisher: Publishes them.
        promise: Compares them with the checkpoints by their losses; None: nothing does.
        partial: What is merged of iterations that are not finished.
        has_grown: Asked between two iterations: whether there is room for more shards by now.
    """

    job: MergeJob
    dispatcher: Dispatcher
    storage: StateStorage
    publisher: Publisher
    promise: Promise | None
    partial: PartialMerges
    has_grown: Callable[[], bool] = lambda: False


class Sweep(ABC):
    """Runs iterations on one set of shards.

    Args:
        parts: What it works with.
    """

    def __init__(self, parts: SweepParts) -> None:
        self._parts = parts
        self._job, self._dispatcher = parts.job, parts.dispatcher
        self._storage, self._publisher = parts.storage, parts.publisher
        layout, first = parts.job.inputs.layout, parts.job.run.last_iteration + 1
        console = parts.job.reporter.console
        self._progress = MergeProgress(console, first, parts.job.last, len(layout.groups))
        self._last_finished = 0.0
        # Why it ended before the schedule did, where no state says so.
        self._reason: str | None = None

    def run(self) -> str:
        """Run from the first iteration that is not finished to the end of the schedule.

        Returns:
            Why it ended: `max_iterations`, `converged`, `no_gain`, `patience` or `stop_after`;
            `regroup` where it goes on with more shards.
        """
        job, run = self._job, self._job.run
        done = run.finished.get(run.last_iteration)
        if done and job.ends_with(done):
            return job.reason(done)
        if run.last_iteration >= job.last:
            return "stop_after"
        self._publisher.goes_on(run.last_iteration)
        with self._progress.shown():
            final = self._run(run.last_iteration + 1, job.last)
        if self._reason is not None:
            return self._reason
        if final is not None:
            return job.reason(final)
        return "stop_after" if run.last_iteration >= job.last else "regroup"

    @abstractmethod
    def _run(self, first: int, last: int) -> StateManifest | None:
        """Run iterations; returns the one that ended the schedule, or None."""

    def _finish(self, flight: Flight) -> StateManifest:
        """Wait for an iteration, have its state published and write it down."""
        self._watch(flight)
        reports = [report for report in get_results(flight.merges) if report is not None]
        assert len(reports) == self._job.num_groups, "an abandoned iteration is not finished"
        manifest = _manifest(flight.plan, reports)
        self._publisher.made(manifest)
        self._parts.partial.forget(manifest.iteration)
        if self._parts.promise is not None:
            losses = self._dispatcher.losses.of_states(flight.plan)
            self._parts.promise.state_finished(manifest.iteration, losses)
        # Iterations overlap: what counts is the time since the one before was done.
        now = time.monotonic()
        seconds = now - max(flight.started, self._last_finished)
        self._last_finished = now
        self._record(manifest, reports, seconds)
        return manifest

    def _ends_with(self, manifest: StateManifest) -> bool:
        """Whether the merge ends with a state; else the shards let go of what only that needed."""
        if self._job.ends_with(manifest):
            return True
        self._publisher.goes_on(manifest.iteration)
        return False

    def _watch(self, flight: Flight) -> None:
        """Show progress until the iteration's groups are merged; an error surfaces at once."""
        layout = self._job.inputs.layout
        by_ref = dict(zip(flight.merges, layout.groups, strict=True))
        pending = [*flight.forwards, *flight.merges]
        layers = 0
        while pending:
            done, pending = wait_for(pending, _POLL_S)
            get_results(done)
            self._publisher.publish_written()
            for ref in done:
                if ref in by_ref:
                    layers += by_ref[ref].end_layer - by_ref[ref].first_layer
                    self._progress.advance(flight.plan.iteration, layers, layout.num_layers)

    def _record(
        self, manifest: StateManifest, reports: Sequence[GroupReport], seconds: float
    ) -> None:
        self._publisher.finished(manifest)
        self._progress.finish_iteration(
            manifest.iteration,
            manifest.regime,
            manifest.weight_cosine,
            manifest.task_vector_cosine,
            seconds,
        )
        deficient = tuple(text for report in reports for text in report.rank_deficient)
        if deficient:
            # For whoever reads the events: a line on the screen for each iteration is too much.
            self._job.reporter.write(
                Warned(
                    f"iteration {manifest.iteration}: the activation shift of {len(deficient)} "
                    f"tensor(s) is rank-deficient (equal samples, or frozen layers); rotated by "
                    f"fewer directions: {', '.join(deficient)}"
                )
            )
        usage = self._dispatcher.take_usage(manifest.iteration)
        self._job.reporter.write(
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
                self._dispatcher.network_bytes(usage),
                sum(shard.fetched_bytes for shard in usage),
                tuple(module for report in reports for module in report.modules),
                tuple(shard.spans for shard in usage),
            )
        )


class WavefrontSweep(Sweep):
    """Iterations are submitted ahead of their turn (`runtime.lookahead`).

    A shard starts on the next one as soon as it has merged its own layers, while later layers still
    work on this one. Should an iteration turn out to be the last, those after it are dropped.
    """

    def _run(self, first: int, last: int) -> StateManifest | None:
        flights: deque[Flight] = deque()
        following = first
        ahead = self._job.config.runtime.lookahead
        if self._parts.promise is not None:
            # The losses of a state would come after the merges of what is submitted ahead, which
            # wait to hear whether this state is the last: it needs its losses first.
            ahead = 0
        while flights or following <= last:
            while following <= last and len(flights) <= ahead:
                flights.append(self._submit(following))
                following += 1
            try:
                manifest = self._finish(flights[0])
            except (ShardLostError, TransportError):
                for flight in flights:
                    self._keep_merged(flight)
                raise
            flights.popleft()
            if self._ends_with(manifest):
                self._abandon(flights, manifest.iteration)
                for flight in flights:
                    self._storage.discard(flight.plan.iteration)
                return manifest
            if manifest.iteration < last and self._parts.has_grown():
                self._abandon(flights, manifest.iteration)
                return None
        return None

    def _submit(self, iteration: int) -> Flight:
        merged = self._parts.partial.of(iteration)
        kept = {g: report for g, report in merged.items() if self._storage.has_group(iteration, g)}
        return self._dispatcher.submit(self._job.plan(iteration), kept)

    def _abandon(self, flights: Sequence[Flight], last: int) -> None:
        """Do nothing more for iterations after `last`, and wait until that is so."""
        if not flights:
            return
        self._dispatcher.abandon(last)
        for flight in flights:
            # Only that they are over matters, not what they return.
            wait_for(flight.merges, all_of_them=True)
            self._keep_merged(flight)
        # Nothing may appear in a state's directory once it is removed.
        self._storage.quiet()

    def _keep_merged(self, flight: Flight) -> None:
        """Take note of the layer groups of an iteration that are merged, whatever became of it."""
        done, _ = wait_for(flight.merges, 0.0, all_of_them=True)
        for ref in done:
            with contextlib.suppress(ArmRayError, OSError):
                [report] = get_results([ref])
                if report is not None:
                    self._parts.partial.add(flight.plan.iteration, report)


class PhasesSweep(Sweep):
    """One iteration after the other: run all layers, measure all, merge all."""

    def _run(self, first: int, last: int) -> StateManifest | None:
        for iteration in range(first, last + 1):
            flight = self._dispatcher.submit_in_phases(self._job.plan(iteration))
            manifest = self._finish(flight)
            if self._ends_with(manifest):
                return manifest
            if iteration < last and self._parts.has_grown():
                break
        return None


class LinearSweep(Sweep):
    """Without forward passes: all iterations in one pass over the weights."""

    def _run(self, first: int, last: int) -> StateManifest | None:
        is_end = last == self._job.config.schedule.max_iterations
        while True:
            plans = [self._job.plan(t) for t in range(first, last + 1)]
            by_group, written = self._merge(plans, is_end, NOTHING_KNOWN)
            columns = list(zip(*by_group, strict=True))
            manifests = [_manifest(*pair) for pair in zip(plans, columns, strict=True)]
            ending = next((m for m in manifests if self._job.ends_with(m)), None)
            if ending is None or ending.iteration == last:
                break
            # It converged earlier: the iterations after that were for nothing. Once more.
            for extra in range(ending.iteration + 1, last + 1):
                self._storage.discard(extra)
            last, is_end = ending.iteration, True
        for manifest, column in zip(manifests, columns, strict=True):
            if manifest.iteration in written:
                self._publisher.publish(manifest)
            self._record(manifest, column, sum(report.seconds for report in column))
        return ending

    def _merge(
        self, plans: Sequence[IterationPlan], is_end: bool, facts: ModelFacts
    ) -> tuple[list[list[GroupReport]], frozenset[int]]:
        """All groups through some iterations, and into the final model if that is the end.

        Returns:
            Of each group the reports, and the iterations whose states are written.
        """
        written, writes_model = states_to_write(
            self._job, plans, is_end=is_end, is_shared=self._storage.is_shared
        )
        files = self._publisher.create_model_files() if writes_model else []
        by_group = self._dispatcher.merge_linear(plans, written, files, facts)
        for file in files:
            file.sync()
        return by_group, written


class LinearByIterationSweep(LinearSweep):
    """Without forward passes, but with numbers over the whole model in each iteration."""

    def _run(self, first: int, last: int) -> StateManifest | None:
        for iteration in range(first, last + 1):
            started, plan = time.monotonic(), self._job.plan(iteration)
            facts = self._dispatcher.measured(plan, None, NOTHING_KNOWN)
            is_end = iteration == self._job.config.schedule.max_iterations
            by_group, written = self._merge([plan], is_end, facts)
            reports = [report for [report] in by_group]
            manifest = _manifest(plan, reports)
            if iteration in written:
                self._publisher.publish(manifest)
            self._record(manifest, reports, time.monotonic() - started)
            if self._job.ends_with(manifest):
                return manifest
            if iteration < last and self._parts.has_grown():
                break
        return None


def states_to_write(
    job: MergeJob, plans: Sequence[IterationPlan], *, is_end: bool, is_shared: bool
) -> tuple[frozenset[int], bool]:
    """What a linear pass writes.

    Args:
        job: The merge.
        plans: The iterations of the pass.
        is_end: Whether the last of them ends the schedule.
        is_shared: Whether all shards write into the run directory.

    Returns:
        The iterations whose states are written, and whether the final model is.
    """
    config, scoring, last = job.config, job.scoring, plans[-1].iteration
    makes_adapter = config.output_format == "adapter"
    if config.keep_states == "all":
        written = {plan.iteration for plan in plans}
    elif is_end:
        # An adapter is made from the last state, also where none is kept.
        written = {last} if config.keep_states == "last" or makes_adapter else set()
    else:
        needed = states_needed_after(config.schedule, job.num_candidates, last)
        written = {plan.iteration for plan in plans if plan.output in needed}
    writes_model = is_end and not makes_adapter
    if not is_shared:
        # The model is put together from what each node has.
        writes_model = False
        written.add(last)
    if scoring is not None:
        written |= {p.iteration for p in plans if scoring.is_due(p.iteration)} | {last}
        # Which state becomes the model is known when all are scored.
        writes_model = writes_model and not scoring.may_choose_earlier
    return frozenset(written), writes_model


def _manifest(plan: IterationPlan, reports: Sequence[GroupReport]) -> StateManifest:
    parts = [part for report in reports for part in report.similarity]
    step = plan.step.coefficients(len(plan.contributors), plan.divisor) if plan.step else ()
    return StateManifest(
        plan.iteration, plan.regime, plan.reference, plan.contributors, *cosines(parts), step
    )

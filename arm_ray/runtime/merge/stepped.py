"""Iterations whose step is chosen by losses (`schedule.step`), one after the other.

An iteration runs its own states through all layers, as `PhasesSweep` does; then states with steps
of several lengths, side by side, round by round, as `arm_ray.steps` asks for; then it merges with
the step that was chosen. Nothing of a state that is only tried is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from arm_ray.checkpoints.states import StateManifest
from arm_ray.evaluation.losses import SampleLosses
from arm_ray.events import StepChosen, StepTried
from arm_ray.runtime.merge.dispatch import Dispatcher, Flight
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.samples import Draw, draw_of
from arm_ray.runtime.merge.sweeps import (
    LinearByIterationSweep,
    LinearSweep,
    PhasesSweep,
    Sweep,
    SweepParts,
    WavefrontSweep,
)
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.shards.facts import ModelFacts
from arm_ray.runtime.shards.losses import Trial
from arm_ray.schedule import IterationPlan, Step
from arm_ray.steps import NO_STEP, choose, search


class SteppedSweep(Sweep):
    """One iteration after the other, each with a step that its losses choose."""

    def _run(self, first: int, last: int) -> StateManifest | None:
        for iteration in range(first, last + 1):
            flight = self._begin(self._job.plan(iteration))
            if flight is None:
                self._reason = "no_gain"
                return None
            manifest = self._finish(flight)
            if self._job.ends_with(manifest):
                return manifest
            if iteration < last and self._parts.has_grown():
                break
        return None

    def _begin(self, plan: IterationPlan) -> Flight | None:
        """Run an iteration's states, choose its step, and submit the merges.

        Returns:
            None where no step is better than none.
        """
        started = time.monotonic()
        draw = self._dispatcher.draw(plan)
        refs = self._dispatcher.submit_forward(plan, draw)
        facts = self._dispatcher.facts_of_all(plan, draw, refs)
        tried = _Tried(self._job, self._dispatcher, plan, draw.columns, facts)
        with activity(f"iteration {plan.iteration}: choosing the step"):
            step = tried.choose()
        if step is None:
            return None
        chosen = replace(plan, step=step)
        return self._dispatcher.submit_merges(chosen, draw.columns, tried.facts(step), started)


@dataclass
class _Tried:
    """The steps of one iteration that are tried."""

    job: MergeJob
    dispatcher: Dispatcher
    plan: IterationPlan
    columns: NDArray[np.int64]
    shared: ModelFacts

    def __post_init__(self) -> None:
        self._facts: dict[Step, ModelFacts] = {}
        self._count = 0

    def facts(self, step: Step) -> ModelFacts:
        """What is known of the whole model for a step."""
        if step not in self._facts:
            plan = replace(self.plan, step=step)
            self._facts[step] = self.dispatcher.measured(plan, self.columns, self.shared)
        return self._facts[step]

    def choose(self) -> Step | None:
        """The step that is taken; None where none is, and there is a state to end with."""
        started, job = time.monotonic(), self.job
        lengths, check = (
            draw_of(batch, job.config.runtime.micro_batch_tokens)
            for batch in job.lengths(self.plan)
        )
        plan, start = self.plan, job.method.settings.coefficient
        found: list[StepTried] = []
        trials = search(job.config.schedule, start, len(plan.contributors), plan.divisor)
        wanted = next(trials)
        while True:
            losses = self._losses(wanted, lengths)
            found += [self._event(step, each) for step, each in zip(wanted, losses, strict=True)]
            try:
                wanted = trials.send(losses)
            except StopIteration as end:
                ladder: tuple[Step, ...] = end.value
                break
        subjects: list[Step | str] = [*ladder]
        if plan.previous != plan.reference:
            subjects.append(plan.previous)
        checked = self._losses(subjects, check)
        chosen = choose(ladder, checked[: len(ladder)])
        before = checked[-1]
        gain = chosen.losses.minus(before)
        is_better = chosen.losses.is_lower_than(before)
        step: Step | None = chosen.step
        if not is_better:
            # The first state is made all the same: with the most cautious step there was.
            is_first = plan.iteration == 1
            step = (
                next((s for s in reversed(ladder) if not s.is_none), Step(start))
                if is_first
                else None
            )
        job.reporter.write(
            StepChosen(
                plan.iteration,
                job.config.schedule.step,
                () if step is None else self._coefficients(step),
                tuple(found),
                tuple(
                    self._event(subject, each)
                    for subject, each in zip(subjects, checked, strict=True)
                ),
                -gain.difference,
                -gain.high,
                -gain.low,
                lengths.num_samples,
                check.num_samples,
                round(time.monotonic() - started, 3),
            )
        )
        return step

    def _losses(self, subjects: Sequence[Step | str], samples: Draw) -> list[SampleLosses]:
        run: list[Trial | str] = [self._subject(subject) for subject in subjects]
        return self.dispatcher.losses.run(self.plan, run, samples, self.columns)

    def _subject(self, subject: Step | str) -> Trial | str:
        if isinstance(subject, str):
            return subject
        if subject.is_none:
            return self.plan.reference
        self._count += 1
        return Trial(f"trial-{self._count}", subject, self.facts(subject))

    def _event(self, subject: Step | str, losses: SampleLosses) -> StepTried:
        known = self._coefficients(subject if isinstance(subject, Step) else NO_STEP)
        found = losses.estimate()
        return StepTried(
            subject if isinstance(subject, str) else None, known, found.mean, found.low, found.high
        )

    def _coefficients(self, step: Step) -> tuple[tuple[float, ...], ...]:
        plan = self.plan
        return tuple(
            tuple(round(c, 6) for c in block)
            for block in step.coefficients(len(plan.contributors), plan.divisor)
        )


def sweep_for(parts: SweepParts) -> Sweep:
    """The sweep that a method needs; see `sweeps`."""
    job = parts.job
    if job.method.tries_steps:
        return SteppedSweep(parts)
    if job.method.needs_activations:
        return PhasesSweep(parts) if job.needs_all_layers else WavefrontSweep(parts)
    if job.method.takes_losses:
        return PhasesSweep(parts)
    return LinearByIterationSweep(parts) if job.method.has_statistics else LinearSweep(parts)

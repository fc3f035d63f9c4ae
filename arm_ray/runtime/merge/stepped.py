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
from arm_ray.evaluation.statistics import Comparison
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
            if self._ends_with(manifest):
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
        started, plan, job = time.monotonic(), self.plan, self.job
        tokens = job.config.runtime.micro_batch_tokens
        lengths, check = (draw_of(batch, tokens) for batch in job.lengths(plan))
        ladder, tried = self._search(lengths)
        subjects: list[Step | str] = [*ladder]
        if plan.previous != plan.reference:
            subjects.append(plan.previous)
        losses = self._losses(subjects, check)
        chosen, before = choose(ladder, losses[: len(ladder)]), losses[-1]
        gain = chosen.losses.minus(before)
        step: Step | None = chosen.step
        if not chosen.losses.is_lower_than(before):
            # The first state is made all the same: with the most cautious step there was.
            cautious = (each for each in reversed(ladder) if not each.is_none)
            start = Step(job.method.settings.coefficient)
            step = next(cautious, start) if plan.iteration == 1 else None
        job.reporter.write(
            StepChosen(
                plan.iteration,
                job.config.schedule.step,
                () if step is None else self._coefficients(step),
                tried,
                self._events(subjects, losses),
                -gain.difference,
                -gain.high,
                -gain.low,
                lengths.num_samples,
                check.num_samples,
                round(time.monotonic() - started, 3),
            )
        )
        job.reporter.say(self._sentence(step, chosen.losses, gain, len(tried) + len(subjects)))
        return step

    def _search(self, samples: Draw) -> tuple[tuple[Step, ...], tuple[StepTried, ...]]:
        """Run the search; the ladder of steps that it returns, and all that was tried."""
        schedule, start = self.job.config.schedule, self.job.method.settings.coefficient
        trials = search(schedule, start, len(self.plan.contributors), self.plan.divisor)
        wanted, tried = next(trials), list[StepTried]()
        while True:
            losses = self._losses(wanted, samples)
            tried += self._events(wanted, losses)
            try:
                wanted = trials.send(losses)
            except StopIteration as end:
                return end.value, tuple(tried)

    def _sentence(
        self, step: Step | None, losses: SampleLosses, gain: Comparison, states: int
    ) -> str:
        """What was chosen, for people."""
        head = f"iteration {self.plan.iteration}  {self.job.config.schedule.step}: "
        after = f"{states} losses, {gain.num_problems} samples to check"
        if step is None:
            return f"{head}no step makes the loss smaller, beyond its error ({after})"
        blocks = (", ".join(f"{c:.3g}" for c in block) for block in self._coefficients(step))
        return (
            f"{head}{' | '.join(blocks)}  loss {losses.mean:.4f}, by {-gain.difference:.4f} "
            f"smaller than before ({-gain.high:.4f} to {-gain.low:.4f}; {after})"
        )

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

    def _events(
        self, subjects: Sequence[Step | str], losses: Sequence[SampleLosses]
    ) -> tuple[StepTried, ...]:
        found = []
        for subject, each in zip(subjects, losses, strict=True):
            known = self._coefficients(subject if isinstance(subject, Step) else NO_STEP)
            name = subject if isinstance(subject, str) else None
            interval = each.estimate()
            found.append(StepTried(name, known, interval.mean, interval.low, interval.high))
        return tuple(found)

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

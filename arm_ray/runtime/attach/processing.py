"""Takes one arrival from its checkpoints to a published model, or gives it up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.config import MergeConfig
from arm_ray.errors import (
    ArmRayError,
    CheckpointError,
    EvaluationError,
    MismatchError,
    NumericalError,
    PlacementError,
    RunDirectoryError,
    TransportError,
    WorkerError,
)
from arm_ray.evaluation.engine import ModelSource
from arm_ray.following.arrivals import continued
from arm_ray.following.config import AttachConfig, merge_config
from arm_ray.following.events import ArrivalFailed
from arm_ray.following.journal import Arrival, Journal, Outcome
from arm_ray.runtime.attach.arrival_scoring import ArrivalScoring
from arm_ray.runtime.attach.held import HeldCheckpoints
from arm_ray.runtime.attach.kept_shards import KeptShards
from arm_ray.runtime.attach.publication import ArrivalPublisher
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.output.precision import record, recorded
from arm_ray.runtime.scoring.state_scoring import checkpoint_subject
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.schedule import BASE, candidate_name

_ATTEMPTS = 3
_PAUSE_S = 5.0


@dataclass
class ArrivalProcessor:
    """Processes arrivals, one after another.

    Attributes:
        config: The configuration.
        journal: Of arrivals.
        held: The checkpoints.
        publisher: Publishes what is merged.
        reporter: Told what is done.
        scoring: Scores what is merged; None: nothing does, or not yet.
        shards: The layer shards, where they stay between merges; None: each merge starts its own.
    """

    config: AttachConfig
    journal: Journal
    held: HeldCheckpoints
    publisher: ArrivalPublisher
    reporter: Reporter
    scoring: ArrivalScoring | None = None
    shards: KeptShards | None = None
    _is_on_cpu: bool = False
    _was_scored: bool = False
    _said_no_room: set[int] = field(default_factory=set)

    def process(self, arrival: Arrival) -> None:
        """Merge an arrival, score it and publish it, or give it up."""
        started, attempt = time.monotonic(), 0
        if not self.held.by_name.keys() >= set(arrival.members):
            self._give_up(arrival, "a checkpoint that it met was written again", "repeated")
            return
        while True:
            attempt += 1
            try:
                self._merge_and_publish(arrival, started)
                break
            except PlacementError as error:
                if self._goes_elsewhere(arrival, error):
                    attempt = 0
                elif attempt == _ATTEMPTS:
                    raise
            except (
                WorkerError,
                TransportError,
                RunDirectoryError,
                ray.exceptions.RayError,
            ) as error:
                # The run directory stays: the next attempt goes on in it.
                if attempt == _ATTEMPTS:
                    raise
                self.reporter.say(f"step {arrival.step}: {error}; trying again")
                time.sleep(_PAUSE_S)
            except (CheckpointError, NumericalError) as error:
                fits_none = isinstance(error, MismatchError) and not self.journal.published
                if error.subject == BASE or fits_none:
                    # It is the base, or no checkpoint of this run will fit.
                    self.journal.end(outcome="failed", problem=str(error))
                    raise
                self._leave_out(arrival, error)
                return
        self.prune()

    def _goes_elsewhere(self, arrival: Arrival, error: PlacementError) -> bool:
        """Whether a merge that has no room waits on, or goes to CPUs; says which."""
        if self.config.sharing.when_full == "wait":
            if arrival.step not in self._said_no_room:
                self._said_no_room.add(arrival.step)
                self.reporter.say(
                    f"step {arrival.step}: no room for the merge; waiting for it: {error}"
                )
            time.sleep(_PAUSE_S)
            return True
        if self._is_on_cpu or not self.config.sharing.use_gpus:
            return False
        self.reporter.say(f"no room for the merge as configured: {error}")
        self.reporter.say("merges go to CPUs")
        self._is_on_cpu = True
        # Nothing is done there yet, and the device is part of what it would go on with.
        shutil.rmtree(self.config.work / "merges" / arrival.name, ignore_errors=True)
        return True

    def _leave_out(self, arrival: Arrival, error: ArmRayError) -> None:
        """Give an arrival up, and what was wrong with it: the new checkpoint, or another member."""
        step = arrival.step
        if self.config.merge.streaming != "window":
            members = {candidate_name(i): name for i, name in enumerate(arrival.members)}
            guilty = members.get(error.subject or "")
            found = self.held.by_name.get(guilty or "")
            step = step if found is None else found.step
        self.journal.broken[step] = self.journal.taken[step]
        self.held.drop(step)
        is_other = step != arrival.step
        self._give_up(arrival, str(error), "repeated" if is_other else "failed")

    def _merge_and_publish(self, arrival: Arrival, started: float) -> None:
        config = self._merge_config(arrival)
        members = ", ".join(arrival.members)
        self.reporter.say(f"\nstep {arrival.step}: merging {members} ({self._form(arrival)})")
        self.held.check_unchanged(arrival)
        inputs = open_inputs(config)
        scored = self._start_scoring(arrival, config, inputs)
        run = Path(config.output)
        outcome = merge(
            config,
            address=None,
            console=self.reporter.console,
            reserved=_taken_by_others({} if self.shards is None else self.shards.taken),
            part_of=self.config.name,
            place=None if self.shards is None else self.shards.placed,
            # That of attach tells of all arrivals.
            writes_report=False,
        )
        began = recorded(run)
        if began is not None and recorded(self.config.work) is None:
            # All arrivals are merged in the format of the first, wherever this goes on.
            record(self.config.work, began)
        model = outcome.model or run / "model"
        evidence = self._evidence(arrival, config, run)
        if scored:
            evidence |= self._scores(arrival, model, inputs)
        self.held.check_unchanged(arrival)
        self.publisher.publish(arrival, model, evidence, started)

    def _merge_config(self, arrival: Arrival) -> MergeConfig:
        merges = self.config.work / "merges"
        by_number = {earlier.number: earlier for earlier in self.journal.arrivals}
        earlier = [
            str(states.state_directory(merges / by_number[number].name, 1))
            for number in arrival.states
        ]
        checkpoints = [str(self.held.directory / name) for name in arrival.members]
        config = self.config
        if self._is_on_cpu:
            sharing = config.sharing.model_copy(update={"use_gpus": False})
            config = config.model_copy(update={"sharing": sharing})
        merge = merge_config(config, arrival.draw, arrival.name, checkpoints, earlier)
        began = recorded(config.work)
        if merge.precision.compute_dtype != "auto" or began is None:
            return merge
        return merge.with_compute_dtype(began)

    def _form(self, arrival: Arrival) -> str:
        """In words, what the checkpoints are merged into."""
        if not arrival.states:
            return "into the base"
        by_number = {earlier.number: earlier for earlier in self.journal.arrivals}
        steps = ", ".join(str(by_number[number].step) for number in arrival.states)
        return f"with the merged state{'s' if len(arrival.states) > 1 else ''} of step {steps}"

    def _start_scoring(self, arrival: Arrival, config: MergeConfig, inputs: MergeInputs) -> bool:
        """Have the base and the checkpoint scored beside the merge; whether it is possible."""
        if self.scoring is None:
            return False
        base = checkpoint_subject(inputs, BASE)
        try:
            if not self.scoring.start(base):
                return False
        except (EvaluationError, WorkerError, ray.exceptions.RayError) as error:
            # Engines that never ran will not run by themselves; others may again, later.
            if not self._was_scored:
                raise
            self.scoring.close()
            self.reporter.warn(f"step {arrival.step}: the engines do not start; no scores: {error}")
            return False
        self._was_scored = True
        if self.config.evaluation is not None and self.config.evaluation.base:
            self.scoring.submit(base)
        newest = candidate_name(len(config.candidates) - 1)
        checkpoint = checkpoint_subject(inputs, newest)
        self.scoring.submit(replace(checkpoint, name=_checkpoint_name(arrival)))
        return True

    def _scores(self, arrival: Arrival, model: Path, inputs: MergeInputs) -> dict[str, Any]:
        """Scores of the base, the checkpoint and the merged model, and how they compare."""
        assert self.scoring is not None
        identity = open_checkpoint(model).fingerprint
        merged = Subject(
            _merged_name(arrival), ModelSource(str(model)), str(inputs.tokenizer), identity
        )
        try:
            self.scoring.submit(merged)
            scores = self.scoring.wait()
        except Exception as error:  # the engines are gone; the model is there all the same
            self.scoring.close()
            self.reporter.warn(
                f"step {arrival.step}: the evaluation failed; published unscored: {error}"
            )
            return {}
        names = [BASE, _checkpoint_name(arrival), merged.name]
        scores = {name: scores[name] for name in names if name in scores}
        return {
            "value": self.scoring.value(scores[merged.name]),
            "checkpoint_value": self.scoring.value(scores[_checkpoint_name(arrival)]),
            **self.scoring.evidence(scores, _checkpoint_name(arrival)),
        }

    def _evidence(self, arrival: Arrival, config: MergeConfig, run: Path) -> dict[str, Any]:
        """What a published model is made of, for whoever wants to know."""
        manifests = states.finished_states(run)
        last = manifests[max(manifests)]
        sources = {name: str(found.source) for name, found in self.held.by_name.items()}
        return {
            "step": arrival.step,
            "arrival": arrival.number,
            "run": str(self.config.followed),
            "base": config.base,
            "members": {name: sources.get(name) for name in arrival.members},
            "continues": list(arrival.states),
            "iterations": last.iteration,
            "weight_cosine": last.weight_cosine,
            "task_vector_cosine": last.task_vector_cosine,
            "config": config.model_dump(mode="json"),
        }

    def _give_up(self, arrival: Arrival, problem: str, outcome: Outcome) -> None:
        self.reporter.write(ArrivalFailed(arrival.step, problem))
        again = "; merging it without that one" if outcome == "repeated" else ""
        self.reporter.say(f"step {arrival.step}: left out: {problem}{again}")
        self.journal.end(outcome=outcome, problem=problem)
        shutil.rmtree(self.config.work / "merges" / arrival.name, ignore_errors=True)
        self.prune()

    def prune(self) -> None:
        """Let go of snapshots and merged states that no later arrival needs."""
        self.held.prune()
        published = self.journal.published
        needed = {arrival.name for arrival in continued(self.config.merge, published)}
        for arrival in published:
            run = self.config.work / "merges" / arrival.name
            shutil.rmtree(run / "model", ignore_errors=True)
            if arrival.name not in needed:
                shutil.rmtree(run / "states", ignore_errors=True)


def _checkpoint_name(arrival: Arrival) -> str:
    # With the number: a step that is written again is another checkpoint.
    return f"checkpoint-{arrival.name}"


def _merged_name(arrival: Arrival) -> str:
    return f"merged-{arrival.name}"


def _taken_by_others(own: Mapping[str, float]) -> dict[str, float]:
    """What of the cluster is not free: the trainer's, and that of our own evaluators.

    Args:
        own: What the shards hold that the next merge gets.
    """
    free = ray.available_resources()
    return {
        name: max(0.0, have - free.get(name, 0.0) - own.get(name, 0.0))
        for name, have in ray.cluster_resources().items()
    }

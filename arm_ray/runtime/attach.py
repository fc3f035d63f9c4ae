"""Follows a training run: merges every new checkpoint, scores it, and publishes what is better."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ray
import yaml
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.config import MergeConfig, read_yaml
from arm_ray.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    NumericalError,
    PlacementError,
    RunDirectoryError,
    WorkerError,
)
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.selection import Criterion, make_criterion
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.events import Event, EventLog, Warned
from arm_ray.following import publish as publishing
from arm_ray.following.arrivals import choose, members_of, still_needed
from arm_ray.following.config import AttachConfig, merge_config
from arm_ray.following.hooks import run_hook
from arm_ray.following.journal import Arrival, Journal, open_journal
from arm_ray.following.snapshots import Snapshot, changed, remove, snapshots
from arm_ray.runtime.arrival_scoring import ArrivalScoring
from arm_ray.runtime.follower import Follower
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge import merge
from arm_ray.runtime.placement import in_submitted_job, local_slots, ray_session
from arm_ray.runtime.progress import duration, print_summary
from arm_ray.runtime.run_directory import locked
from arm_ray.runtime.scoring import Subject
from arm_ray.runtime.state_scoring import checkpoint_subject, local_evaluator_slots
from arm_ray.schedule import BASE, candidate_name

CONFIG_NAME = "config.yaml"
_ATTEMPTS = 3


@dataclass(frozen=True)
class CheckpointTaken(Event):
    """A checkpoint of the run is complete, and held by a snapshot."""

    name: ClassVar[str] = "checkpoint_taken"
    step: int
    source: str
    linked: bool
    num_bytes: int


@dataclass(frozen=True)
class CheckpointsSkipped(Event):
    """Checkpoints that are not merged at their own turn, because newer ones are there."""

    name: ClassVar[str] = "checkpoints_skipped"
    steps: tuple[int, ...]
    newest: int


@dataclass(frozen=True)
class ArrivalPublished(Event):
    """A merged model is published; values are those that models are compared by."""

    name: ClassVar[str] = "arrival_published"
    step: int
    members: tuple[str, ...]
    path: str
    is_best: bool
    value: float | None
    checkpoint_value: float | None
    seconds: float


@dataclass(frozen=True)
class ArrivalFailed(Event):
    """An arrival is left out; the run is followed on."""

    name: ClassVar[str] = "arrival_failed"
    step: int
    problem: str


@dataclass(frozen=True)
class AttachOutcome:
    """How following ended.

    Attributes:
        reason: `finished`, `idle`.
        arrivals: All of them.
        best: What `best` points to; None where nothing does.
    """

    reason: str
    arrivals: tuple[Arrival, ...]
    best: Path | None


def attach(
    config: AttachConfig, *, address: str | None = None, console: Console | None = None
) -> AttachOutcome:
    """Follow a run until it ends, or nothing new has come for long.

    It ends at once when interrupted (Ctrl-C, SIGTERM, `ray job stop`), and the same call goes on.

    Args:
        config: The configuration.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error.

    Raises:
        ArmRayError: Any of its kinds. What is published stays, and the same call goes on.
    """
    console = console or Console(stderr=True)
    _check_outlives_job(config)
    tasks = [] if config.evaluation is None else load_tasks(config.evaluation)
    criterion = None
    if config.evaluation is not None:
        names = {task.name: task.metrics for task in tasks}
        criterion = make_criterion(config.evaluation.select, names)
    work = config.work
    with locked(work, "attach"):
        _open_work(config)
        events = EventLog(work / "events.jsonl")

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        # Without Ray's slots for the evaluation a local Ray could not place it beside a merge.
        sample = merge_config(
            config, 1, "step-000000", ["checkpoint"] * config.merge.candidates, ()
        )
        slots = local_slots(sample.runtime, 1) + local_evaluator_slots(config.evaluation)
        with contextlib.ExitStack() as stack:
            stack.enter_context(ray_session(address, slots))
            scoring = None
            if config.evaluation is not None:
                made = ArrivalScoring(
                    config.evaluation,
                    config.sharing,
                    tasks,
                    criterion,
                    work / "scores",
                    events,
                    say,
                )
                scoring = stack.enter_context(made)
            journal = open_journal(work)
            attacher = _Attacher(config, journal, events, scoring, criterion, console, say)
            return attacher.run()


class _Attacher:
    """One session of following a run."""

    def __init__(
        self,
        config: AttachConfig,
        journal: Journal,
        events: EventLog,
        scoring: ArrivalScoring | None,
        criterion: Criterion | None,
        console: Console,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._journal, self._events = config, journal, events
        self._scoring, self._criterion = scoring, criterion
        self._console, self._say = console, say
        self._directory = config.work / "checkpoints"
        self._snapshots: dict[int, Snapshot] = {}
        self._in_order: set[int] = set()
        self._started = time.monotonic()

    def run(self) -> AttachOutcome:
        """Follow the run to its end."""
        config = self._config
        publishing.recover(config.published)
        self._adopt()
        self._say(
            f"following {config.followed} every {config.run.poll_s:g} s; merged models go to "
            f"{config.published}"
        )
        follower = Follower(
            config.run,
            config.followed,
            self._directory,
            self._journal.taken,
            self._wanted,
            self._say,
        )
        with follower:
            follower.wait_for_first_look()
            reason = self._follow(follower)
        self._summarise(reason)
        best = publishing.best(config.published)
        return AttachOutcome(reason, tuple(self._journal.arrivals), best)

    def _follow(self, follower: Follower) -> str:
        last_work = time.monotonic()
        while True:
            # Before the new ones are collected: what it knows then is collected as well.
            is_finished = follower.is_finished
            self._collect(follower)
            arrival = self._journal.unfinished or self._next()
            if arrival is not None:
                self._process(arrival)
                last_work = time.monotonic()
                continue
            if is_finished:
                return "finished"
            limit = self._config.run.idle_timeout_s
            idle = min(follower.idle_s, time.monotonic() - last_work)
            if limit is not None and idle >= limit:
                return "idle"
            follower.wait(min(self._config.run.poll_s, limit or self._config.run.poll_s))

    def _adopt(self) -> None:
        """Take up the snapshots of an earlier session."""
        self._snapshots = {found.step: found for found in snapshots(self._directory)}
        for step, found in sorted(self._snapshots.items()):
            self._journal.taken.setdefault(step, found.version)

    def _wanted(self, complete: list[int]) -> list[int]:
        """Which of the checkpoints that are there at the first look are taken."""
        start, journal = self._config.run.start, self._journal
        if journal.taken:
            # Going on: what came before the first one was not wanted then either.
            return [step for step in complete if step >= min(journal.taken)]
        if start == "latest":
            count = 1 if self._config.merge.streaming == "window" else self._config.merge.candidates
            return complete[-count:]
        return [step for step in complete if start == "all" or step >= start]

    def _collect(self, follower: Follower) -> None:
        """Write down what the follower has taken."""
        journal, start = self._journal, self._config.run.start
        is_new_run = not journal.taken
        taken = follower.drain()
        for item in taken:
            found = item.snapshot
            if found.step in journal.taken and journal.taken[found.step] != found.version:
                self._say(f"step {found.step}: the trainer has written it again")
                journal.skipped = [step for step in journal.skipped if step != found.step]
            journal.taken[found.step] = found.version
            self._replace(found)
            self._events.write(
                CheckpointTaken(found.step, str(found.source), found.linked, found.num_bytes)
            )
            how = "linked" if found.linked else "copied"
            self._say(f"step {found.step}: complete, {how} ({found.num_bytes / 1e9:.2f} GB)")
            if item.is_first_look and start != "latest":
                self._in_order.add(found.step)
        if taken and is_new_run and start == "latest":
            # The others are there to meet the newest.
            journal.skipped += [item.snapshot.step for item in taken if item.is_first_look][:-1]
        if taken:
            journal.save()

    def _replace(self, found: Snapshot) -> None:
        """Hold a snapshot, and let go of an older one of its step that nothing needs."""
        old = self._snapshots.get(found.step)
        self._snapshots[found.step] = found
        unfinished = self._journal.unfinished
        members = () if unfinished is None else unfinished.members
        if old is not None and old.path.name not in members:
            remove(old)

    def _waiting(self) -> list[int]:
        journal, every = self._journal, self._config.merge.every
        done = {(arrival.step, arrival.version) for arrival in journal.arrivals}
        return sorted(
            step
            for position, (step, version) in enumerate(journal.taken.items())
            if (position + 1) % every == 0
            and self._has_company(step)
            and step in self._snapshots
            and (step, version) not in done
            and step not in journal.skipped
        )

    def _has_company(self, step: int) -> bool:
        """Whether as many checkpoints as meet came up to this one; else it will but be a member."""
        return bool(members_of(self._config.merge, [s for s in self._journal.taken if s <= step]))

    def _next(self) -> Arrival | None:
        """The arrival to process now, written down as begun."""
        journal, merge_settings = self._journal, self._config.merge
        waiting = self._waiting()
        choice = choose(merge_settings, self._snapshots, waiting, self._in_order)
        if choice.skipped:
            steps = ", ".join(map(str, choice.skipped))
            self._say(
                f"checkpoints arrive faster than they are merged: going on with step "
                f"{choice.step}, without merges at {steps}"
            )
            assert choice.step is not None
            self._events.write(CheckpointsSkipped(choice.skipped, choice.step))
            journal.skipped += choice.skipped
            journal.save()
        if choice.step is None:
            return None
        published = journal.published
        count = {"none": 0, "anchor": 1, "window": merge_settings.candidates - 1}
        before = published[max(0, len(published) - count[merge_settings.streaming]) :]
        if merge_settings.streaming == "none":
            before = []
        arrival = Arrival(
            len(journal.arrivals) + 1,
            choice.step,
            journal.taken[choice.step],
            tuple(self._snapshots[step].path.name for step in choice.members),
            tuple(earlier.number for earlier in before),
            len(published) + 1,
        )
        journal.begin(arrival)
        return arrival

    def _process(self, arrival: Arrival) -> None:
        """Merge an arrival, score it and publish it, or give it up."""
        started = time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._merge_and_publish(arrival, started)
            except (WorkerError, PlacementError) as error:
                # The run directory stays: the next attempt goes on in it.
                if attempt == _ATTEMPTS:
                    raise
                self._say(f"step {arrival.step}: {error}; trying again")
            except (CheckpointError, NumericalError, RunDirectoryError) as error:
                if isinstance(error, MismatchError) and not self._journal.published:
                    # No checkpoint of this run will fit.
                    self._journal.end(outcome="failed", problem=str(error))
                    raise
                self._give_up(arrival, error)
                return
            else:
                self._prune()
                return

    def _merge_and_publish(self, arrival: Arrival, started: float) -> None:
        config = self._merge_config(arrival)
        members = ", ".join(arrival.members)
        self._say(f"\nstep {arrival.step}: merging {members} ({self._form(arrival)})")
        self._check_unchanged(arrival)
        inputs = open_inputs(config)
        scored = self._start_scoring(arrival, config, inputs)
        run = Path(config.output)
        outcome = merge(config, address=None, console=self._console, reserved=_taken_by_others())
        model = outcome.model or run / "model"
        evidence = self._evidence(arrival, config, run)
        if scored:
            evidence |= self._scores(arrival, model, inputs)
        self._check_unchanged(arrival)
        self._publish(arrival, model, evidence, started)

    def _check_unchanged(self, arrival: Arrival) -> None:
        """Look whether the trainer has written into files that it shares with our links.

        Raises:
            CorruptCheckpointError: It has, and what was merged may be of two steps.
        """
        for step, snapshot in list(self._snapshots.items()):
            problem = changed(snapshot) if snapshot.path.name in arrival.members else None
            if problem is not None:
                remove(self._snapshots.pop(step))
                raise CorruptCheckpointError(
                    "a checkpoint was written to after it was taken",
                    where=snapshot.source,
                    got=problem,
                    expected="the files that were there then",
                    hint="the trainer writes into its files in place; the checkpoint is taken "
                    "again when it is complete",
                )

    def _merge_config(self, arrival: Arrival) -> MergeConfig:
        merges = self._config.work / "merges"
        by_number = {earlier.number: earlier for earlier in self._journal.arrivals}
        earlier = [
            str(states.state_directory(merges / by_number[number].name, 1))
            for number in arrival.states
        ]
        checkpoints = [str(self._directory / name) for name in arrival.members]
        return merge_config(self._config, arrival.draw, arrival.name, checkpoints, earlier)

    def _form(self, arrival: Arrival) -> str:
        """In words, what the checkpoints are merged into."""
        if not arrival.states:
            return "into the base"
        by_number = {earlier.number: earlier for earlier in self._journal.arrivals}
        steps = ", ".join(str(by_number[number].step) for number in arrival.states)
        return f"with the merged state{'s' if len(arrival.states) > 1 else ''} of step {steps}"

    def _start_scoring(self, arrival: Arrival, config: MergeConfig, inputs: MergeInputs) -> bool:
        """Have the base and the checkpoint scored beside the merge; whether it is possible."""
        if self._scoring is None:
            return False
        base = checkpoint_subject(inputs, BASE)
        if not self._scoring.start(base):
            return False
        if self._config.evaluation is not None and self._config.evaluation.base:
            self._scoring.submit(base)
        newest = candidate_name(len(config.candidates) - 1)
        checkpoint = checkpoint_subject(inputs, newest)
        self._scoring.submit(replace(checkpoint, name=_checkpoint_name(arrival)))
        return True

    def _scores(self, arrival: Arrival, model: Path, inputs: MergeInputs) -> dict[str, Any]:
        """Scores of the base, the checkpoint and the merged model, and how they compare."""
        assert self._scoring is not None
        identity = open_checkpoint(model).fingerprint
        merged = Subject(
            _merged_name(arrival), ModelSource(str(model)), str(inputs.tokenizer), identity
        )
        try:
            self._scoring.submit(merged)
            scores = self._scoring.wait()
        except Exception as error:  # the engines are gone; the model is there all the same
            self._scoring.close()
            self._warn(f"step {arrival.step}: the evaluation failed; published unscored: {error}")
            return {}
        names = [BASE, _checkpoint_name(arrival), merged.name]
        scores = {name: scores[name] for name in names if name in scores}
        return {
            "value": self._scoring.value(scores[merged.name]),
            "checkpoint_value": self._scoring.value(scores[_checkpoint_name(arrival)]),
            **self._scoring.evidence(scores, _checkpoint_name(arrival)),
        }

    def _evidence(self, arrival: Arrival, config: MergeConfig, run: Path) -> dict[str, Any]:
        """What a published model is made of, for whoever wants to know."""
        manifests = states.finished_states(run)
        last = manifests[max(manifests)]
        sources = {found.path.name: str(found.source) for found in self._snapshots.values()}
        return {
            "step": arrival.step,
            "arrival": arrival.number,
            "run": str(self._config.followed),
            "base": config.base,
            "members": {name: sources.get(name) for name in arrival.members},
            "continues": list(arrival.states),
            "iterations": last.iteration,
            "weight_cosine": last.weight_cosine,
            "task_vector_cosine": last.task_vector_cosine,
            "config": config.model_dump(mode="json"),
        }

    def _publish(
        self, arrival: Arrival, model: Path, evidence: dict[str, Any], started: float
    ) -> None:
        value, beside = evidence.get("value"), evidence.get("checkpoint_value")
        is_best, why = self._is_best(value, beside)
        evidence |= {"is_best": is_best, "reason": why}
        settings = self._config.publish
        path = publishing.publish(
            model, self._config.published, arrival.step, evidence, settings.keep, is_best
        )
        seconds = round(time.monotonic() - started, 3)
        self._say(
            f"step {arrival.step}: published {path} after {duration(seconds)}"
            f"{'; it is the best' if is_best else ''} ({why})"
        )
        event = ArrivalPublished(
            arrival.step, arrival.members, str(path), is_best, value, beside, seconds
        )
        self._run_hook(event, evidence)
        self._events.write(event)
        self._journal.end(
            outcome="published", value=value, checkpoint_value=beside, is_best=is_best
        )

    def _is_best(self, value: float | None, beside: float | None) -> tuple[bool, str]:
        """Whether a merged model with this value becomes the best, and why."""
        if self._config.publish.promote == "always":
            return True, "publish.promote: always"
        assert self._criterion is not None
        if value is None or beside is None:
            return False, "it has no scores"
        best = self._journal.best
        if not self._criterion.is_better(value, beside):
            return False, f"{value:.4f} is no better than the checkpoint's {beside:.4f}"
        held = None if best is None else best.value
        if best is not None and held is not None and not self._criterion.is_better(value, held):
            return False, f"{value:.4f} is no better than {held:.4f} of step {best.step}"
        return True, f"{value:.4f}, the checkpoint {beside:.4f}"

    def _run_hook(self, event: ArrivalPublished, evidence: dict[str, Any]) -> None:
        """Tell whoever wants to know; what goes wrong there does not end the run."""
        payload = {
            "event": event.name,
            "step": event.step,
            "path": event.path,
            "is_best": event.is_best,
            "metrics": {
                name: {task: given["metrics"] for task, given in model["tasks"].items()}
                for name, model in evidence.get("models", {}).items()
            },
            "value": event.value,
            "checkpoint_value": event.checkpoint_value,
        }
        result = run_hook(self._config.publish.hook, payload)
        for problem in result.problems:
            self._warn(f"step {event.step}: {problem}")

    def _give_up(self, arrival: Arrival, error: Exception) -> None:
        problem = str(error)
        self._events.write(ArrivalFailed(arrival.step, problem))
        self._say(f"step {arrival.step}: left out: {problem}")
        self._journal.end(outcome="failed", problem=problem)
        shutil.rmtree(self._config.work / "merges" / arrival.name, ignore_errors=True)

    def _prune(self) -> None:
        """Let go of snapshots and merged states that no later arrival needs."""
        waiting = self._waiting()
        keep = still_needed(self._config.merge, self._snapshots, waiting)
        for step in [step for step in self._snapshots if step not in keep]:
            remove(self._snapshots.pop(step))
        published = self._journal.published
        count = {"none": 0, "anchor": 1, "window": self._config.merge.candidates - 1}
        kept = published[max(0, len(published) - count[self._config.merge.streaming]) :]
        needed = {a.name for a in kept} if count[self._config.merge.streaming] else set()
        for arrival in published:
            run = self._config.work / "merges" / arrival.name
            shutil.rmtree(run / "model", ignore_errors=True)
            shutil.rmtree(run / "inputs", ignore_errors=True)
            if arrival.name not in needed:
                shutil.rmtree(run / "states", ignore_errors=True)

    def _summarise(self, reason: str) -> None:
        reasons = {"finished": "the run is over", "idle": "nothing new for run.idle_timeout_s"}
        journal = self._journal
        best = journal.best
        failed = [arrival for arrival in journal.arrivals if arrival.outcome == "failed"]
        rows = [
            ("ended", reasons[reason]),
            ("checkpoints taken", str(len(journal.taken))),
            ("merged and published", str(len(journal.published))),
            ("left out", str(len(failed))),
            ("best", "none" if best is None else f"step {best.step}"),
            ("time", duration(time.monotonic() - self._started)),
            ("models", str(self._config.published)),
        ]
        print_summary(self._console, f"attach {self._config.followed.name}", rows)

    def _warn(self, message: str) -> None:
        self._events.write(Warned(message))
        self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def _checkpoint_name(arrival: Arrival) -> str:
    return f"checkpoint-{arrival.step:06d}"


def _merged_name(arrival: Arrival) -> str:
    return f"merged-{arrival.name}"


def _taken_by_others() -> dict[str, float]:
    """What of the cluster is not free: the trainer's, and that of our own evaluators."""
    free = ray.available_resources()
    return {name: have - free.get(name, 0.0) for name, have in ray.cluster_resources().items()}


def _check_outlives_job(config: AttachConfig) -> None:
    given = {"publish.dir": config.publish.dir, "run.path": config.run.path}
    if config.output is not None:
        given["output"] = config.output
    for key, path in given.items():
        if in_submitted_job() and not Path(path).expanduser().is_absolute():
            raise ConfigError(
                "a path of a submitted job is relative",
                where=key,
                got=path,
                expected="an absolute path, on storage that outlives the job",
                hint="the job runs in a temporary copy of its working directory",
            )


def _open_work(config: AttachConfig) -> None:
    """Write the configuration down, unless the directory follows something else.

    Raises:
        RunDirectoryError: It belongs to another run, or merges otherwise.
    """
    file = config.work / CONFIG_NAME
    content = config.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False)
    if file.is_file():
        before, after = _identity(read_yaml(file)), _identity(content)
        changed = [key for key in after if before.get(key) != after[key]]
        if changed:
            raise RunDirectoryError(
                "the output directory follows a run with another configuration",
                where=config.work,
                got="\n" + "\n".join(f"      {k}: {before.get(k)} -> {after[k]}" for k in changed),
                hint="choose another publish.dir and output, or restore these keys to go on",
            )
    with atomic_file(file) as written:
        written.write(text.encode())


def _identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay as it was for the arrivals to be one stream."""
    run, merging = content.get("run") or {}, content.get("merge") or {}
    return {
        "run.path": run.get("path"),
        "run.kind": run.get("kind"),
        "publish.dir": (content.get("publish") or {}).get("dir"),
        **{f"merge.{key}": value for key, value in merging.items() if key != "runtime"},
    }

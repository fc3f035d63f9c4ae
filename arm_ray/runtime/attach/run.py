"""Follows a training run: merges every new checkpoint, scores it, and publishes what is better."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.config import MergeConfig
from arm_ray.errors import (
    ArmRayError,
    CheckpointError,
    CorruptCheckpointError,
    EvaluationError,
    MismatchError,
    NumericalError,
    PlacementError,
    RunDirectoryError,
    TransportError,
    WorkerError,
)
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.selection import Criterion, make_criterion
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.events import EventLog, Warned
from arm_ray.following import publish as publishing
from arm_ray.following.arrivals import choose, continued, members_of, still_needed
from arm_ray.following.config import AttachConfig, merge_config
from arm_ray.following.events import (
    ArrivalFailed,
    ArrivalPublished,
    CheckpointsSkipped,
    CheckpointTaken,
)
from arm_ray.following.hooks import run_hook
from arm_ray.following.journal import Arrival, Journal, Outcome, open_journal
from arm_ray.following.snapshots import Snapshot, changed, remove, snapshots
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.attach.arrival_scoring import ArrivalScoring
from arm_ray.runtime.attach.checks import check_base, check_outlives_job, open_work
from arm_ray.runtime.attach.follower import Follower
from arm_ray.runtime.cluster.joining import ray_session
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.output.precision import record, recorded
from arm_ray.runtime.output.run_directory import locked
from arm_ray.runtime.scoring.service import Subject
from arm_ray.runtime.scoring.state_scoring import checkpoint_subject, local_evaluator_slots
from arm_ray.runtime.session.progress import duration, print_summary
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.runtime.shards.placement import local_slots
from arm_ray.schedule import BASE, candidate_name

_ATTEMPTS = 3
_PAUSE_S = 5.0


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
    check_outlives_job(config)
    check_installed(config.tracking)
    tasks = [] if config.evaluation is None else load_tasks(config.evaluation)
    criterion = None
    if config.evaluation is not None:
        names = {task.name: task.metrics for task in tasks}
        criterion = make_criterion(config.evaluation.select, names)
    work = config.work
    with locked(config.published, "attach"), locked(work, "attach"):
        open_work(config)
        check_base(config)
        events = EventLog(work / "events.jsonl")

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        # Without Ray's slots for the evaluation a local Ray could not place it beside a merge.
        sample = merge_config(
            config, 1, "step-000000", ["checkpoint"] * config.merge.candidates, ()
        )
        slots = local_slots(sample.runtime, 1) + local_evaluator_slots(config.evaluation)
        with contextlib.ExitStack() as stack:

            def start() -> ArrivalScoring | None:
                about = {"job": "attach", "output": str(config.work)}
                stack.enter_context(ray_session(address, slots, about))
                parameters = config.model_dump(mode="json", exclude={"tracking"})
                listening = telemetry(
                    events, config.tracking, work, config.name, say, parameters=parameters
                )
                stack.enter_context(listening)
                if config.evaluation is None:
                    return None
                scoring = ArrivalScoring(
                    config.evaluation,
                    config.sharing,
                    tasks,
                    criterion,
                    work / "scores",
                    config.merge_runtime,
                    events,
                    say,
                )
                return stack.enter_context(scoring)

            journal = open_journal(work)
            attacher = _Attacher(config, journal, events, start, criterion, console, say)
            return attacher.run()


class _Attacher:
    """One session of following a run.

    Args:
        start: Has Ray and all that listens run, and says what scores; called once there is
            something to do, or to wait for.
    """

    def __init__(
        self,
        config: AttachConfig,
        journal: Journal,
        events: EventLog,
        start: Callable[[], ArrivalScoring | None],
        criterion: Criterion | None,
        console: Console,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._journal, self._events = config, journal, events
        self._start, self._is_started, self._criterion = start, False, criterion
        self._scoring: ArrivalScoring | None = None
        self._console, self._say = console, say
        self._directory = config.work / "checkpoints"
        self._snapshots: dict[int, Snapshot] = {}
        self._started = time.monotonic()
        self._is_on_cpu = False
        self._was_scored = False
        self._told: set[str] = set()

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
            self._first_step,
            self._say,
        )
        with follower:
            follower.wait_for_start()
            reason = self._follow(follower)
        self._summarise(reason)
        best = publishing.best(config.published)
        return AttachOutcome(reason, tuple(self._journal.arrivals), best)

    def _follow(self, follower: Follower) -> str:
        last_work = time.monotonic()
        while True:
            # Before the new ones are collected: what it knows then is collected as well.
            is_finished = follower.is_finished
            if follower.has_news:
                # What is written down of it is for those that listen too.
                self._have_ray()
            self._collect(follower)
            arrival = self._journal.unfinished or self._next()
            if arrival is None and is_finished:
                return "finished"
            self._have_ray()
            if arrival is not None:
                self._process(arrival)
                last_work = time.monotonic()
                continue
            limit = self._config.run.idle_timeout_s
            idle = min(follower.idle_s, time.monotonic() - last_work)
            if limit is not None and idle >= limit:
                return "idle"
            follower.wait(min(self._config.run.poll_s, limit or self._config.run.poll_s))

    def _have_ray(self) -> None:
        if not self._is_started:
            self._scoring = self._start()
            self._is_started = True

    def _adopt(self) -> None:
        """Take up the snapshots of an earlier session."""
        for found in snapshots(self._directory):
            self._replace(found)
            self._journal.taken.setdefault(found.step, found.version)

    def _first_step(self, complete: list[int]) -> int:
        """The first step that is taken, given those that are complete at the start."""
        start, journal = self._config.run.start, self._journal
        if journal.taken:
            # Going on: what came before the first one was not wanted then either.
            return min(journal.taken)
        if start == "latest":
            count = 1 if self._config.merge.streaming == "window" else self._config.merge.candidates
            return min(complete[-count:], default=0)
        return 0 if start == "all" else start

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
            if item.was_there and is_new_run and start != "latest":
                journal.in_order.append(found.step)
        if taken and is_new_run and start == "latest":
            # The others are there to meet the newest.
            journal.skipped += [item.snapshot.step for item in taken if item.was_there][:-1]
        if taken:
            journal.save()

    def _replace(self, found: Snapshot) -> None:
        """Hold a snapshot, and let go of an older one of its step."""
        old = self._snapshots.get(found.step)
        self._snapshots[found.step] = found
        if old is not None and old.path != found.path:
            remove(old)

    def _waiting(self) -> list[int]:
        journal, every = self._journal, self._config.merge.every
        done = {(a.step, a.version) for a in journal.arrivals if a.outcome != "repeated"}
        return sorted(
            step
            for position, (step, version) in enumerate(journal.taken.items())
            if (position + 1) % every == 0
            and self._has_company(step)
            and step in self._snapshots
            and (step, version) not in done
            and step not in journal.skipped
            and not journal.is_broken(step)
        )

    def _has_company(self, step: int) -> bool:
        """Whether as many checkpoints as meet came up to this one; else it will but be a member."""
        journal = self._journal
        steps = sorted(s for s in journal.taken if s <= step and not journal.is_broken(s))
        return bool(members_of(self._config.merge, steps))

    def _next(self) -> Arrival | None:
        """The arrival to process now, written down as begun."""
        journal, merge_settings = self._journal, self._config.merge
        waiting = self._waiting()
        choice = choose(merge_settings, self._snapshots, waiting, journal.in_order)
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
            if waiting:
                self._say_once(
                    f"step {waiting[-1]}: the checkpoints that it would meet are gone; it waits "
                    f"for the next one"
                )
            return None
        published = journal.published
        before = continued(merge_settings, published)
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
        started, attempt = time.monotonic(), 0
        held = {snapshot.path.name for snapshot in self._snapshots.values()}
        if not held.issuperset(arrival.members):
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
            except (WorkerError, TransportError, RunDirectoryError, RayError) as error:
                # The run directory stays: the next attempt goes on in it.
                if attempt == _ATTEMPTS:
                    raise
                self._say(f"step {arrival.step}: {error}; trying again")
                time.sleep(_PAUSE_S)
            except (CheckpointError, NumericalError) as error:
                fits_none = isinstance(error, MismatchError) and not self._journal.published
                if error.subject == BASE or fits_none:
                    # It is the base, or no checkpoint of this run will fit.
                    self._journal.end(outcome="failed", problem=str(error))
                    raise
                self._leave_out(arrival, error)
                return
        self._prune()

    def _goes_elsewhere(self, arrival: Arrival, error: PlacementError) -> bool:
        """Whether a merge that has no room waits on, or goes to CPUs; says which."""
        if self._config.sharing.when_full == "wait":
            self._say_once(f"step {arrival.step}: no room for the merge; waiting for it: {error}")
            time.sleep(_PAUSE_S)
            return True
        if self._is_on_cpu or not self._config.sharing.use_gpus:
            return False
        self._say(f"no room for the merge as configured: {error}")
        self._say("merges go to CPUs")
        self._is_on_cpu = True
        # Nothing is done there yet, and the device is part of what it would go on with.
        shutil.rmtree(self._config.work / "merges" / arrival.name, ignore_errors=True)
        return True

    def _leave_out(self, arrival: Arrival, error: ArmRayError) -> None:
        """Give an arrival up, and what was wrong with it: the new checkpoint, or another member."""
        step = arrival.step
        if self._config.merge.streaming != "window":
            members = {candidate_name(i): name for i, name in enumerate(arrival.members)}
            guilty = members.get(error.subject or "")
            step = next((s for s, f in self._snapshots.items() if f.path.name == guilty), step)
        self._journal.broken[step] = self._journal.taken[step]
        if step in self._snapshots:
            remove(self._snapshots.pop(step))
        is_other = step != arrival.step
        self._give_up(arrival, str(error), "repeated" if is_other else "failed")

    def _merge_and_publish(self, arrival: Arrival, started: float) -> None:
        config = self._merge_config(arrival)
        members = ", ".join(arrival.members)
        self._say(f"\nstep {arrival.step}: merging {members} ({self._form(arrival)})")
        self._check_unchanged(arrival)
        inputs = open_inputs(config)
        scored = self._start_scoring(arrival, config, inputs)
        run = Path(config.output)
        outcome = merge(
            config,
            address=None,
            console=self._console,
            reserved=_taken_by_others(),
            part_of=self._config.name,
        )
        began = recorded(run)
        if began is not None and recorded(self._config.work) is None:
            # All arrivals are merged in the format of the first, wherever this goes on.
            record(self._config.work, began)
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
        by_name = {snapshot.path.name: snapshot for snapshot in self._snapshots.values()}
        for index, name in enumerate(arrival.members):
            problem = changed(by_name[name])
            if problem is not None:
                raise CorruptCheckpointError(
                    f"{candidate_name(index)} was written to after it was taken",
                    where=by_name[name].source,
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
        config = self._config
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
        by_number = {earlier.number: earlier for earlier in self._journal.arrivals}
        steps = ", ".join(str(by_number[number].step) for number in arrival.states)
        return f"with the merged state{'s' if len(arrival.states) > 1 else ''} of step {steps}"

    def _start_scoring(self, arrival: Arrival, config: MergeConfig, inputs: MergeInputs) -> bool:
        """Have the base and the checkpoint scored beside the merge; whether it is possible."""
        if self._scoring is None:
            return False
        base = checkpoint_subject(inputs, BASE)
        try:
            if not self._scoring.start(base):
                return False
        except (EvaluationError, WorkerError, RayError) as error:
            # Engines that never ran will not run by themselves; others may again, later.
            if not self._was_scored:
                raise
            self._scoring.close()
            self._warn(f"step {arrival.step}: the engines do not start; no scores: {error}")
            return False
        self._was_scored = True
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
            arrival.step,
            arrival.members,
            str(path),
            is_best,
            value,
            beside,
            seconds,
            self._lag_s(arrival),
            evidence.get("weight_cosine"),
            evidence.get("task_vector_cosine"),
        )
        self._run_hook(event, evidence)
        self._events.write(event)
        self._journal.end(
            outcome="published", value=value, checkpoint_value=beside, is_best=is_best
        )

    def _lag_s(self, arrival: Arrival) -> float | None:
        """Seconds since an arrival's checkpoint was taken; None where it is held no more."""
        held = self._snapshots.get(arrival.step)
        try:
            return None if held is None else round(time.time() - held.taken_at, 3)
        except OSError:
            return None

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

    def _give_up(self, arrival: Arrival, problem: str, outcome: Outcome) -> None:
        self._events.write(ArrivalFailed(arrival.step, problem))
        again = "; merging it without that one" if outcome == "repeated" else ""
        self._say(f"step {arrival.step}: left out: {problem}{again}")
        self._journal.end(outcome=outcome, problem=problem)
        shutil.rmtree(self._config.work / "merges" / arrival.name, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        """Let go of snapshots and merged states that no later arrival needs."""
        waiting = self._waiting()
        keep = still_needed(self._config.merge, self._snapshots, waiting)
        for step in [step for step in self._snapshots if step not in keep]:
            remove(self._snapshots.pop(step))
        published = self._journal.published
        needed = {arrival.name for arrival in continued(self._config.merge, published)}
        for arrival in published:
            run = self._config.work / "merges" / arrival.name
            shutil.rmtree(run / "model", ignore_errors=True)
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

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)

    def _warn(self, message: str) -> None:
        self._events.write(Warned(message))
        self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def _checkpoint_name(arrival: Arrival) -> str:
    # With the number: a step that is written again is another checkpoint.
    return f"checkpoint-{arrival.name}"


def _merged_name(arrival: Arrival) -> str:
    return f"merged-{arrival.name}"


def _taken_by_others() -> dict[str, float]:
    """What of the cluster is not free: the trainer's, and that of our own evaluators."""
    free = ray.available_resources()
    return {name: have - free.get(name, 0.0) for name, have in ray.cluster_resources().items()}

"""Follows a training run: merges every new checkpoint, scores it, and publishes what is better."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from arm_ray.evaluation.selection import make_criterion
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.events import EventLog
from arm_ray.following import publish as publishing
from arm_ray.following.config import AttachConfig, merge_config
from arm_ray.following.journal import Arrival, Journal, open_journal
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.attach.arrival_scoring import ArrivalScoring
from arm_ray.runtime.attach.checks import check_base, check_outlives_job, open_work
from arm_ray.runtime.attach.follower import Follower
from arm_ray.runtime.attach.held import HeldCheckpoints
from arm_ray.runtime.attach.kept_shards import KeptShards
from arm_ray.runtime.attach.processing import ArrivalProcessor
from arm_ray.runtime.attach.publication import ArrivalPublisher
from arm_ray.runtime.cluster.joining import local_slots, ray_session
from arm_ray.runtime.output.claim import claimed
from arm_ray.runtime.scoring.state_scoring import local_evaluator_slots
from arm_ray.runtime.session.page import LivePage
from arm_ray.runtime.session.progress import duration, print_summary
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.session.telemetry import telemetry


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
    reporter = Reporter(console or Console(stderr=True))
    check_outlives_job(config)
    check_installed(config.tracking)
    tasks = [] if config.evaluation is None else load_tasks(config.evaluation)
    criterion = None
    if config.evaluation is not None:
        names = {task.name: task.metrics for task in tasks}
        criterion = make_criterion(config.evaluation.select, names)
    work = config.work
    with claimed(config.published, "attach"), claimed(work, "attach"):
        open_work(config)
        check_base(config)
        reporter = reporter.with_events(EventLog(work / "events.jsonl"))
        # Without Ray's slots for the evaluation a local Ray could not place it beside a merge.
        sample = merge_config(
            config, 1, "step-000000", ["checkpoint"] * config.merge.candidates, ()
        )
        slots = local_slots(sample.runtime, 1) + local_evaluator_slots(config.evaluation)
        shards = KeptShards() if config.sharing.keep_shards else None
        with contextlib.ExitStack() as stack:

            def start() -> ArrivalScoring | None:
                about = {"job": "attach", "output": str(config.work)}
                stack.enter_context(ray_session(address, slots, about))
                if shards is not None:
                    stack.callback(shards.close)
                parameters = config.model_dump(mode="json", exclude={"tracking"})
                listening = telemetry(
                    reporter, config.tracking, work, config.name, parameters=parameters
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
                    reporter,
                )
                return stack.enter_context(scoring)

            publishing.recover(config.published)
            journal = open_journal(work)
            held = HeldCheckpoints(config, journal, reporter)
            publisher = ArrivalPublisher(config, journal, held, criterion, reporter)
            processor = ArrivalProcessor(config, journal, held, publisher, reporter, shards=shards)
            return _Session(config, journal, processor, start, reporter).run()


class _Session:
    """One session of following a run.

    Args:
        config: The configuration.
        journal: Of arrivals.
        processor: Merges and publishes them.
        start: Has Ray and all that listens run, and says what scores; called once there is
            something to do, or to wait for.
        reporter: Told what is done.
    """

    def __init__(
        self,
        config: AttachConfig,
        journal: Journal,
        processor: ArrivalProcessor,
        start: Callable[[], ArrivalScoring | None],
        reporter: Reporter,
    ) -> None:
        self._config, self._journal, self._processor = config, journal, processor
        self._held, self._start, self._reporter = processor.held, start, reporter
        self._is_started, self._started = False, time.monotonic()
        self._page = LivePage(config.work, reporter)

    def run(self) -> AttachOutcome:
        """Follow the run to its end."""
        config = self._config
        self._reporter.say(
            f"following {config.followed} every {config.run.poll_s:g} s; merged models go to "
            f"{config.published}"
        )
        follower = Follower(
            config.run,
            config.followed,
            self._held.directory,
            self._journal.taken,
            self._held.first_step,
            self._reporter,
        )
        with follower:
            follower.wait_for_start()
            reason = self._follow(follower)
        self._summarise(reason)
        if self._journal.arrivals:
            self._page.end()
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
            self._held.collect(follower)
            arrival = self._journal.unfinished or self._held.next_arrival()
            if arrival is None and is_finished:
                return "finished"
            self._have_ray()
            if arrival is not None:
                self._processor.process(arrival)
                self._page.refresh()
                last_work = time.monotonic()
                continue
            limit = self._config.run.idle_timeout_s
            idle = min(follower.idle_s, time.monotonic() - last_work)
            if limit is not None and idle >= limit:
                return "idle"
            follower.wait(min(self._config.run.poll_s, limit or self._config.run.poll_s))

    def _have_ray(self) -> None:
        if not self._is_started:
            self._processor.scoring = self._start()
            self._is_started = True

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
        print_summary(self._reporter.console, f"attach {self._config.followed.name}", rows)

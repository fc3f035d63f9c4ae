"""Looks at a run's directory in a thread of its own, and takes snapshots of what is complete.

A trainer may remove a checkpoint as soon as it has written the next one, while a merge takes
minutes: what is to be merged is held by links of ours from the moment that it is complete.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arm_ray.checkpoints.formats import missing
from arm_ray.following.config import RunConfig
from arm_ray.following.layouts import Found, RunWatcher
from arm_ray.following.snapshots import Snapshot, remove, take
from arm_ray.runtime.session.reporter import Reporter

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Taken:
    """A checkpoint that was taken.

    Attributes:
        snapshot: Ours.
        was_there: Whether it was there at the start of this session.
    """

    snapshot: Snapshot
    was_there: bool


class _ClosingError(Exception):
    """The follower is being closed; its thread ends."""


class Follower:
    """Follows one run.

    Args:
        settings: Of the run.
        path: Its directory.
        directory: Where snapshots go.
        known: Step -> version of what was taken before.
        first_step: Given the steps that are complete at the start, the first one to be taken.
        reporter: Told what is taken and what is not; from the thread.
    """

    def __init__(
        self,
        settings: RunConfig,
        path: Path,
        directory: Path,
        known: Mapping[int, str],
        first_step: Callable[[list[int]], int],
        reporter: Reporter,
    ) -> None:
        self._settings, self._directory = settings, directory
        self._watcher = RunWatcher(path, settings.layout, kind=settings.kind, missing=missing)
        self._known, self._choose_first, self._reporter = dict(known), first_step, reporter
        self._first_step = 0
        self._has_begun = False
        self._new: list[Taken] = []
        self._incomplete: dict[int, tuple[float, bool]] = {}
        self._refused: dict[int, str] = {}
        self._changed = threading.Condition()
        self._problem: Exception | None = None
        self._looks = 0
        self._is_finished = False
        self._last_news = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(timeout=60)

    @property
    def idle_s(self) -> float:
        """Seconds since the last new checkpoint, or since the start."""
        with self._changed:
            return time.monotonic() - self._last_news

    @property
    def is_finished(self) -> bool:
        """Whether the run is over, and everything complete is taken."""
        with self._changed:
            return self._is_finished

    @property
    def has_news(self) -> bool:
        """Whether something was taken since the last `drain`."""
        with self._changed:
            return bool(self._new)

    def drain(self) -> list[Taken]:
        """What was taken since the last call, by step.

        Raises:
            Exception: What ended the thread.
        """
        with self._changed:
            if self._problem is not None:
                raise self._problem
            new, self._new = self._new, []
            return new

    def wait(self, seconds: float) -> None:
        """Wait for something new, so long at most."""
        with self._changed:
            if not self._new and self._problem is None:
                self._changed.wait(seconds)

    def wait_for_start(self) -> None:
        """Wait until what was there at the start is taken."""
        with self._changed:
            while not self._has_begun and self._problem is None:
                self._changed.wait(1.0)

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                self.look()
                self._closing.wait(self._settings.poll_s)
        except _ClosingError:
            return
        except Exception as error:  # raised for whoever asks next
            with self._changed:
                self._problem = error
                self._changed.notify_all()

    def look(self) -> None:
        """Look once at the run and take what is new, as the thread does every `poll_s`."""
        try:
            found = self._watcher.scan()
        except OSError as error:
            self._reporter.say(f"the run's directory cannot be read just now: {error}")
            return
        complete = {item.step: item for item in found if item.complete}
        # Most layouts tell complete checkpoints at the second look only.
        begins = not self._has_begun and (bool(complete) or not found or self._looks > 0)
        if begins:
            self._first_step = self._choose_first(sorted(complete))
        new = [
            item
            for step, item in complete.items()
            if self._known.get(step) != item.version and step >= self._first_step
        ]
        left = [item for item in new if not self._take(item, begins)]
        self._tell_incomplete([item for item in found if not item.complete])
        newest = complete[max(complete)] if complete else None
        last_step = self._settings.last_step
        is_last = newest is not None and (
            self._watcher.is_last(newest) or (last_step is not None and newest.step >= last_step)
        )
        with self._changed:
            self._looks += 1
            self._has_begun = self._has_begun or begins
            self._is_finished = is_last and not left
            self._changed.notify_all()

    def _take(self, item: Found, was_there: bool) -> bool:
        """Take a snapshot; returns whether that is settled."""
        rate = self._settings.copy_mb_per_s
        snapshot: Snapshot | None = None
        try:
            snapshot, reason = take(
                item,
                self._watcher,
                self._directory,
                bytes_per_s=None if rate is None else rate * _MEGABYTE,
                pause=self._stop_if_closing,
            )
        except OSError as error:  # a full disk, say, which may have room again later
            reason = str(error)
        if snapshot is None:
            if self._refused.get(item.step) != reason:
                self._refused[item.step] = reason
                self._reporter.say(f"step {item.step}: not taken, {reason}; looking again")
            return False
        with self._changed:
            self._known[item.step] = item.version
            self._new.append(Taken(snapshot, was_there))
            late = [taken for taken in self._new if not taken.was_there]
            dropped = late[: max(0, len(late) - self._settings.max_held)]
            self._new = [taken for taken in self._new if taken not in dropped]
            self._last_news = time.monotonic()
            self._changed.notify_all()
        for taken in dropped:
            remove(taken.snapshot)
            self._reporter.say(
                f"step {taken.snapshot.step}: let go, without a merge: {self._settings.max_held} "
                f"newer ones wait (run.max_held)"
            )
        return True

    def _stop_if_closing(self) -> None:
        if self._closing.is_set():
            raise _ClosingError

    def _tell_incomplete(self, found: list[Found]) -> None:
        """Say once what is missing of a checkpoint that has been incomplete for long."""
        now = time.monotonic()
        steps = {item.step for item in found}
        self._incomplete = {s: since for s, since in self._incomplete.items() if s in steps}
        for item in found:
            since, is_told = self._incomplete.setdefault(item.step, (now, False))
            if not is_told and now - since >= self._settings.incomplete_after_s:
                self._incomplete[item.step] = (since, True)
                self._reporter.say(
                    f"step {item.step}: still not complete after {now - since:.0f} s: {item.reason}"
                )

"""Prints what training workers write while they run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arm_ray.report.scalars import TRAINING_STEP, Record
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.progress import LINE_INTERVAL_S, duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.training.config import TrainingConfig
from arm_ray.training.records import LOG_NAME, read_log

_POLL_S = 0.5


def step_record(entry: Mapping[str, Any]) -> Record:
    """An entry of the log as an event."""
    return {"event": TRAINING_STEP, **entry}


class LogFollower:
    """Prints what the workers write while they run, and passes their steps on."""

    def __init__(
        self,
        config: TrainingConfig,
        saves: list[int],
        scratch: Path,
        reporter: Reporter,
        took_step: Callable[[Record], None],
    ) -> None:
        self._config, self._last, self._reporter = config, saves[-1], reporter
        self._took_step = took_step
        self._log = config.output / LOG_NAME
        self._notes = scratch / "notes.txt"
        self._notes_told = 0
        self._shown = 0
        self._seen: tuple[int, int] | None = None
        self._last_line = time.monotonic()

    def wait_for(self, work: Callable[[], Any]) -> BaseException | None:
        """Do blocking work in a thread, and print meanwhile; returns what it raised."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        # What an earlier session wrote is not news.
        self._shown = max((entry["step"] for entry in read_log(self._log)), default=0)
        # In a thread, because the main one is for Ctrl-C.
        thread = threading.Thread(target=run, name="ray-train", daemon=True)
        thread.start()
        with activity("starting the training workers") as doing:
            while thread.is_alive():
                thread.join(_POLL_S)
                before = self._shown
                self._print()
                if self._shown != before:
                    doing.becomes(f"step {self._shown + 1} of {self._last}")
        self._print()
        return raised[0] if raised else None

    def _print(self) -> None:
        if self._notes.is_file():
            notes = self._notes.read_text(encoding="utf-8").splitlines()
            for line in notes[self._notes_told :]:
                self._reporter.say(line)
            self._notes_told = len(notes)
        try:
            stat = self._log.stat()
        except OSError:
            return
        if self._seen == (stat.st_mtime_ns, stat.st_size):
            return
        self._seen = (stat.st_mtime_ns, stat.st_size)
        entries = read_log(self._log)
        # A run that goes on writes its last steps again.
        self._shown = min(self._shown, max((e["step"] for e in entries), default=0))
        for i, entry in enumerate(entries):
            step = entry["step"]
            if step > self._shown:
                self._took_step(step_record(entry))
            if step > self._shown and self._is_told(step):
                self._reporter.say(self._line(entries, i))
                self._last_line = time.monotonic()
        self._shown = max((e["step"] for e in entries), default=0)

    def _is_told(self, step: int) -> bool:
        # The first one says how long the others will take.
        is_chosen = step % self._config.log_every == 0 or step in (1, self._last)
        return is_chosen or time.monotonic() - self._last_line > LINE_INTERVAL_S

    def _line(self, entries: list[dict[str, Any]], i: int) -> str:
        entry, first = entries[i], entries[max(0, i - 10)]
        step = entry["step"]
        # Of the last ten steps; the very first one began at 0.
        passed = entry["seconds"] - (first["seconds"] if i else 0.0)
        each = passed / max(1, step - first["step"]) if i else passed
        reward = f"  reward {entry['reward']:.3f}" if entry.get("reward") is not None else ""
        return (
            f"step {step}/{self._last}  loss {entry['loss']:.4f}{reward}  "
            f"lr {entry['learning_rate']:.2e}  {each:.2f} s/step  "
            f"ETA {duration(each * (self._last - step))}"
        )

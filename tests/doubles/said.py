"""A reporter whose lines a test can read."""

from __future__ import annotations

import io

from rich.console import Console

from arm_ray.events import EventLog
from arm_ray.runtime.session.reporter import Reporter


class _Lines(io.StringIO):
    """A file that puts each whole line into a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines, self._begun = lines, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        self._lines += whole
        return len(text)


def reporter_into(lines: list[str], events: EventLog | None = None) -> Reporter:
    """A reporter that appends its lines to a list."""
    return Reporter(Console(file=_Lines(lines), width=80), events)

"""A reporter whose lines a test can read."""

from __future__ import annotations

import io

from rich.console import Console

from arm_ray.events import EventLog
from arm_ray.runtime.session.reporter import Reporter


class _Prints(io.StringIO):
    """A file that puts what each `Console.print` writes into a list."""

    def __init__(self, prints: list[str]) -> None:
        super().__init__()
        self._prints = prints

    def write(self, text: str) -> int:
        self._prints.append(text.removesuffix("\n"))
        return len(text)


def reporter_into(lines: list[str], events: EventLog | None = None) -> Reporter:
    """A reporter that appends what it says to a list, one entry for each time."""
    return Reporter(Console(file=_Prints(lines), width=80), events)

"""The one place that a job's lines and events go through."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from rich.console import Console

from arm_ray.events import Event, EventLog, Warned
from arm_ray.secrets import hidden


@dataclass(frozen=True)
class Reporter:
    """Tells people on a console, and machines in an event log, what happens.

    Attributes:
        console: Where lines go.
        events: Where events go; None: there is no log, or not yet.
        prefix: Stands before each line, to say what it is about.
    """

    console: Console
    events: EventLog | None = None
    prefix: str = ""

    def with_events(self, events: EventLog) -> Reporter:
        """The same, with an event log."""
        return replace(self, events=events)

    def about(self, what: str) -> Reporter:
        """The same, with `what: ` before each line."""
        return replace(self, prefix=f"{self.prefix}{what}: ")

    def say(self, line: str) -> None:
        """Print a line for people."""
        print_line(self.console, f"{self.prefix}{line}")

    def warn(self, message: str) -> None:
        """Print a warning, and write it down."""
        message = f"{self.prefix}{message}"
        # The disk may be what is full.
        with contextlib.suppress(OSError):
            self.write(Warned(message))
        print_line(self.console, f"warning: {message}", style="yellow")

    def note(self, message: str) -> None:
        """Print a line that is also worth keeping, and write it down as a warning."""
        self.write(Warned(message))
        self.say(message)

    def write(self, event: Event) -> None:
        """Write an event down, where there is a log."""
        if self.events is not None:
            self.events.write(event)


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is, but for secrets: not cut, wrapped or coloured by what is in it."""
    console.print(hidden(line), style=style, highlight=False, markup=False, soft_wrap=True)

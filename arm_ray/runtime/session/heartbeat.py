"""Says what goes on wherever nothing else is printed for a while.

A job's parts name what they do with `activity`; `heartbeat` prints the newest of these names when
it has gone on for a second, and again, with for how long, once a console has been silent for some
seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleRenderable, RenderHook

from arm_ray.runtime.session.progress import LINE_INTERVAL_S, duration
from arm_ray.runtime.session.reporter import print_line

# What is over sooner need not be told.
_FIRST_S = 1.0
_LOOKS_EVERY_S = 0.5


@dataclass(eq=False)
class Activity:
    """What goes on, in words, since when (`time.monotonic`), and whether that it began was told."""

    what: str
    since: float
    is_told: bool = False

    def becomes(self, what: str) -> None:
        """Give it another name, from now on."""
        self.what, self.since = what, time.monotonic()


# Of this process, because a job's parts run in several threads. The newest is the last.
_activities: list[Activity] = []
_beating: set[int] = set()


@contextlib.contextmanager
def activity(what: str) -> Iterator[Activity]:
    """Name what is done within the context.

    Args:
        what: In words that go before "12 s so far": "starting Ray".
    """
    entry = Activity(what, time.monotonic())
    _activities.append(entry)
    try:
        yield entry
    finally:
        _activities.remove(entry)


class Silence(RenderHook):
    """Knows for how long a console has printed nothing; a moving bar counts as printing.

    Args:
        limit_s: Seconds of silence after which something is to be said.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last = time.monotonic()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by the console with all that it prints."""
        self._last = time.monotonic()
        return renderables

    def due_in(self, now: float) -> float:
        """Seconds until the silence is too long; 0 or less: it is."""
        return self._last + self._limit_s - now

    def line(self, now: float) -> str | None:
        """What to print now; None where the silence is not too long, or nothing has a name."""
        # Others may end theirs meanwhile.
        activities = list(_activities)
        if not activities:
            return None
        newest = activities[-1]
        begins = max(newest.since, self._last) + _FIRST_S <= now and not newest.is_told
        if self.due_in(now) > 0.0 and not begins:
            return None
        for each in activities:
            # What goes on around it needs no line when it is the newest again.
            each.is_told = True
        if begins and now - newest.since < self._limit_s:
            return f"  {newest.what} …"
        return f"  {newest.what}: {duration(now - newest.since)} so far"


@contextlib.contextmanager
def heartbeat(console: Console, limit_s: float = LINE_INTERVAL_S) -> Iterator[None]:
    """Have a console name what begins, and never silent for longer than some seconds meanwhile.

    Within another heartbeat of the same console, this one does nothing.
    """
    if id(console) in _beating:
        yield
        return
    _beating.add(id(console))
    silence, is_over = Silence(limit_s), threading.Event()
    console.push_render_hook(silence)

    def beat() -> None:
        while not is_over.wait(_LOOKS_EVERY_S):
            line = silence.line(time.monotonic())
            if line is not None:
                print_line(console, line)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        console.pop_render_hook()
        _beating.discard(id(console))

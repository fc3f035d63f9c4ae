"""Wait for what a test needs, and no longer."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest


def is_met(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether a condition holds now or begins to, within so many seconds."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: It did not within that time; with `what`.
    """
    assert is_met(condition, within_s), f"not within {within_s:.0f} s: {what}"


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to ask how it ended."""
    state = status(pid)
    return not state or state[0] == "Z"


def cpu_ticks(pid: int) -> int:
    """Processor time of a process, in ticks of the clock; 0 of one that is gone."""
    state = status(pid)
    return int(state[11]) + int(state[12]) if state else 0


def status(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the program's name; none of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


# Nothing here takes a second; what hangs would hang for ever.
_HANGS_S = 20


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """End what waits for ever, so that it fails and does not stop all other tests."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

"""A limit on the time that a piece of work may take, by alarm. Main thread only."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class LimitExceededError(BaseException):
    """Time is up. No ``Exception``, so that handlers of "whatever fails" do not take it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises in the body once its time is up; again and again, should a bare ``except`` take it.

    Code that stays in C is not interrupted; that is what the pool's deadline is for.

    Args:
        seconds: The time, above 0.

    Raises:
        LimitExceededError: In the body, when its time is up.
    """
    armed = True

    def ring(_: int, __: FrameType | None) -> None:
        if armed:
            raise LimitExceededError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 0.5))
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

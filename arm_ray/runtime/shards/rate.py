"""A bound on how fast a process reads and writes: a neighbour gets its share of the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """Lets so many bytes pass in a second on average, counted since the last pause.

    Args:
        bytes_per_s: The rate; None: no limit.
        clock: Seconds, from any beginning.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._lock = threading.Lock()
        self._paid_until = clock()

    def spend(self, num_bytes: int) -> None:
        """Count some bytes, and wait until they are within the rate. Safe for threads."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._paid_until = max(now, self._paid_until) + num_bytes / self._rate
            delay = self._paid_until - now
        if delay > 0.0:
            self._sleep(delay)

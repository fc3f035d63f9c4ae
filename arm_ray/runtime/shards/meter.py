"""Counts what a layer shard does, and bounds how fast it reads and writes."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ShardUsage:
    """What a shard has done since it was asked last; times in seconds, sizes in bytes.

    Attributes:
        forward_seconds: In forward passes.
        merge_seconds: In merging.
        sent_bytes: Of hidden states that were given to the next shard, for one iteration.
        fetched_bytes: Of weights that came from elsewhere than the shard's own node.
    """

    forward_seconds: float = 0.0
    merge_seconds: float = 0.0
    sent_bytes: int = 0
    fetched_bytes: int = 0


class Meter:
    """Adds up what was done since it was asked last. Safe for threads: some read ahead."""

    def __init__(self) -> None:
        self._usage = ShardUsage()
        self._sent: dict[int, int] = {}
        self._lock = threading.Lock()

    def count(self, **added: float) -> None:
        """Add to fields of `ShardUsage`."""
        with self._lock:
            usage = self._usage
            self._usage = replace(usage, **{k: getattr(usage, k) + v for k, v in added.items()})

    def count_fetched(self, num_bytes: int) -> None:
        """Count weights that came from elsewhere than the shard's node."""
        self.count(fetched_bytes=num_bytes)

    def count_sent(self, iteration: int, num_bytes: int) -> None:
        """Count hidden states that go to the next shard."""
        with self._lock:
            self._sent[iteration] = self._sent.get(iteration, 0) + num_bytes

    def take(self, iteration: int) -> ShardUsage:
        """What was done since the last call, and sent for an iteration that is finished."""
        with self._lock:
            usage, self._usage = self._usage, ShardUsage()
            return replace(usage, sent_bytes=self._sent.pop(iteration, 0))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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

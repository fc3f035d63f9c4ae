"""Counts what a layer shard does, and bounds how fast it reads and writes."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from arm_ray.events import Span

# Most spans of an iteration, and the pause in seconds that is left out.
MOST_SPANS, _PAUSE_S = 48, 0.02


@dataclass(frozen=True)
class ShardUsage:
    """What a shard has done since it was asked last; times in seconds, sizes in bytes.

    Attributes:
        forward_seconds: In forward passes.
        merge_seconds: In merging.
        sent_bytes: Of hidden states that were given to the next shard, for one iteration.
        fetched_bytes: Of weights that came from elsewhere than the shard's own node.
        spans: When it did what, at most `MOST_SPANS`.
    """

    forward_seconds: float = 0.0
    merge_seconds: float = 0.0
    sent_bytes: int = 0
    fetched_bytes: int = 0
    spans: tuple[Span, ...] = ()


class Meter:
    """Adds up what was done since it was asked last. Safe for threads: some read ahead."""

    def __init__(self) -> None:
        self._usage = ShardUsage()
        self._spans: list[Span] = []
        self._sent: dict[int, int] = {}
        self._lock = threading.Lock()

    def count(self, **added: float) -> None:
        """Add to fields of `ShardUsage`."""
        with self._lock:
            usage = self._usage
            self._usage = replace(usage, **{k: getattr(usage, k) + v for k, v in added.items()})

    def worked(self, kind: Literal["forward", "merge"], seconds: float) -> None:
        """Count work that has just ended, and when it was done."""
        span = (kind, time.time() - seconds, seconds)
        with self._lock:
            name = f"{kind}_seconds"
            self._usage = replace(self._usage, **{name: getattr(self._usage, name) + seconds})
            self._spans = _joined([*self._spans, span])
            if len(self._spans) > MOST_SPANS:
                self._spans = _joined(_without_shortest(self._spans))

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
            spans, self._spans = self._spans, []
            rounded = tuple((kind, round(at, 3), round(s, 3)) for kind, at, s in spans)
            return replace(usage, sent_bytes=self._sent.pop(iteration, 0), spans=rounded)


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans of the same kind as one where the pause between them is short."""
    joined: list[Span] = []
    for kind, start, seconds in spans:
        if joined and joined[-1][0] == kind:
            _, begun, lasted = joined[-1]
            if start - (begun + lasted) <= _PAUSE_S:
                joined[-1] = (kind, begun, max(lasted, start + seconds - begun))
                continue
        joined.append((kind, start, seconds))
    return joined


def _without_shortest(spans: Sequence[Span]) -> list[Span]:
    """One span fewer: the shortest counts as what was done next to it, with the pause between."""
    at = min(range(len(spans)), key=lambda i: spans[i][2])
    pauses = {
        i: spans[i + 1][1] - sum(spans[i][1:]) for i in (at - 1, at) if 0 <= i < len(spans) - 1
    }
    left = min(pauses, key=pauses.__getitem__)
    pair = spans[left], spans[left + 1]
    start = pair[0][1]
    end = max(sum(span[1:]) for span in pair)
    kind = max(pair, key=lambda span: span[2])[0]
    return [*spans[:left], (kind, start, end - start), *spans[left + 2 :]]


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a shard's GPU; bytes.

    Attributes:
        name: Of the GPU.
        total: All of it.
        available: What no other process has.
    """

    name: str
    total: int
    available: int


def device_memory(device: torch.device) -> DeviceMemory:
    """Of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return DeviceMemory(torch.cuda.get_device_name(device), total, free + own)


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

"""What a shard did, and when."""

from __future__ import annotations

import pytest

from arm_ray.runtime.shards import meter
from arm_ray.runtime.shards.meter import MOST_SPANS, Meter


class Clock:
    """The time of day, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(meter.time, "time", lambda: self.now)

    def work(self, counted: Meter, kind: str, seconds: float, pause: float = 0.0) -> None:
        self.now += pause + seconds
        counted.worked(kind, seconds)  # type: ignore[arg-type]


def test_short_pauses_are_left_out_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = Clock(monkeypatch), Meter()
    clock.work(counted, "forward", 1.0)
    clock.work(counted, "forward", 2.0, pause=0.01)
    clock.work(counted, "forward", 1.0, pause=0.5)
    clock.work(counted, "merge", 0.25)
    usage = counted.take(1)
    assert usage.spans == (
        ("forward", 1000.0, 3.01),
        ("forward", 1003.51, 1.0),
        ("merge", 1004.51, 0.25),
    )
    assert (usage.forward_seconds, usage.merge_seconds) == (4.0, 0.25)
    assert counted.take(2).spans == ()


def test_many_spans_become_fewer_and_lose_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = Clock(monkeypatch), Meter()
    for _ in range(1000):
        clock.work(counted, "forward", 1.0, pause=0.5)
    usage = counted.take(1)
    assert 1 <= len(usage.spans) <= MOST_SPANS
    assert usage.forward_seconds == 1000.0
    assert usage.spans[0][1] == 1000.5
    end = usage.spans[-1][1] + usage.spans[-1][2]
    assert end == pytest.approx(clock.now)
    assert sum(seconds for _, _, seconds in usage.spans) >= 1000.0


def test_kinds_that_alternate_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = Clock(monkeypatch), Meter()
    for _ in range(5):
        clock.work(counted, "forward", 1.0)
        clock.work(counted, "merge", 1.0)
    assert [kind for kind, _, _ in counted.take(1).spans] == ["forward", "merge"] * 5


@pytest.mark.parametrize("merge_s", [0.25, 1.0, 4.0])
def test_many_kinds_that_alternate_become_fewer_too(
    monkeypatch: pytest.MonkeyPatch, merge_s: float
) -> None:
    """As under `runtime.residency` host and disk, where each layer group is run and merged."""
    clock, counted = Clock(monkeypatch), Meter()
    for _ in range(500):
        clock.work(counted, "forward", 1.0)
        clock.work(counted, "merge", merge_s, pause=0.001)
    usage = counted.take(1)
    assert 1 <= len(usage.spans) <= MOST_SPANS
    assert (usage.forward_seconds, usage.merge_seconds) == (500.0, 500.0 * merge_s)
    # From the first to the last, one after the other.
    assert usage.spans[0][1] == pytest.approx(1000.0)
    assert sum(usage.spans[-1][1:]) == pytest.approx(clock.now)  # type: ignore[arg-type]
    ends = [start + seconds for _, start, seconds in usage.spans]
    starts = [start for _, start, _ in usage.spans]
    assert all(after >= end - 0.01 for end, after in zip(ends, starts[1:], strict=False))


def test_the_shortest_span_counts_as_what_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = Clock(monkeypatch), Meter()
    for _ in range(MOST_SPANS // 2 - 1):
        clock.work(counted, "forward", 2.0, pause=1.0)
        clock.work(counted, "merge", 2.0, pause=1.0)
    clock.work(counted, "forward", 2.0, pause=5.0)
    start = clock.now + 0.5
    clock.work(counted, "merge", 0.1, pause=0.5)
    clock.work(counted, "forward", 2.0, pause=0.75)
    spans = counted.take(1).spans
    assert len(spans) == MOST_SPANS
    assert spans[-2] == ("forward", round(start - 2.5, 3), 2.6)
    assert spans[-1] == ("forward", round(start + 0.85, 3), 2.0)

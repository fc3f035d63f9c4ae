"""How long a merge says it will still take, on a clock that the test turns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from arm_ray.runtime.session import progress
from arm_ray.runtime.session.progress import MergeProgress


class Clock:
    """Seconds, in the place of `time.monotonic`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def _lines(out: io.StringIO) -> list[str]:
    return [line.split("  ")[-1] for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_comes_before_the_first_layer_is_not_counted_for_each(
    clock: Clock, is_terminal: bool
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120, height=20)
    shown = MergeProgress(console, first=1, last=3, groups=4)
    with shown.shown():
        # Forward passes of all layers, and the search of a step; then the merges.
        clock.now += 70.0
        shown.advance(1, 1, 4)
        clock.now += 10.0
        shown.advance(1, 2, 4)
        # Of 70 + 3 * 10 s for each iteration, 80 are over.
        assert shown._eta(1) == pytest.approx(20.0 + 2 * 100.0)
        clock.now += 14.0
        shown.advance(1, 3, 4)
        assert shown._eta(1) == pytest.approx(12.0 + 2 * 106.0)
        clock.now += 26.0
        shown.finish_iteration(1, "anchoring", 0.99, None, 120.0)
        clock.now += 59.0
        shown.advance(2, 1, 4)
        assert shown._eta(2) == pytest.approx(120.0 - 59.0 + 120.0)
        clock.now += 21.0
        shown.finish_iteration(2, "anchoring", 0.99, 0.5, 80.0)
        # One that takes longer than those before.
        clock.now += 130.0
        shown.advance(3, 1, 4)
        clock.now += 10.0
        shown.advance(3, 2, 4)
        assert shown._eta(3) == pytest.approx(2 * 10.0)
        clock.now += 10.0
        shown.finish_iteration(3, "sliding_window", 0.99, 0.5, 150.0)
    if is_terminal:
        # The bar as it was last.
        assert "ETA 20.0 s" in out.getvalue()
        return
    assert _lines(out) == [
        "layer 1/4",
        "ETA 3 min 40 s",
        "ETA 3 min 44 s",
        "ETA at most 4 min 00 s",
        "ETA 3 min 01 s",
        "ETA at most 1 min 40 s",
        "ETA 0.0 s",
        "ETA 20.0 s",
        "2 min 30 s",
    ]


def test_a_session_that_goes_on_counts_its_own_iterations(clock: Clock) -> None:
    out = io.StringIO()
    shown = MergeProgress(Console(file=out), first=5, last=6, groups=2)
    clock.now += 6.0
    shown.advance(5, 1, 2)
    clock.now += 4.0
    shown.finish_iteration(5, "anchoring", 0.99, 0.5, 10.0)
    assert _lines(out) == ["ETA at most 10.0 s"]

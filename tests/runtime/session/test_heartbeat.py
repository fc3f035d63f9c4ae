"""Nothing is silent for long: see `arm_ray.runtime.session.heartbeat`."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from arm_ray.runtime.session import heartbeat as module
from arm_ray.runtime.session.heartbeat import Silence, activity, heartbeat


class Pipe(io.StringIO):
    """A file that says when something with a text in it is written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text, self.came = text, threading.Event()

    def write(self, given: str) -> int:
        """Write, and look for the text in all that is there."""
        count = super().write(given)
        if self._text in self.getvalue():
            self.came.set()
        return count


def test_a_line_names_the_newest_activity_after_the_silence() -> None:
    silence = Silence(8.0)
    now = time.monotonic()
    with activity("merging"), activity("starting Ray"):
        assert silence.line(now + 0.5) is None
        assert silence.line(now + 1.5) == "  starting Ray …"
        assert silence.line(now + 7.0) is None
        assert silence.line(now + 9.0) == "  starting Ray: 9.0 s so far"
    assert silence.line(now + 9.0) is None


def test_what_goes_on_around_is_not_told_again_when_its_parts_are_over() -> None:
    silence = Silence(8.0)
    now = time.monotonic()
    with activity("merging"):
        with activity("starting Ray"):
            assert silence.line(now + 1.5) == "  starting Ray …"
        assert silence.line(now + 3.0) is None
        with activity("starting 2 layer shard(s)"):
            begun = time.monotonic()
            assert silence.line(begun + 1.5) == "  starting 2 layer shard(s) …"
        assert silence.line(now + 9.0) == "  merging: 9.0 s so far"


def test_what_has_been_printed_just_now_comes_before_what_begins() -> None:
    silence = Silence(8.0)
    console = Console(file=io.StringIO())
    console.push_render_hook(silence)
    with activity("writing the model"):
        time.sleep(0.2)
        console.print("iteration 3/3")
        printed = time.monotonic()
        assert silence.line(printed + 0.9) is None
        assert silence.line(printed + 1.1) == "  writing the model …"


def test_what_ends_first_need_not_be_the_newest() -> None:
    silence = Silence(0.0)
    first = activity("scoring state-0001")
    first.__enter__()
    with activity("iteration 2 of 3"):
        first.__exit__(None, None, None)
        said = silence.line(time.monotonic() + 1.0)
    assert said is not None
    assert said.startswith("  iteration 2 of 3: ")


def test_what_is_printed_breaks_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    silence = Silence(8.0)
    console = Console(file=io.StringIO())
    console.push_render_hook(silence)
    clock[0] = 107.0
    console.print("iteration 1/3")
    assert silence.due_in(107.0) == 8.0
    assert silence.due_in(116.0) == -1.0


def test_a_silent_console_is_broken_and_left_as_it_was() -> None:
    pipe = Pipe("  starting the engine: ")
    console = Console(file=pipe)
    hooks: Any = console._render_hooks
    with heartbeat(console, limit_s=0.0), heartbeat(console, limit_s=0.0):
        assert len(hooks) == 1
        with activity("starting the engine"):
            assert pipe.came.wait(30.0)
    assert not hooks
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]

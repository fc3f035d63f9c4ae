"""A local Ray that starts while inputs are checked: see `start_ray_early`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import yaml

from arm_ray.errors import WorkerError
from arm_ray.runtime.cluster import joining
from arm_ray.runtime.cluster.joining import end_unused_ray, ray_session, start_ray_early
from tests.builders.merge_case import MergeCase
from tests.builders.processes import started_with

ABOUT = {"job": "merge"}


class Calls:
    """Stands for Ray: what was called, and in which thread."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.slots: list[int] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.error: Exception | None = None

    def init(self, **options: Any) -> None:
        """Start, when the test lets it."""
        self.slots.append(options["num_cpus"])
        assert self.goes_on.wait(30.0)
        self.made.append(("init", threading.current_thread().name))
        if self.error is not None:
            raise self.error

    def shutdown(self) -> None:
        """End."""
        self.made.append(("shutdown", threading.current_thread().name))

    @property
    def names(self) -> list[str]:
        """What was called, in order."""
        return [name for name, _ in self.made]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    made = Calls()
    monkeypatch.setattr(ray, "init", made.init)
    monkeypatch.setattr(ray, "shutdown", made.shutdown)
    monkeypatch.setattr(ray, "is_initialized", lambda: made.names[-1:] == ["init"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield made
    end_unused_ray()
    assert not [t for t in threading.enumerate() if t.name == "early Ray"]


def test_the_first_session_takes_it_and_ends_it(calls: Calls) -> None:
    calls.goes_on.clear()
    start_ray_early(2, ABOUT)
    assert calls.names == []
    calls.goes_on.set()
    with ray_session(None, 2, ABOUT):
        assert calls.made == [("init", "early Ray")]
        # Linux ends Ray's processes with the thread that started them.
        assert "early Ray" in [t.name for t in threading.enumerate()]
        with ray_session(None, 2, ABOUT):
            pass
        assert calls.names == ["init"]
    assert calls.made[1:] == [("shutdown", "MainThread")]


def test_one_that_nobody_takes_is_ended_when_it_is_up(calls: Calls) -> None:
    calls.goes_on.clear()
    start_ray_early(2, ABOUT)
    threading.Timer(0.2, calls.goes_on.set).start()
    end_unused_ray()
    assert calls.names == ["init", "shutdown"]
    end_unused_ray()
    assert calls.names == ["init", "shutdown"]


def test_one_that_does_not_start_is_told_by_the_session(calls: Calls) -> None:
    calls.error = OSError("no room for sockets")
    start_ray_early(2, ABOUT)
    with pytest.raises(WorkerError, match="no room for sockets"), ray_session(None, 2, ABOUT):
        raise AssertionError("it has not started")
    assert joining._early is None


def test_one_that_is_too_small_is_started_anew(calls: Calls) -> None:
    start_ray_early(2, ABOUT)
    with ray_session(None, 5, ABOUT):
        assert calls.names == ["init", "shutdown", "init"]
        assert calls.slots == [2, 5]


def test_it_is_ended_where_the_wait_for_it_is_interrupted(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_ray_early(2, ABOUT)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(joining._EarlyRay, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), ray_session(None, 2, ABOUT):
        raise AssertionError("it was interrupted")
    assert calls.names == ["init", "shutdown"]


def test_where_ray_is_up_there_is_nothing_to_start(calls: Calls) -> None:
    ray.init(num_cpus=1)
    start_ray_early(2, ABOUT)
    assert joining._early is None


@pytest.mark.processes
def test_a_refused_merge_is_told_before_ray_is_up_and_leaves_nothing(case: MergeCase) -> None:
    case.make("smollm2")
    (case.root / "checkpoint-20" / "model.safetensors").unlink()
    config = case.config("runtime.layer_shards=2").model_dump(mode="json", exclude_unset=True)
    file = case.root / "merge.yaml"
    file.write_text(yaml.safe_dump(config))
    mark = f"ARM_RAY_TEST={case.root}"
    with subprocess.Popen(
        [sys.executable, "-m", "arm_ray.cli", "merge", str(file)],
        env=os.environ | dict([mark.split("=", 1)]),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert process.pid in [each.pid for each in started_with(mark)]
        rest = process.stderr.read()
    assert first.startswith("arm_ray ")
    assert f"merge in {case.root}" in first
    assert process.returncode == 1
    assert "error: " in rest
    assert "checkpoint-20" in rest
    assert "starting Ray" not in rest
    assert started_with(mark) == []

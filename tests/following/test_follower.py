"""Which checkpoints a follower takes at the start, and what it does when it cannot."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arm_ray.following.config import RunConfig
from arm_ray.following.snapshots import snapshots
from arm_ray.runtime.attach import follower as follower_module
from arm_ray.runtime.attach.follower import Follower, Taken
from tests.builders.files import write
from tests.doubles.said import reporter_into


def hf(run: Path, step: int) -> None:
    write(run / f"checkpoint-{step}/model.safetensors", f"weights {step}")
    write(run / f"checkpoint-{step}/config.json")
    write(run / f"checkpoint-{step}/trainer_state.json", f'{{"global_step": {step}}}')


def deepspeed(run: Path, step: int) -> None:
    write(run / f"global_step{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt", str(step))


@pytest.fixture(autouse=True)
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "missing", lambda _path: None)


class Session:
    """A follower of a run, by hand."""

    def __init__(self, root: Path, first: Callable[[list[int]], int], **settings: Any) -> None:
        self.told: list[str] = []
        self.asked: list[list[int]] = []

        def first_step(complete: list[int]) -> int:
            self.asked.append(complete)
            return first(complete)

        config = RunConfig(path=str(root / "run"), poll_s=0.05, **settings)
        ours = root / "ours"
        self.follower = Follower(
            config, root / "run", ours, {}, first_step, reporter_into(self.told)
        )

    def look(self) -> None:
        """Look without the thread, as often as it takes to see what is complete."""
        for _ in range(2):
            self.follower.look()

    def until(self, count: int) -> list[Taken]:
        found: list[Taken] = []
        deadline = time.monotonic() + 20
        while len(found) < count and time.monotonic() < deadline:
            self.follower.wait(0.1)
            found += self.follower.drain()
        return found


@pytest.mark.parametrize("write_step", [hf, deepspeed])
def test_what_is_there_at_the_start_is_told_apart(
    tmp_path: Path, write_step: Callable[[Path, int], None]
) -> None:
    for step in (10, 20, 30, 40):
        write_step(tmp_path / "run", step)
    session = Session(tmp_path, lambda complete: complete[-2])
    with session.follower:
        session.follower.wait_for_start()
        at_start = session.follower.drain()
        assert [(t.snapshot.step, t.was_there) for t in at_start] == [(30, True), (40, True)]
        write_step(tmp_path / "run", 50)
        later = session.until(1)
    assert [(t.snapshot.step, t.was_there) for t in later] == [(50, False)]
    assert session.asked == [[10, 20, 30, 40]]


@pytest.mark.parametrize("write_step", [hf, deepspeed])
def test_steps_before_the_first_wanted_one_are_never_taken(
    tmp_path: Path, write_step: Callable[[Path, int], None]
) -> None:
    write_step(tmp_path / "run", 10)
    session = Session(tmp_path, lambda _complete: 100)
    session.look()
    for step in (90, 100):
        write_step(tmp_path / "run", step)
    session.look()
    assert [taken.snapshot.step for taken in session.follower.drain()] == [100]
    session.look()
    assert session.follower.drain() == []


def test_a_run_that_begins_later_is_taken_from_its_first_step(tmp_path: Path) -> None:
    session = Session(tmp_path, lambda complete: min(complete, default=0))
    with session.follower:
        session.follower.wait_for_start()
        deepspeed(tmp_path / "run", 10)
        assert [t.was_there for t in session.until(1)] == [False]


def test_no_more_are_held_than_allowed(tmp_path: Path) -> None:
    hf(tmp_path / "run", 10)
    session = Session(tmp_path, lambda _complete: 0, max_held=2)
    session.look()
    for step in (20, 30, 40, 50):
        hf(tmp_path / "run", step)
        session.look()
    found = session.follower.drain()
    # What was there at the start has its turn in any case.
    assert [taken.snapshot.step for taken in found] == [10, 40, 50]
    assert [s.step for s in snapshots(tmp_path / "ours")] == [10, 40, 50]
    assert next(line for line in session.told if "let go" in line).startswith("step 20")


def test_a_full_disk_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf(tmp_path / "run", 10)
    take, calls = follower_module.take, [0]

    def full(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] < 4:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        return take(*arguments, **named)

    monkeypatch.setattr(follower_module, "take", full)
    session = Session(tmp_path, lambda _complete: 0)
    with session.follower:
        assert [taken.snapshot.step for taken in session.until(1)] == [10]
    assert len([line for line in session.told if "No space left" in line]) == 1

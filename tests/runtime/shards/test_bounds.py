"""Bounds on what a merge takes of a machine: memory, and the rate of the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.errors import PlacementError
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.shards.meter import RateLimit
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard

LINEAR = "method.operator=task_arithmetic"


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def test_bytes_take_their_time() -> None:
    clock = Clock()
    limit = RateLimit(1000.0, clock, clock.sleep)
    for _ in range(5):
        limit.spend(500)
    assert clock.slept == pytest.approx(2.5)
    # Time that passes by itself counts, but a pause is no credit for a burst.
    clock.now += 0.4
    limit.spend(500)
    assert clock.slept == pytest.approx(3.0)
    clock.now += 60.0
    limit.spend(2000)
    assert clock.slept == pytest.approx(5.0)


def test_without_a_rate_nothing_waits() -> None:
    clock = Clock()
    RateLimit(None, clock, clock.sleep).spend(10**12)
    assert clock.slept == 0.0


@pytest.mark.parametrize("forward", [True, False])
def test_all_that_is_read_and_written_is_counted(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, forward: bool
) -> None:
    case.make()
    counted = [0]

    def spend(self: RateLimit, num_bytes: int) -> None:
        counted[0] += num_bytes

    monkeypatch.setattr(RateLimit, "spend", spend)
    shard = DirectShard(case.config(*(() if forward else (LINEAR,))))
    merged = shard.with_forward(1) if forward else shard.linear(1)
    model = sum(tensor.nbytes for tensor in merged.values())
    # Base and two candidates are read, and one state is written with its headers, all in float32.
    assert 4 * model < counted[0] < 4.1 * model


@pytest.mark.usefixtures("local_ray")
def test_bounds_change_no_bit(case: MergeCase) -> None:
    case.make()
    bounds = ("runtime.memory_gb=3", "runtime.disk_mb_per_s=50", "runtime.residency=disk")
    free = merge(case.config(output="free"), console=Console(quiet=True))
    bound = merge(case.config(*bounds, output="bound"), console=Console(quiet=True))
    assert free.model is not None
    assert bound.model is not None
    assert_same_bits(load_all(free.model), load_all(bound.model))


@pytest.mark.usefixtures("local_ray")
def test_a_merge_that_needs_more_memory_does_not_start(case: MergeCase) -> None:
    case.make()
    config = case.config("runtime.memory_gb=0.3")
    with pytest.raises(PlacementError, match="more memory than it is given") as caught:
        merge(config, console=Console(quiet=True))
    assert "at most 0.3 GB" in str(caught.value)
    assert not list((Path(config.output) / "states").glob("*"))

"""What becomes of a shard's merged states: who waits for what, and what stays in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arm_ray.calibration.minibatch import MiniBatch, micro_batches
from arm_ray.checkpoints import states
from arm_ray.planning.state_life import StateLife
from arm_ray.runtime.shards.made_states import MadeStates
from arm_ray.runtime.shards.weights import put_aside
from arm_ray.schedule import plan_iteration
from tests.builders.checkpoints import assert_same_bits
from tests.builders.merge_case import MergeCase
from tests.builders.shards import SAMPLES, DirectShard
from tests.waiting import wait_for

# Four anchored iterations: each reads the state before, and no older one.
SCHEDULE = "schedule={anchor_iterations: 4, max_iterations: 4, tolerance: 0.0, step: fixed}"
NOTHING = StateLife(4, frozenset(), frozenset(), (), may_end_early=False)


class Steps:
    """Runs iterations of one shard as the driver would, without reading what they give."""

    def __init__(self, case: MergeCase, output: str, **life: Any) -> None:
        config = case.config(SCHEDULE, "keep_states=none", output=output)
        self.direct = DirectShard(config, life=replace(NOTHING, **life))
        self.shard = self.direct.shard
        ids = [np.arange(1 + i, 9 + i, dtype=np.int32) for i in range(SAMPLES)]
        batch = MiniBatch(1, list(range(SAMPLES)), ids)
        [self.micro] = micro_batches(batch, max_tokens=64, max_samples=64)

    def run(self, iteration: int) -> None:
        plan = plan_iteration(self.direct.config.schedule, 2, iteration)
        for chunk in self.direct.spec.chunks:
            for state in plan.inputs:
                self.shard.forward(plan, chunk, SAMPLES, state, 0, self.micro, None)
            for group in chunk:
                self.shard.merge(plan, group, np.arange(SAMPLES))

    def in_memory(self) -> list[str]:
        stored = self.shard._store.stored(0)
        return sorted(name for name in stored if name.startswith("state"))

    def weights(self, iteration: int) -> dict[str, torch.Tensor]:
        """Those of a state, written only now."""
        self.shard.on("states", "write", iteration)
        return self.direct.state(iteration)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def on_disk(steps: Steps, iteration: int) -> list[Path]:
    return sorted(states.state_directory(steps.direct.run, iteration).glob("*.safetensors"))


def test_a_state_goes_once_the_next_one_is_made(case: MergeCase) -> None:
    case.make()
    steps = Steps(case, "run")
    for iteration in (1, 2, 3, 4):
        steps.run(iteration)
        assert steps.in_memory() == [f"state-{iteration:04d}"]
        assert on_disk(steps, iteration) == []
    written = Steps(case, "written", written=frozenset({1, 2, 3, 4}))
    for iteration in (1, 2, 3, 4):
        written.run(iteration)
        parts = written.shard.on("states", "written", iteration)
        assert parts.num_bytes == sum(file.stat().st_size for file in on_disk(written, iteration))
        assert len(on_disk(written, iteration)) == 3
    assert_same_bits(steps.weights(4), written.direct.state(4))


def test_a_merge_waits_to_hear_that_an_older_state_is_not_the_end(
    case: MergeCase, thread: ThreadPoolExecutor
) -> None:
    case.make()
    steps = Steps(case, "run", may_end_early=True)
    steps.run(1)
    second = thread.submit(steps.run, 2)
    wait_for(lambda: "state-0002" in steps.in_memory(), "the first group is merged")
    assert not second.done()
    assert steps.in_memory() == ["state-0001", "state-0002"]
    steps.shard.on("states", "settle", 1, frozenset())
    second.result()
    assert steps.in_memory() == ["state-0002"]


def test_the_state_that_a_merge_ends_with_stays(
    case: MergeCase, thread: ThreadPoolExecutor
) -> None:
    case.make()
    steps = Steps(case, "run", may_end_early=True)
    steps.run(1)
    second = thread.submit(steps.run, 2)
    wait_for(lambda: "state-0002" in steps.in_memory(), "the first group is merged")
    steps.shard.abandon(1)
    second.result()
    assert "state-0001" in steps.in_memory()
    alone = Steps(case, "alone")
    alone.run(1)
    assert_same_bits(steps.weights(1), alone.weights(1))


def test_what_the_driver_holds_stays(case: MergeCase) -> None:
    case.make()
    steps = Steps(case, "run", may_end_early=True)
    steps.run(1)
    expected = {n: t.clone() for n, t in steps.weights(1).items()}
    for iteration in (2, 3):
        steps.shard.on("states", "settle", iteration - 1, frozenset({1}))
        steps.run(iteration)
    assert steps.in_memory() == ["state-0001", "state-0003"]
    for file in on_disk(steps, 1):
        file.unlink()
    assert_same_bits(expected, steps.weights(1))
    # Another one is better by now.
    steps.shard.on("states", "settle", 3, frozenset({3}))
    steps.run(4)
    assert steps.in_memory() == ["state-0003", "state-0004"]


def test_a_merge_waits_until_what_it_replaces_is_on_disk(
    case: MergeCase, thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    steps = Steps(case, "run", written=frozenset({1}))
    gate, begun, write = threading.Event(), threading.Event(), MadeStates._write

    def slow(self: MadeStates, *given: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return write(self, *given)

    monkeypatch.setattr(MadeStates, "_write", slow)
    steps.run(1)  # Writing goes on beside it.
    assert begun.wait(60)
    assert on_disk(steps, 1) == []
    second = thread.submit(steps.run, 2)
    wait_for(lambda: "state-0002" in steps.in_memory(), "the first group is merged")
    assert not second.done()
    assert "state-0001" in steps.in_memory()
    gate.set()
    second.result()
    assert len(on_disk(steps, 1)) == 3
    assert steps.in_memory() == ["state-0002"]


def test_an_error_of_the_disk_is_told_to_who_asks(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    steps = Steps(case, "run", written=frozenset({1}))

    def full(*_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(MadeStates, "_write", full)
    steps.run(1)
    steps.run(2)
    with pytest.raises(OSError, match="No space"):
        steps.shard.on("states", "written", 1)
    assert steps.shard.on("states", "written", 1).num_bytes == 0


def test_what_is_only_compared_with_goes_to_the_host(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which stands for a GPU: what is on the CPU is on the host."""
    case.make()
    steps = Steps(case, "run")
    store = steps.shard._store
    device = torch.device("meta")
    moved: list[str] = []
    store._stored = {
        (name, 0): {"w": torch.zeros(2, device=device)} for name in ("base", "candidate-1")
    }
    store.device = device

    def on_host(tensors: dict[str, torch.Tensor], _device: torch.device) -> dict[str, torch.Tensor]:
        moved.extend(tensors)
        return {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}

    monkeypatch.setattr("arm_ray.runtime.shards.weights._on_host", on_host)
    put_aside(store, 0, lambda name: name == "base")
    places = {name: w["w"].device.type for (name, _), w in store._stored.items()}
    assert places == {"base": "cpu", "candidate-1": "meta"}
    put_aside(store, 0, lambda name: name == "base")
    assert moved == ["w"]

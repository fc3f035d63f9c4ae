"""Layer shards of which others are lost in the middle of an iteration, and which take over work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arm_ray.calibration.minibatch import MiniBatch, micro_batches
from arm_ray.checkpoints import states
from arm_ray.errors import ShardLostError
from arm_ray.schedule import IterationPlan, plan_iteration
from tests.builders.merge_case import MergeCase
from tests.builders.shards import SAMPLES, DirectShard


def plan_of(shard: DirectShard) -> IterationPlan:
    return plan_iteration(shard.config.schedule, len(shard.config.candidates), 1)


def halves() -> list:
    """Eight short samples in two micro-batches."""
    ids = [np.arange(1 + i, 9 + i, dtype=np.int32) for i in range(SAMPLES)]
    return micro_batches(MiniBatch(1, list(range(SAMPLES)), ids), max_tokens=32, max_samples=4)


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_a_group_is_merged_only_of_all_samples(case: MergeCase, residency: str) -> None:
    case.make()
    shard = DirectShard(case.config(f"runtime.residency={residency}"))
    plan, (first, second) = plan_of(shard), halves()
    # What a shard sees whose neighbour dies after one micro-batch of one state: merges are queued.
    chunk = shard.spec.chunks[0]
    for state in plan.inputs:
        shard.shard.forward(plan, chunk, SAMPLES, state, 0, first, None)
    shard.shard.forward(plan, chunk, SAMPLES, plan.inputs[0], 1, second, None)
    with pytest.raises(ShardLostError, match="not all hidden states arrived") as caught:
        shard.shard.merge(plan, 0, np.arange(SAMPLES))
    assert (caught.value.where, caught.value.got) == (
        f"iteration 1, layer group 0, {plan.inputs[1]}",
        "4 samples",
    )
    file = states.group_file(states.state_directory(shard.run, 1), 0)
    assert not file.exists()
    # Nothing at all arrived of another iteration.
    with pytest.raises(ShardLostError, match=r"got: +0 samples"):
        shard.shard.merge(replace(plan, iteration=2), 0, np.arange(SAMPLES))
    for state in plan.inputs[1:]:
        shard.shard.forward(plan, chunk, SAMPLES, state, 1, second, None)
    assert shard.shard.merge(plan, 0, np.arange(SAMPLES)) is not None


def test_taking_over_the_last_group_waits_for_the_files_before_it(case: MergeCase) -> None:
    case.make()
    whole = DirectShard(case.config(output="whole"))
    whole.with_forward(1)
    shard = DirectShard(case.config("runtime.residency=disk", output="parts"))
    plan = plan_of(shard)
    for index, micro in enumerate(halves()):
        for state in plan.inputs:
            shard.shard.forward(plan, shard.spec.chunks[0], SAMPLES, state, index, micro, None)
    report = shard.shard.merge(plan, 0, np.arange(SAMPLES))
    assert report is not None
    assert shard.shard._flushes._running
    shard.shard.adopt(plan, 1, replace(report, group=1))
    assert shard.shard._flushes._running
    shard.shard.adopt(plan, 2, replace(report, group=2))
    assert not shard.shard._flushes._running


def test_the_last_layers_that_are_run_send_nothing(case: MergeCase) -> None:
    case.make()
    micro = halves()[0]

    def forward(groups: tuple[int, ...], *, is_end: bool) -> tuple[object, int]:
        config = case.config("runtime.residency=host")
        shard = DirectShard(config, groups=groups, transport="direct")
        plan = plan_of(shard)
        sent = shard.shard.forward(
            plan, range(1), SAMPLES, plan.inputs[0], 0, micro, None, is_end=is_end
        )
        return sent, len(shard.shard._hidden)

    sent, kept = forward((0, 2), is_end=False)
    assert isinstance(sent, torch.Tensor)
    assert kept == 0
    assert forward((0, 1), is_end=False) == (None, 1)
    assert forward((0, 1), is_end=True) == (None, 0)
    assert forward((0, 2), is_end=True) == (None, 0)

"""What a linear merge holds of its inputs between the rounds over a whole model."""

from __future__ import annotations

import numpy as np

from arm_ray.runtime.shards.facts import NOTHING_KNOWN
from arm_ray.schedule import plan_iteration
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard

_TIES = ("method.operator=ties", "runtime.residency=device", "calibration=null")


def test_a_round_over_the_model_leaves_nothing_mapped(case: MergeCase) -> None:
    """The files of all groups at once would be in memory, as the system counts it."""
    case.make()
    direct = DirectShard(case.config(*_TIES))
    plan = plan_iteration(direct.config.schedule, 2, 1)
    for group in direct.spec.groups:
        direct.shard.measure(plan, group, None, 0, NOTHING_KNOWN)
        assert direct.shard._store.stored(group) == []


def test_with_forward_passes_weights_on_the_device_stay(case: MergeCase) -> None:
    case.make()
    direct = DirectShard(case.config("runtime.residency=device"))
    direct.with_forward(1)
    assert np.all([direct.shard._store.stored(group) for group in direct.spec.groups])

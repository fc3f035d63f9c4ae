"""What Ray's direct transport needs of an actor before its first tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ray._private.worker import global_worker

from arm_ray.runtime.shards.layer_shard import LayerShard
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard


@pytest.mark.parametrize(("transport", "is_made"), [("gloo", True), ("object_store", False)])
def test_a_shard_makes_rays_manager_before_two_threads_do(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, transport: str, is_made: bool
) -> None:
    """See docs/ray-lost-tensor.md: Ray itself makes it without a lock."""
    case.make()
    spec = replace(DirectShard(case.config()).spec, transport=transport)
    monkeypatch.setattr(global_worker, "_rdt_manager", None)
    assert LayerShard(spec).ready() == "cpu"
    manager = global_worker._rdt_manager
    assert (manager is not None) == is_made
    assert not is_made or manager._rdt_store is not None

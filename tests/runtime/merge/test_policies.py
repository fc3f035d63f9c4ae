"""What a merge decides when shards are lost or nodes come and go; no Ray, no shards."""

from __future__ import annotations

from typing import Any

import pytest

from arm_ray.config import RuntimeConfig, ScheduleConfig
from arm_ray.errors import ConfigError, PlacementError, ShardLostError, TransportError
from arm_ray.runtime.cluster.nodes import ClusterView
from arm_ray.runtime.merge.policies import (
    Recovery,
    RecoveryPolicy,
    ScalingPolicy,
    last_usable,
)

LOST = ShardLostError("lost", got="node 2")
BROKEN = TransportError("hidden states did not reach the next layer shard")
NO_ROOM = PlacementError("the cluster did not place 3 layer shards")


def cluster(*cpus: float, free: float | None = None, **more: float) -> ClusterView:
    """A cluster of nodes with so many CPUs."""
    total = {"CPU": float(sum(cpus)), **more}
    nodes = frozenset(str(number) for number in range(len(cpus)))
    return ClusterView(nodes, total, {**total, "CPU": total["CPU"] if free is None else free})


def scaling(**runtime: Any) -> ScalingPolicy:
    return ScalingPolicy(RuntimeConfig(**runtime), num_groups=6, reserved={})


def run(policy: RecoveryPolicy, *events: tuple[Exception, int]) -> list[Recovery | None]:
    """Decisions about errors, each with the last finished iteration; ends with the first None."""
    found: list[Recovery | None] = []
    for error, last in events:
        recovery = policy.after(error, last, has_shrunk=False)  # type: ignore[arg-type]
        found.append(recovery)
        if recovery is None:
            break
        policy = recovery.policy
    return found


def test_lost_shards_are_replaced_as_long_as_there_is_progress() -> None:
    policy = RecoveryPolicy(max_recoveries=2, transport="auto")
    # Two before iteration 1 was finished, then three in a row: one more than allowed.
    events = [(LOST, 0), (LOST, 0), (LOST, 1), (LOST, 1), (LOST, 1), (LOST, 1)]
    found = run(policy, *events)
    assert found[4:] == [None]
    said = [str(recovery.warning) for recovery in found if recovery is not None]
    assert [text[-8:] for text in said] == ["(1 of 2)", "(2 of 2)", "(1 of 2)", "(2 of 2)"]
    assert said[2] == (
        "a layer shard was lost (node 2); going on with a new set after iteration 1 (1 of 2)"
    )


def test_no_recovery_is_allowed() -> None:
    assert run(RecoveryPolicy(0, "auto"), (LOST, 3)) == [None]


def test_a_broken_transfer_is_tried_again_before_the_object_store() -> None:
    first, second, third = run(RecoveryPolicy(5, "auto"), (BROKEN, 2), (BROKEN, 2), (BROKEN, 2))
    assert first is not None
    assert second is not None
    assert [first.policy.transport, second.policy.transport] == ["auto", "object_store"]
    assert str(first.warning).startswith("a transfer failed (hidden states did not reach")
    assert str(second.warning).startswith("the direct transport failed, going on with the object")
    # The object store has no other end that may be gone.
    assert third is None


def test_after_an_iteration_a_broken_transfer_counts_as_a_lost_shard_again() -> None:
    found = run(RecoveryPolicy(5, "auto"), (BROKEN, 1), (BROKEN, 2), (BROKEN, 3))
    assert [recovery.policy.transport for recovery in found if recovery] == ["auto"] * 3


@pytest.mark.parametrize("has_shrunk", [True, False])
def test_no_room_ends_a_merge_unless_the_cluster_is_smaller_by_now(has_shrunk: bool) -> None:
    policy = RecoveryPolicy(1, "auto")
    found = policy.after(NO_ROOM, 0, has_shrunk=has_shrunk)
    assert found == (Recovery(policy) if has_shrunk else None)


def test_other_errors_end_a_merge() -> None:
    assert RecoveryPolicy(5, "auto").after(ConfigError("no"), 3, has_shrunk=True) is None


@pytest.mark.parametrize(
    ("joined", "free", "elastic", "grown"),
    [(1, 1.0, True, True), (0, 1.0, True, False), (1, 0.0, True, False), (1, 1.0, False, False)],
)
def test_more_shards_where_nodes_joined_and_have_room(
    joined: int, free: float, elastic: bool, grown: bool
) -> None:
    policy = scaling(layer_shards="auto", elastic=elastic)
    before = cluster(1, 1)
    placement = policy.first(before)
    assert placement.num_shards == 2
    assert not policy.has_grown(before, before.nodes, placement)
    after = cluster(*([1] * (2 + joined)), free=free)
    assert policy.has_grown(after, before.nodes, placement) is grown


def test_no_more_shards_than_asked_for() -> None:
    policy, before = scaling(layer_shards=2), cluster(1, 1)
    placement = policy.first(before)
    assert placement.num_shards == 2
    assert not policy.has_grown(cluster(1, 1, 1, free=1.0), before.nodes, placement)


def test_a_set_after_the_first_may_be_smaller_than_asked_for() -> None:
    policy = scaling(layer_shards=3)
    assert policy.first(cluster(1, 1)).num_shards == 3
    assert policy.next(cluster(1, 1)).num_shards == 2
    assert policy.has_shrunk(cluster(1, 1), policy.first(cluster(1, 1, 1)))
    assert scaling(layer_shards=3, elastic=False).next(cluster(1, 1)).num_shards == 3


def test_a_named_resource_that_no_node_has() -> None:
    policy = scaling(layer_shards=1, resources={"merger": 1.0})
    with pytest.raises(PlacementError, match="has no 'merger'") as caught:
        policy.first(cluster(2))
    assert "2 CPU on 1 node(s)" in str(caught.value)
    assert policy.first(cluster(2, merger=1.0)).num_shards == 1


def test_what_others_have_taken_is_not_for_shards() -> None:
    policy = ScalingPolicy(RuntimeConfig(layer_shards="auto"), 6, {"CPU": 3.0})
    assert policy.first(cluster(4)).num_shards == 1


@pytest.mark.parametrize(
    ("gone", "expected"), [(set(), 3), ({2}, 3), ({3}, 2), ({2, 3}, 1), ({1, 2, 3}, 0)]
)
def test_a_merge_goes_on_after_the_last_state_whose_successors_can_be_made(
    gone: set[int], expected: int
) -> None:
    # Anchored: each iteration reads the state before it.
    schedule = ScheduleConfig(anchor_iterations=4, max_iterations=4)
    assert last_usable(schedule, 2, 3, lambda iteration: iteration not in gone) == expected


def test_a_window_reads_several_states() -> None:
    schedule = ScheduleConfig(anchor_iterations=1, max_iterations=6, window_size=3)
    # After 5, the next iteration reads 5, 4 and 3.
    assert last_usable(schedule, 2, 5, lambda iteration: iteration != 3) < 5
    assert last_usable(schedule, 2, 5, lambda iteration: iteration != 1) == 5

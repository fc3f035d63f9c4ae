"""What a merge does when shards are lost or nodes come and go: decisions, and nothing else.

Nothing here calls Ray, waits or prints; `merge.controller` carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from arm_ray.config import RuntimeConfig, ScheduleConfig
from arm_ray.errors import ArmRayError, PlacementError, ShardLostError, TransportError
from arm_ray.runtime.cluster.nodes import ClusterView
from arm_ray.runtime.shards.placement import Placement, bundle_of, plan_placement
from arm_ray.schedule import iterations_needed_after


@dataclass(frozen=True)
class RecoveryPolicy:
    """Decides whether a merge goes on after an error, and how.

    Attributes:
        max_recoveries: How often shards may be lost without an iteration between.
        transport: How shards send hidden states, as configured or fallen back to.
        losses: How often shards were lost since the last finished iteration.
        lost_at: The last finished iteration when they were lost.
        broke_at: The same when a transfer failed; -1: none has.
    """

    max_recoveries: int
    transport: str
    losses: int = 0
    lost_at: int = 0
    broke_at: int = -1

    def after(
        self, error: ArmRayError, last_iteration: int, *, has_shrunk: bool
    ) -> Recovery | None:
        """What to do after an error.

        Args:
            error: What ended a set of shards.
            last_iteration: The last finished iteration; 0: none is.
            has_shrunk: Whether the cluster has become too small for that set.

        Returns:
            How a new set goes on; None: the error ends the merge.
        """
        if isinstance(error, TransportError):
            if self.transport == "object_store":
                return None
            if last_iteration > self.broke_at:
                # Perhaps one end of the transfer is gone, which is not the transport's fault.
                again = replace(self, broke_at=last_iteration)
                return again._after_loss(error, last_iteration)
            # The actors that a failed transfer leaves behind are of no use.
            return Recovery(
                replace(self, transport="object_store"),
                f"the direct transport failed, going on with the object store: {error}",
            )
        if isinstance(error, PlacementError):
            # A node that was lost may still have been counted when the shards were planned.
            return Recovery(self) if has_shrunk else None
        if isinstance(error, ShardLostError):
            return self._after_loss(error, last_iteration)
        return None

    def _after_loss(self, error: ArmRayError, last_iteration: int) -> Recovery | None:
        losses = 1 if last_iteration > self.lost_at else self.losses + 1
        if losses > self.max_recoveries:
            return None
        is_transfer = isinstance(error, TransportError)
        what = "a transfer failed" if is_transfer else "a layer shard was lost"
        return Recovery(
            replace(self, losses=losses, lost_at=last_iteration),
            f"{what} ({error.got or error.what}); going on with a new set after iteration "
            f"{last_iteration} ({losses} of {self.max_recoveries})",
        )


@dataclass(frozen=True)
class Recovery:
    """How a merge goes on after an error.

    Attributes:
        policy: What decides about the next one.
        warning: What to say; None: nothing.
    """

    policy: RecoveryPolicy
    warning: str | None = None


@dataclass(frozen=True)
class ScalingPolicy:
    """Decides how many layer shards there are, and when that changes.

    Attributes:
        runtime: The settings.
        num_groups: Layer groups of the model: most shards that there can be.
        reserved: What others of the run have taken of the cluster.
    """

    runtime: RuntimeConfig
    num_groups: int
    reserved: Mapping[str, float]

    def first(self, cluster: ClusterView) -> Placement:
        """The first set of shards: as many as asked for.

        Raises:
            PlacementError: The cluster has no room for them.
        """
        return plan_placement(cluster, self.runtime, self.num_groups, self.reserved)

    def next(self, cluster: ClusterView) -> Placement:
        """A set after the first, which may be smaller than asked for."""
        return plan_placement(
            cluster,
            self.runtime,
            self.num_groups,
            self.reserved,
            takes_fewer=self.runtime.elastic,
        )

    def has_grown(self, cluster: ClusterView, known: frozenset[str], placement: Placement) -> bool:
        """Whether nodes have joined that have room for more shards than there are.

        Args:
            cluster: What there is now.
            known: The nodes that there were when the shards were planned.
            placement: The shards.
        """
        if not self.runtime.elastic or not cluster.nodes - known:
            return False
        # A node may be there a moment before its resources are: it is asked about again.
        if self.next(cluster).num_shards <= placement.num_shards:
            return False
        bundle = bundle_of(self.runtime, placement)
        return all(cluster.free.get(name, 0.0) >= amount for name, amount in bundle.items())

    def has_shrunk(self, cluster: ClusterView, placement: Placement) -> bool:
        """Whether the cluster has become too small for a set after the first."""
        return self.runtime.elastic and self.next(cluster).num_shards < placement.num_shards


def last_usable(
    schedule: ScheduleConfig,
    num_candidates: int,
    last: int,
    has_state: Callable[[int], bool],
    held: Callable[[int], set[int]] = lambda _last: set(),
) -> int:
    """The last iteration after which a merge can go on: all states that it needs are there.

    Args:
        schedule: Of the merge.
        num_candidates: Of the merge.
        last: The last finished iteration.
        has_state: Whether the state of an iteration is there, as a whole.
        held: What is needed besides what later iterations read, after an iteration.

    Returns:
        The iteration; 0: the merge begins again.
    """
    while last:
        needed = iterations_needed_after(schedule, num_candidates, last) | held(last)
        if all(map(has_state, needed)):
            break
        last -= 1
    return last

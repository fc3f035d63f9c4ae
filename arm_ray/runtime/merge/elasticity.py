"""The sets of layer shards that a merge goes through: its first, and those that follow.

Shards are a gang: what one holds of the hidden states dies with it, and the transport between them
is fixed when it is made. So when one is lost, or when there is room for more, all end and a new set
is placed on what the cluster has by then. It goes on after the last finished iteration, with the
layer groups that are merged of the following ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import ray

from arm_ray.checkpoints import states
from arm_ray.config import RuntimeConfig
from arm_ray.errors import ArmRayError, PlacementError, ShardLostError, TransportError
from arm_ray.runtime.cluster.nodes import alive_nodes
from arm_ray.runtime.merge.driver import Merged
from arm_ray.runtime.merge.state_storage import StateStorage
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.shards.placement import Placement, bundle_of, plan_placement
from arm_ray.schedule import iterations_needed_after

_T = TypeVar("_T")


@dataclass
class Gangs:
    """Places one set of shards after another until a merge is over.

    Attributes:
        run: The run directory.
        runtime: The settings.
        num_groups: Layer groups of the model.
        reserved: What others of this run have taken of the cluster.
        warn: Called with a sentence where something was lost.
        say: Called with a sentence on what goes on.
        merged: What is merged of iterations that are not finished.
        nodes: Ids of all nodes that have had shards.
    """

    run: RunDirectory
    runtime: RuntimeConfig
    num_groups: int
    reserved: Mapping[str, float]
    warn: Callable[[str], None]
    say: Callable[[str], None]
    merged: Merged = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    _known: frozenset[str] = frozenset()
    _placement: Placement | None = None
    _is_first: bool = True
    _losses: int = 0
    _lost_at: int = 0
    _broke_at: int = -1

    def plan(self, *, is_first: bool = True) -> Placement:
        """Decide on the shards of a set; only those after the first may be fewer than asked for."""
        self._known, self._is_first = alive_nodes(), is_first
        self._placement = plan_placement(
            self.runtime,
            self.num_groups,
            self.reserved,
            takes_fewer=not is_first and self.runtime.elastic,
        )
        return self._placement

    def has_grown(self) -> bool:
        """Whether nodes have joined that have room for more shards than there are."""
        now = alive_nodes()
        if not self.runtime.elastic or self._placement is None or not now - self._known:
            return False
        could = plan_placement(self.runtime, self.num_groups, self.reserved, takes_fewer=True)
        # A node may be there a moment before its resources are: it is asked about again.
        if could.num_shards <= self._placement.num_shards:
            return False
        free = ray.available_resources()
        bundle = bundle_of(self.runtime, self._placement)
        return all(free.get(name, 0.0) >= amount for name, amount in bundle.items())

    def has_shrunk(self) -> bool:
        """Whether the cluster has become too small for the shards that are being placed."""
        if not self.runtime.elastic or self._is_first or self._placement is None:
            return False
        could = plan_placement(self.runtime, self.num_groups, self.reserved, takes_fewer=True)
        return could.num_shards < self._placement.num_shards

    def run_until_over(
        self, placement: Placement, attempt: Callable[[Placement, RuntimeConfig], _T | None]
    ) -> _T:
        """Have set after set of shards go on with the merge.

        Args:
            placement: Of the first set.
            attempt: Places shards and goes on; returns None where more shards are to go on.

        Raises:
            ShardLostError: Shards were lost again and again, without an iteration between.
            ArmRayError: Whatever else ended the merge.
        """
        runtime = self.runtime
        while True:
            try:
                ended = attempt(placement, runtime)
            except TransportError as error:
                if runtime.transport == "object_store":
                    raise
                if self.run.last_iteration > self._broke_at:
                    # Perhaps one end of the transfer is gone, which is not the transport's fault.
                    self._broke_at = self.run.last_iteration
                    self._count_loss(error)
                else:
                    # The actors that a failed transfer leaves behind are of no use.
                    runtime = runtime.model_copy(update={"transport": "object_store"})
                    self.warn(
                        f"the direct transport failed, going on with the object store: {error}"
                    )
            except PlacementError:
                # A node that was lost may still have been counted when the shards were planned.
                if not self.has_shrunk():
                    raise
            except ShardLostError as error:
                self._count_loss(error)
            else:
                if ended is not None:
                    return ended
                self.say(
                    "nodes have joined: a new set of layer shards from iteration "
                    f"{self.run.last_iteration + 1}"
                )
            shutil.rmtree(self.run.partial_model, ignore_errors=True)
            placement = self.plan(is_first=False)

    def _count_loss(self, error: ArmRayError) -> None:
        """Say that shards were lost, unless that happens again and again."""
        self._losses = 1 if self.run.last_iteration > self._lost_at else self._losses + 1
        self._lost_at = self.run.last_iteration
        if self._losses > self.runtime.max_recoveries:
            raise error
        is_transfer = isinstance(error, TransportError)
        what = "a transfer failed" if is_transfer else "a layer shard was lost"
        self.warn(
            f"{what} ({error.got or error.what}); going on with a new set after iteration "
            f"{self._lost_at} ({self._losses} of {self.runtime.max_recoveries})"
        )

    def settle(self, storage: StateStorage, num_candidates: int) -> None:
        """Go back to the last state from which a new set can go on, and give it what it reads.

        Args:
            storage: Where states lie.
            num_candidates: Of the merge.
        """
        run, schedule = self.run, self.run.config.schedule
        last = run.last_iteration

        def needed(iteration: int) -> set[int]:
            return iterations_needed_after(schedule, num_candidates, iteration)

        while last and not all(storage.has_state(t) for t in needed(last)):
            last -= 1
        if last < run.last_iteration:
            goes_on = f"going on after iteration {last}" if last else "beginning again"
            self.warn(
                f"states that iterations after {run.last_iteration} read are gone with their "
                f"node; {goes_on}"
            )
        for iteration in [t for t in run.finished if t > last]:
            storage.discard(iteration)
            del run.finished[iteration]
        kept = {key for key in self.merged if key[0] > last and storage.has_group(*key)}
        for key in self.merged.keys() - kept:
            del self.merged[key]
        for iteration in states.state_directories(run.path):
            if iteration > last and not any(t == iteration for t, _ in kept):
                storage.discard(iteration)
        storage.bring(sorted(needed(last)), kept)

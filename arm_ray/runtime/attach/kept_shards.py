"""Layer shards that stay between the merges of an attached run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from arm_ray.config import RuntimeConfig
from arm_ray.errors import ArmRayError
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import Placement, ShardGang, bundle_of, placed_shards
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.schedule import BASE

# What of `runtime` an actor is started with, and the placement group with it.
_STARTED_WITH = ("threads", "niceness", "resources", "memory_gb", "placement_strategy", "transport")


class KeptShards:
    """The actors of one merge after another, with the base's weights in their memory.

    Starting them takes seconds, and reading the base may take longer. They are ended by `close`,
    when a merge fails, and when another merge needs others.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._gang: ShardGang | None = None
        self._like: tuple[object, ...] = ()
        self._bundle: dict[str, float] = {}

    @property
    def taken(self) -> Mapping[str, float]:
        """Resources of the cluster that they hold."""
        count = 0 if self._gang is None else len(self._gang.actors)
        return {name: amount * count for name, amount in self._bundle.items() if count}

    @contextlib.contextmanager
    def placed(
        self,
        specs: Sequence[ShardSpec],
        runtime: RuntimeConfig,
        placement: Placement,
        reporter: Reporter,
        has_shrunk: Callable[[], bool] = lambda: False,
    ) -> Iterator[ShardGang]:
        """As `placed_shards`, by those of the merge before if they are the same and still there."""
        base = specs[0].checkpoints[BASE].fingerprint
        specs = [dataclasses.replace(spec, kept_base=base) for spec in specs]
        like = (placement, *(str(getattr(runtime, name)) for name in _STARTED_WITH))
        if self._gang is None or self._like != like or not self._begin_again(specs, self._gang):
            self.close()
            self._bundle = bundle_of(runtime, placement)
            started = placed_shards(specs, runtime, placement, reporter, has_shrunk)
            self._gang, self._like = self._stack.enter_context(started), like
        try:
            yield self._gang
            get_results([actor.call(LayerShard.begin_again, None) for actor in self._gang.actors])
        except BaseException:
            # Calls may be waiting in them, for ever.
            self.close()
            raise

    def _begin_again(self, specs: Sequence[ShardSpec], gang: ShardGang) -> bool:
        """Give the shards their parts of another merge; whether all are there."""
        specs = [dataclasses.replace(spec, transport=gang.transport) for spec in specs]
        pairs = zip(gang.actors, specs, strict=True)
        try:
            get_results([actor.call(LayerShard.begin_again, spec) for actor, spec in pairs])
        except ArmRayError:
            return False
        return True

    def close(self) -> None:
        """End the shards, if there are any."""
        self._gang = None
        self._stack.close()

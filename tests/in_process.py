"""Layer shards in this process, called as the driver calls their actors.

Starting an actor takes seconds, in which a test of what is computed learns nothing. Calls run at
once, in the order they are submitted, which is the order that an actor takes them in; what they
return goes through Ray's object store as it does from an actor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from arm_ray.config import RuntimeConfig
from arm_ray.runtime.layer_shard import LayerShard
from arm_ray.runtime.placement import Placement, ShardGang
from arm_ray.runtime.shard_spec import ShardSpec


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_options: Any) -> _Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        given = [ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in arguments]
        return ray.put(self._call(*given))


class Actor:
    def __init__(self, shard: LayerShard) -> None:
        self._shard = shard

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._shard, name))


@contextlib.contextmanager
def placed_shards(
    specs: Sequence[ShardSpec],
    _runtime: RuntimeConfig,
    _placement: Placement,
    _warn: Callable[[str], None],
    _has_shrunk: Callable[[], bool] = lambda: False,
) -> Iterator[ShardGang]:
    """Stands for `arm_ray.runtime.placement.placed_shards`."""
    home = str(ray.get_runtime_context().get_node_id())
    actors = [Actor(LayerShard(spec)) for spec in specs]
    yield ShardGang(actors, "object_store", [home for _ in specs])

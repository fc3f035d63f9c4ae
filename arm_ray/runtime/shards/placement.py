"""Placing the layer shards on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from arm_ray.config import RuntimeConfig
from arm_ray.errors import PlacementError
from arm_ray.model.partition import choose_num_shards
from arm_ray.noise import quiet_environment, verbose_environment
from arm_ray.runtime.cluster.actors import Handle, LocalHandle, local_result, start_actor
from arm_ray.runtime.cluster.calls import get_results, put
from arm_ray.runtime.cluster.nodes import (
    ClusterView,
    format_resources,
    node_names,
    view_of_cluster,
)
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.transport import (
    Transport,
    choose_transport,
    join_transport,
    leave_transport,
)

if TYPE_CHECKING:
    from ray import ObjectRef

_PLACEMENT_POLL_S = 2.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Placement:
    """How many shards there are, on what device, and the GPUs reserved for each.

    Attributes:
        num_shards: How many.
        device: `cpu` or `cuda`.
        gpus_per_shard: GPUs that Ray reserves for each.
        is_here: Whether the only one is in this process, and Ray is not needed.
    """

    num_shards: int
    device: str
    gpus_per_shard: float = 0.0
    is_here: bool = False


@dataclass(frozen=True)
class ShardGang:
    """The actors of a merge, in the order of the layers, and how they send hidden states.

    Attributes:
        actors: Their handles.
        transport: How they send.
        nodes: Ray's id of the node that each is on; empty where they are in this process.
    """

    actors: list[Handle[LayerShard]]
    transport: Transport
    nodes: list[str]

    def put(self, value: _T) -> ObjectRef[_T]:
        """What several calls of the shards are given, sent once."""
        is_here = isinstance(self.actors[0], LocalHandle)
        return local_result(value) if is_here else put(value)


def check_object_store(gang: ShardGang, message_bytes: int) -> None:
    """Refuse object stores that cannot hold the hidden states of a micro-batch twice.

    Args:
        gang: The shards, placed.
        message_bytes: Hidden states of one micro-batch; bytes.

    Raises:
        PlacementError: Says which node's, its size, and what is needed.
    """
    if gang.transport != "object_store" or len(gang.actors) == 1:
        return
    for node in ray.nodes():
        there = node["Resources"].get("object_store_memory", 0.0)
        # One is written while the one before is still read.
        if node["NodeID"] in gang.nodes and there < 2 * message_bytes:
            raise PlacementError(
                "a node's object store is too small for hidden states",
                where=", ".join(node_names([node["NodeID"]])),
                got=f"{there / 1e6:.1f} MB",
                expected=f"at least {2 * message_bytes / 1e6:.1f} MB: two micro-batches",
                hint="start its Ray with a larger --object-store-memory, or use fewer "
                "runtime.micro_batch_tokens (which is part of the result) or one layer shard",
            )


def plan_placement(
    cluster: ClusterView,
    runtime: RuntimeConfig,
    num_groups: int,
    reserved: Mapping[str, float] | None = None,
    *,
    takes_fewer: bool = False,
) -> Placement:
    """Decide on the device, the shards and their resources from what the cluster has.

    Args:
        cluster: What there is.
        runtime: The settings.
        num_groups: Layer groups of the model.
        reserved: What others of this run have taken of the cluster.
        takes_fewer: Whether there may be fewer shards than asked for, where there is no more room.

    Raises:
        ConfigError: More shards were asked for than there are layer groups.
        PlacementError: The cluster has no GPU or named resource, but one was asked for.
    """
    resources, reserved = cluster.total, reserved or {}
    gpus = resources.get("GPU", 0.0)
    device = runtime.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    taken = reserved.get("GPU", 0.0)
    gpus -= taken
    share = runtime.gpus_per_shard
    if share == "auto":
        share = 1.0 if device == "cuda" else 0.0
    if device == "cuda" and gpus < share:
        raise PlacementError(
            "the cluster has no GPU for a layer shard",
            got=format_resources(resources)
            + (f", of which the evaluators take {taken:g} GPU" if taken else ""),
            expected=f"{share:g} GPU for each shard",
            hint="share GPUs (evaluation.engine.gpus_per_engine with gpu_memory_utilization, "
            "runtime.gpus_per_shard), or join a larger cluster"
            if taken
            else "set runtime.device to cpu, or join a cluster with GPUs",
        )
    cpus = max(1.0, resources.get("CPU", 1) - reserved.get("CPU", 0.0))
    slots = gpus / share if share else cpus / runtime.threads
    for name, amount in runtime.resources.items():
        there = resources.get(name, 0.0)
        if there < amount:
            raise PlacementError(
                f"the cluster has no {name!r} for a layer shard",
                where="runtime.resources",
                got=str(cluster),
                expected=f"{amount:g} {name} for each shard",
                hint="start nodes with ray start --resources, or name a resource that they have",
            )
        slots = min(slots, there / amount)
    if runtime.placement_strategy == "STRICT_SPREAD":
        slots = min(slots, len(cluster.nodes))
    most = runtime.most_shards(num_groups)
    count = choose_num_shards(
        runtime.layer_shards, int(slots), most, is_dealt=runtime.deals_layers_round
    )
    if takes_fewer:
        count = max(1, min(count, int(slots)))
    return Placement(count, device, share)


def bundle_of(runtime: RuntimeConfig, placement: Placement) -> dict[str, float]:
    """Resources of one shard."""
    bundle = {"CPU": float(runtime.threads), **runtime.resources}
    if placement.gpus_per_shard:
        bundle["GPU"] = placement.gpus_per_shard
    if runtime.memory_gb is not None:
        bundle["memory"] = runtime.memory_gb * 1e9
    return bundle


@contextlib.contextmanager
def placed_shards(
    specs: Sequence[ShardSpec],
    runtime: RuntimeConfig,
    placement: Placement,
    reporter: Reporter,
    has_shrunk: Callable[[], bool] = lambda: False,
) -> Iterator[ShardGang]:
    """Have one actor for each shard, in a placement group; they end with the context.

    Args:
        specs: The shards, in the order of the layers.
        runtime: Threads, placement strategy, time-out and transport.
        placement: What `plan_placement` decided.
        reporter: Told where it has to wait, and where the wanted transport cannot be had.
        has_shrunk: Asked while the cluster does not place them: whether waiting is of no use,
            because it is smaller by now.

    Raises:
        PlacementError: The cluster does not give the resources in time; says what was asked and
            what there is.
    """
    bundle = bundle_of(runtime, placement)
    group = ray.util.placement_group([bundle] * len(specs), strategy=runtime.placement_strategy)
    actors: list[Handle[LayerShard]] = []
    transport = choose_transport(runtime.transport, placement.device, len(specs))
    try:
        deadline = time.monotonic() + runtime.placement_timeout_s
        has_told = False
        while not group.wait(min(_PLACEMENT_POLL_S, runtime.placement_timeout_s)):
            if time.monotonic() >= deadline or has_shrunk():
                raise _not_placed(runtime, len(specs), bundle)
            if not has_told:
                has_told = True
                reporter.warn(
                    f"waiting for room for {len(specs)} layer shards, each "
                    f"{format_resources(bundle)}, for at most {runtime.placement_timeout_s:g} s; "
                    f"{view_of_cluster()}"
                )
        actors = _start(specs, runtime, placement, group, transport)
        if transport != "object_store":
            problem = join_transport(actors, transport)
            if problem:
                reporter.warn(f"no direct transport, using the object store: {problem}")
                # Some may wait for the others in there, for long: they are of no more use.
                _end(actors)
                transport = "object_store"
                actors = _start(specs, runtime, placement, group, transport)
        nodes = get_results([actor.node() for actor in actors])
        yield ShardGang(actors, transport, nodes)
    finally:
        leave_transport(actors, transport)
        _end(actors)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(group)


# Has shards for as long as its context: `placed_shards`, or what stands for it.
Place = Callable[..., contextlib.AbstractContextManager[ShardGang]]


@contextlib.contextmanager
def placed_here(
    specs: Sequence[ShardSpec], *_others: object, **_more: object
) -> Iterator[ShardGang]:
    """Have the shards in this process; otherwise as `placed_shards`."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    shards: list[LocalHandle[LayerShard]] = []
    try:
        for spec in specs:
            # OpenMP keeps the number of threads for each thread that calls it.
            begin = partial(torch.set_num_threads, spec.threads)
            shards.append(LocalHandle(LayerShard(spec), begin))
        yield ShardGang([*shards], "object_store", [])
    finally:
        for shard in shards:
            # A call that waits for the driver's word would wait for ever.
            shard.actor.abandon(0)
            shard.end()
            shard.actor.on("states", "quiet")
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _end(actors: Sequence[Handle[LayerShard]]) -> None:
    for actor in actors:
        actor.end()


def _start(
    specs: Sequence[ShardSpec],
    runtime: RuntimeConfig,
    placement: Placement,
    group: Any,
    transport: Transport,
) -> list[Handle[LayerShard]]:
    threads = str(runtime.threads)
    # cuBLAS is deterministic only with a workspace of fixed size.
    environment = {
        **quiet_environment(),
        **verbose_environment(),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    options: dict[str, Any] = {
        "num_cpus": runtime.threads,
        "num_gpus": placement.gpus_per_shard,
        # `abandon` must get through while work is queued, and `deliver` goes on beside it.
        "concurrency_groups": {"control": 1, "deliver": 1},
    }
    if runtime.resources:
        options["resources"] = dict(runtime.resources)
    if runtime.memory_gb is not None:
        options["memory"] = runtime.memory_gb * 1e9
    if transport != "object_store":
        options["enable_tensor_transport"] = True
    actors = []
    for index, spec in enumerate(specs):
        options["scheduling_strategy"] = (
            ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            )
        )
        # Not by a `runtime_env`: Ray would start a process for it in place of one that is ready.
        spec = dataclasses.replace(spec, transport=transport, environment=environment)
        actors.append(start_actor(options, LayerShard, spec))
    # The actors import torch; that their group is placed does not mean that they run.
    with activity(f"starting {len(actors)} layer shard(s)"):
        get_results([actor.call(LayerShard.ready) for actor in actors])
    return actors


def _not_placed(runtime: RuntimeConfig, count: int, bundle: dict[str, float]) -> PlacementError:
    free, wanted = str(view_of_cluster()), format_resources(bundle)
    if runtime.memory_gb is not None:
        have = ray.available_resources().get("memory", 0.0) / 1e9
        free, wanted = f"{free}; {have:.1f} GB free", f"{wanted}, {runtime.memory_gb:g} GB"
    return PlacementError(
        f"the cluster did not place {count} layer shards within {runtime.placement_timeout_s:g} s",
        got=free,
        expected=f"{count} times {wanted}, {runtime.placement_strategy}",
        hint="use fewer runtime.layer_shards or another runtime.placement_strategy, wait for "
        "other jobs, or add nodes",
    )

"""Whether a cluster can hold a merge, and the smallest one that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from arm_ray.config import RuntimeConfig
from arm_ray.errors import ConfigError
from arm_ray.model.layout import ModelLayout
from arm_ray.model.partition import (
    Partition,
    Residency,
    choose_balance,
    chunks_of,
    partition_layers,
)
from arm_ray.planning.devices import GB, MEASURED, Device, find_device
from arm_ray.planning.memory import ActorMemory, actor_memory
from arm_ray.planning.timing import Placement
from arm_ray.planning.workload import Workload

RESIDENCIES: tuple[Residency, ...] = ("device", "host", "disk")
# GPUs of a node where nothing says how many.
_USUAL_NODE = 8
# Runs of layers that are written out.
_SHOWN_RUNS = 3


@dataclass(frozen=True)
class Cluster:
    """What there is.

    Attributes:
        device: With the memory to plan for: of one GPU, or of a node without.
        gpus: In all; None: as many as it takes.
        nodes: How many.
        notes: What was measured of it, one sentence each.
    """

    device: Device
    gpus: int | None = None
    nodes: int = 1
    notes: tuple[str, ...] = ()

    def shards_per_gpu(self, runtime: RuntimeConfig) -> int:
        """More than one where `runtime.gpus_per_shard` is a fraction."""
        share = runtime.gpus_per_shard
        return int(1.0 / share) if share != "auto" and 0.0 < share < 1.0 else 1

    def memory_per_shard(self, runtime: RuntimeConfig) -> int:
        """GPU memory of a shard; without GPUs, the memory of a node, which its shards share."""
        if not self.device.is_gpu:
            return self.device.memory_bytes
        return self.device.memory_bytes // self.shards_per_gpu(runtime)


@dataclass(frozen=True)
class Fit:
    """The smallest cluster for one residency.

    Attributes:
        residency: `runtime.residency`.
        shards: Actors; None where even one layer group for each is too much.
        gpus: GPUs that they take; 0 on CPUs.
        nodes: Nodes.
        shard_bytes: Of the limiting memory, the largest shard's need there.
        host_bytes_per_node: Host memory of a node there.
    """

    residency: Residency
    shards: int | None
    gpus: int
    nodes: int
    shard_bytes: int
    host_bytes_per_node: int


def make_cluster(
    runtime: RuntimeConfig,
    *,
    gpus: int | None = None,
    gpu_memory_gb: float | None = None,
    nodes: int = 1,
    device: str | None = None,
) -> Cluster:
    """A cluster from what the command line says.

    Args:
        runtime: `device` and `threads` where nothing else is said.
        gpus: In all.
        gpu_memory_gb: 10^9 bytes of one GPU, or of a node without; None: the device's.
        nodes: How many.
        device: A name from `DEVICES`; None: an H100 where there are GPUs, else the CPU.

    Raises:
        ConfigError: A number is not positive, or the device is not known or has no GPU.
    """
    for name, value in (("--gpus", gpus), ("--gpu-memory", gpu_memory_gb), ("--nodes", nodes)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is not positive", got=value, expected="more than 0")
    wants_gpu = gpus is not None or runtime.device == "cuda"
    found = find_device(device or ("h100-80gb" if wants_gpu else "cpu"), runtime.threads)
    if gpus is not None and not found.is_gpu:
        raise ConfigError(
            f"--gpus is given, but the device {found.name!r} is a CPU",
            got=gpus,
            hint="leave --gpus out, or name a GPU",
        )
    if gpu_memory_gb is not None:
        found = replace(found, memory_bytes=round(gpu_memory_gb * GB))
    notes = ("Matrix products and memory of this machine were measured; its disk is assumed",)
    return Cluster(found, gpus, nodes, notes if found.name == MEASURED else ())


def shard_memory(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, placement: Placement
) -> list[ActorMemory]:
    """What each shard needs."""
    is_gpu = cluster.device.is_gpu
    return [actor_memory(workload, groups, runtime, on_gpu=is_gpu) for groups in placement.shards]


def node_memory(placement: Placement, memory: Sequence[ActorMemory]) -> list[int]:
    """Host memory that the shards of each node need together; bytes."""
    totals = [0] * (placement.node_of(len(memory) - 1) + 1)
    for index, need in enumerate(memory):
        totals[placement.node_of(index)] += need.host.total
    return totals


def fits(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, cpu_shards: int
) -> tuple[Fit, ...]:
    """The smallest cluster for each residency.

    With GPUs the fewest GPUs; without, the fewest nodes for a fixed number of shards.
    """
    search = _fewest_gpus if cluster.device.is_gpu else _fewest_nodes
    return tuple(
        search(workload, runtime.model_copy(update={"residency": residency}), cluster, cpu_shards)
        for residency in RESIDENCIES
    )


def place(
    workload: Workload,
    runtime: RuntimeConfig,
    cluster: Cluster,
    shards: int,
    nodes: int,
    partition: Partition | None = None,
) -> Placement:
    """So many shards on at most so many nodes.

    Args:
        workload: The merge.
        runtime: How it is partitioned.
        cluster: For the device.
        shards: How many.
        nodes: At most.
        partition: In place of `runtime.partition`; where that is auto, None is contiguous.

    Raises:
        ValueError: As `partition_layers`.
    """
    balance = choose_balance(runtime.balance, on_gpu=cluster.device.is_gpu)
    if partition is None:
        partition = "contiguous" if runtime.partition == "auto" else runtime.partition
    shares = partition_layers(
        workload.layout,
        shards,
        balance,
        needs_forward=workload.needs_forward,
        partition=partition,
        turn=runtime.groups_per_turn,
    )
    return Placement(shares, min(nodes, shards))


def _fewest_gpus(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, _cpu_shards: int
) -> Fit:
    capacity = cluster.memory_per_shard(runtime)
    groups = runtime.most_shards(len(workload.layout.groups))

    kinds: list[Partition | None] = [None]
    if runtime.partition == "auto" and runtime.residency == "device" and workload.needs_forward:
        kinds = ["contiguous", "looped"]

    def need(shards: int) -> tuple[int, list[ActorMemory]]:
        found = []
        for partition in kinds:
            placement = place(workload, runtime, cluster, shards, 1, partition)
            memory = shard_memory(workload, runtime, cluster, placement)
            found.append((max(m.limiting.total for m in memory), memory))
        return min(found, key=lambda each: each[0])

    # The first and the last shard hold the hidden states of one neighbour, those between of two:
    # only from three shards on do more shards mean less memory for each.
    few = (shards for shards in (1, 2) if shards <= groups and need(shards)[0] <= capacity)
    low = next(few, min(3, groups))
    high = groups if low > 2 else low
    while low < high:
        middle = (low + high) // 2
        if need(middle)[0] <= capacity:
            high = middle
        else:
            low = middle + 1
    if need(low)[0] > capacity:  # nothing fits: where it comes closest
        low = min(low, 1, key=lambda shards: need(shards)[0])
    most, memory = need(low)
    gpus = -(-low // cluster.shards_per_gpu(runtime))
    on_node = _USUAL_NODE if cluster.gpus is None else -(-cluster.gpus // cluster.nodes)
    nodes = -(-gpus // on_node)
    host = max(node_memory(place(workload, runtime, cluster, low, nodes), memory))
    fitting = low if most <= capacity else None
    return Fit(runtime.residency, fitting, gpus, nodes, most, host)


def _fewest_nodes(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, cpu_shards: int
) -> Fit:
    shards = max(1, min(cpu_shards, runtime.most_shards(len(workload.layout.groups))))
    memory = shard_memory(workload, runtime, cluster, place(workload, runtime, cluster, shards, 1))
    largest = max(m.host.total for m in memory)
    host = 0
    for nodes in range(1, shards + 1):
        host = max(node_memory(place(workload, runtime, cluster, shards, nodes), memory))
        if host <= cluster.device.memory_bytes:
            return Fit(runtime.residency, shards, 0, nodes, largest, host)
    return Fit(runtime.residency, None, 0, shards, largest, host)


def problems_of(
    workload: Workload,
    runtime: RuntimeConfig,
    cluster: Cluster,
    placement: Placement,
    memory: Sequence[ActorMemory],
) -> tuple[str, ...]:
    """Why the cluster cannot hold the merge, one sentence each; empty where it can."""
    found = []
    capacity = cluster.memory_per_shard(runtime)
    if not cluster.device.is_gpu:
        for node, total in enumerate(node_memory(placement, memory)):
            if total > capacity:
                found.append(
                    f"the shards of node {node} need {_gb(total)} together, but a node has "
                    f"{_gb(capacity)}"
                )
        return tuple(found)
    gpus = -(-len(memory) // cluster.shards_per_gpu(runtime))
    if cluster.gpus is not None and gpus > cluster.gpus:
        found.append(
            f"runtime.layer_shards: {len(memory)} shards take {gpus} GPUs, there are {cluster.gpus}"
        )
    worst = max(range(len(memory)), key=lambda i: memory[i].limiting.total)
    peak = memory[worst].limiting
    if peak.total > capacity:
        runs = layer_runs(workload.layout, placement.shards[worst])
        term = max(peak.terms, key=lambda name: peak.terms[name])
        found.append(
            f"shard {worst} (layers {runs_text(runs)}) needs "
            f"{_gb(peak.total)} of GPU memory, but has {_gb(capacity)}; most of it: {term}, "
            f"{_gb(peak.terms[term])} ({peak.when})"
        )
    return tuple(found)


def layer_runs(layout: ModelLayout, share: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The layers of a shard: of each run of them the first one, and one past its last."""
    return tuple(
        (layout.groups[run[0]].first_layer, layout.groups[run[-1]].end_layer)
        for run in chunks_of(share, "device")
    )


def runs_text(runs: Sequence[tuple[int, int]]) -> str:
    """`0-5`, or `0, 8, 16, …`."""
    shown = [f"{a}-{b - 1}" if b > a + 1 or len(runs) == 1 else str(a) for a, b in runs]
    return ", ".join(shown if len(shown) <= _SHOWN_RUNS else [*shown[:_SHOWN_RUNS], "…"])


def remedies_of(cluster: Cluster, smallest: Sequence[Fit]) -> tuple[str, ...]:
    """What would fit, one sentence each."""
    found = []
    for fit in smallest:
        if fit.shards is None:
            continue
        if cluster.device.is_gpu:
            found.append(
                f"runtime.residency={fit.residency} on {fit.gpus} GPU(s) of "
                f"{_gb(cluster.device.memory_bytes)} ({fit.shards} layer shard(s)), with "
                f"{_gb(fit.host_bytes_per_node)} of host memory on each of {fit.nodes} node(s)"
            )
        else:
            found.append(
                f"runtime.residency={fit.residency} on {fit.nodes} node(s) of "
                f"{_gb(cluster.device.memory_bytes)}"
            )
    if found:
        return tuple(found)
    least = min(smallest, key=lambda fit: fit.shard_bytes)
    return (
        f"no residency fits on any number of them: the least is {_gb(least.shard_bytes)} for one "
        f"shard (residency {least.residency}); more memory, or smaller "
        "runtime.micro_batch_tokens, runtime.layers_per_group or calibration.batch_size",
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"

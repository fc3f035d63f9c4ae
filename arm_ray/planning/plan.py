"""A plan: what a merge needs, how long it may take, and whether a cluster can hold it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arm_ray.config import MergeConfig, RuntimeConfig
from arm_ray.merging.parts import at_depth, part_of
from arm_ray.model.partition import Partition, choose_num_shards
from arm_ray.planning.cluster import (
    Cluster,
    Fit,
    fits,
    layer_runs,
    node_memory,
    place,
    problems_of,
    remedies_of,
)
from arm_ray.planning.cluster import shard_memory as memory_of
from arm_ray.planning.estimate import (
    Estimate,
    IterationFacts,
    choose_partition,
    life_of,
    model_bytes,
    state_bytes,
)
from arm_ray.planning.memory import ActorMemory
from arm_ray.planning.simulator import Simulation
from arm_ray.planning.sources import open_workload
from arm_ray.planning.state_life import StateLife, states_to_come
from arm_ray.planning.timing import Placement
from arm_ray.planning.workload import (
    FLOAT32,
    Workload,
)

_SCALING = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class ModelFacts:
    """What is merged; sizes in bytes."""

    family: str
    parameters: int
    tensors: int
    rotated_tensors: int
    rotated_parameters: int
    layers: int
    layer_groups: int
    base_bytes: int
    candidate_bytes: tuple[int, ...]
    state_bytes: int
    model_bytes: int
    compute_dtype: str
    samples: int
    tokens_per_sample: int
    micro_batches: int
    by_part: tuple[PartFact, ...] = ()


@dataclass(frozen=True)
class PartFact:
    """A value of a key in one part of the model: in its first layer and in its last."""

    key: str
    part: str
    tensors: int
    first: float
    last: float


@dataclass(frozen=True)
class ShardFacts:
    """One actor; of each run of its layers the first one, and one past its last."""

    index: int
    node: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    memory: ActorMemory
    busy_s: float
    utilisation: float


@dataclass(frozen=True)
class DiskFacts:
    """Room in the output directory, in bytes."""

    most_states: int
    kept_states: int
    state_bytes: int
    model_bytes: int
    needed_bytes: int


@dataclass(frozen=True)
class ScalePoint:
    """The same merge on another number of actors."""

    actors: int
    seconds: float
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """Everything that `arm-ray plan` prints.

    Attributes:
        partition: `contiguous` or `looped`: which layers the shards have.
        check_s: Reading all checkpoints once before the first iteration.
        export_s: Writing the final model after the last.
        compare_s: Losses of the checkpoints, and the final ones, after the last.
        recovery: Iterations after which a merge that is killed goes on.
        loss: What it loses, in words; empty without forward passes.
        host_bytes_per_node: The most that the shards of one node need on the host.
        problems: Why it does not fit; empty where it does.
        remedies: What would fit.
        assumptions: What was not read but assumed.
        measured: What was measured of the machine, one sentence each.
    """

    model: ModelFacts
    partition: str
    residency: str
    device: str
    memory_bytes: int
    nodes: int
    host_bytes_per_node: int
    shards: tuple[ShardFacts, ...]
    iterations: tuple[IterationFacts, ...]
    simulation: Simulation
    scaling: tuple[ScalePoint, ...]
    check_s: float
    export_s: float
    compare_s: float
    disk: DiskFacts
    recovery: tuple[int, ...]
    loss: str
    smallest: tuple[Fit, ...]
    problems: tuple[str, ...]
    remedies: tuple[str, ...]
    assumptions: tuple[str, ...]
    measured: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the cluster can hold the merge as it is configured."""
        return not self.problems

    @property
    def total_s(self) -> float:
        """The whole run, without starting Ray and reading the calibration data."""
        losses = sum(i.step_s + i.compare_s for i in self.iterations) + self.compare_s
        return self.check_s + self.simulation.makespan_s + self.export_s + losses

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "fits": self.fits, "total_s": self.total_s}


def make_plan(config: MergeConfig, cluster: Cluster, tokens_per_sample: int | None = None) -> Plan:
    """Plan a merge.

    Raises:
        ArmRayError: A path is missing, a checkpoint does not fit the others, or more shards are
            asked for than there are layer groups. That it does not fit is no error: `problems`.
    """
    workload, notes = open_workload(config, tokens_per_sample, cluster.device.units)
    runtime = config.runtime
    smallest = fits(workload, runtime, cluster, cpu_shards(runtime))
    count = _num_shards(workload, runtime, cluster, smallest)
    partition = choose_partition(workload, config, cluster, count, cluster.nodes)
    placement = place(workload, runtime, cluster, count, cluster.nodes, partition)
    memory = memory_of(workload, runtime, cluster, placement)
    life = life_of(workload, config, cluster, placement)
    timed = Estimate(workload, config, cluster, placement, life)
    simulation = timed.simulation
    problems = problems_of(workload, runtime, cluster, placement, memory)
    return Plan(
        model=_model_facts(workload, config),
        partition=partition,
        residency=runtime.residency,
        device=cluster.device.name,
        memory_bytes=cluster.memory_per_shard(runtime),
        nodes=cluster.nodes,
        host_bytes_per_node=max(node_memory(placement, memory)),
        shards=tuple(
            _shard_facts(workload, placement, i, memory[i], simulation) for i in range(count)
        ),
        iterations=timed.facts(),
        simulation=simulation,
        scaling=_scaling(workload, config, cluster, placement, partition, life),
        check_s=timed.check_s,
        export_s=timed.export_s,
        compare_s=timed.final_compare_s,
        disk=_disk_facts(config, workload, life),
        recovery=life.recovery,
        loss=life.loss_text if workload.needs_forward else "",
        smallest=smallest,
        problems=problems,
        remedies=remedies_of(cluster, smallest) if problems else (),
        assumptions=tuple(notes),
        measured=cluster.notes,
    )


def cpu_shards(runtime: RuntimeConfig) -> int:
    """Shards on this machine's CPU slots, as `plan_placement` counts them."""
    if runtime.layer_shards != "auto":
        return runtime.layer_shards
    return max(1, (os.cpu_count() or 1) // runtime.threads)


def _num_shards(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, smallest: Sequence[Fit]
) -> int:
    groups = len(workload.layout.groups)
    if not cluster.device.is_gpu:
        places = cpu_shards(runtime)
    elif cluster.gpus is not None:
        places = cluster.gpus * cluster.shards_per_gpu(runtime)
    else:
        # As many GPUs as it takes.
        fit = next(f for f in smallest if f.residency == runtime.residency)
        places = fit.shards or runtime.most_shards(groups)
    return choose_num_shards(
        runtime.layer_shards,
        places,
        runtime.most_shards(groups),
        is_dealt=runtime.deals_layers_round,
    )


def _scaling(
    workload: Workload,
    config: MergeConfig,
    cluster: Cluster,
    chosen: Placement,
    partition: Partition,
    life: StateLife,
) -> tuple[ScalePoint, ...]:
    """Other numbers of actors, with as many on a node as in the plan. Memory is not looked at."""
    groups = config.runtime.most_shards(len(workload.layout.groups), partition)
    counts = sorted({*(n for n in _SCALING if n <= groups), len(chosen.shards)})
    points = []
    for count in counts:
        nodes = -(-count // chosen.per_node)
        placement = place(workload, config.runtime, cluster, count, nodes, partition)
        simulation = Estimate(workload, config, cluster, placement, life).simulation
        points.append(ScalePoint(count, simulation.makespan_s, simulation.efficiency))
    return tuple(points)


def _model_facts(workload: Workload, config: MergeConfig) -> ModelFacts:
    layout = workload.layout
    given = [state_bytes(workload, state) for state in workload.dtypes]
    return ModelFacts(
        family=str(layout.config.model_type),
        parameters=workload.parameters,
        tensors=len(layout.shapes),
        rotated_tensors=len(layout.rotated) if workload.samples else 0,
        rotated_parameters=sum(map(workload.elements, layout.rotated)),
        layers=layout.num_layers,
        layer_groups=len(layout.groups),
        base_bytes=given[0],
        candidate_bytes=tuple(given[1:]),
        state_bytes=FLOAT32 * workload.parameters,
        model_bytes=model_bytes(workload, config),
        compute_dtype=str(workload.compute_dtype).removeprefix("torch."),
        samples=workload.samples,
        tokens_per_sample=workload.tokens,
        micro_batches=workload.micro_batches,
        by_part=tuple(_part_facts(workload, config)),
    )


def _part_facts(workload: Workload, config: MergeConfig) -> Iterator[PartFact]:
    """What keys with values by part come to in the layers that each part reaches."""
    layout = workload.layout
    for key in config.method.by_part:
        values = config.method.values(key)
        members: dict[str, list[float]] = {}
        for name in layout.shapes:
            part = part_of(name, list(values))
            if part is not None:
                members.setdefault(part, []).append(layout.depth_of(name))
        for part, depths in members.items():
            ends = (at_depth(values[part], depth) for depth in (min(depths), max(depths)))
            yield PartFact(f"method.{key}", part, len(depths), *ends)


def _shard_facts(
    workload: Workload, placement: Placement, index: int, memory: ActorMemory, run: Simulation
) -> ShardFacts:
    members = [workload.layout.groups[g] for g in placement.shards[index]]
    return ShardFacts(
        index=index,
        node=placement.node_of(index),
        layers=layer_runs(workload.layout, placement.shards[index]),
        parameters=sum(group.num_bytes for group in members) // FLOAT32,
        memory=memory,
        busy_s=run.busy_s[index],
        utilisation=run.utilisation[index],
    )


def _disk_facts(config: MergeConfig, workload: Workload, life: StateLife) -> DiskFacts:
    """As `RunDirectory.check_disk_space` counts it for a new run, with recovery points."""
    most = states_to_come(config, workload.num_candidates, life, 0)
    state, model = FLOAT32 * workload.parameters, model_bytes(workload, config)
    kept = {"all": life.last, "last": 1, "none": 0}[config.keep_states]
    return DiskFacts(most, kept, state, model, most * state + model)

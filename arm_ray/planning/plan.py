"""A plan: what a merge needs, how long it may take, and whether a cluster can hold it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arm_ray.checkpoints.adapter_export import adapter_bytes
from arm_ray.config import MergeConfig, RuntimeConfig
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
from arm_ray.planning.memory import ActorMemory
from arm_ray.planning.simulator import IterationTimes, Simulation, simulate
from arm_ray.planning.sources import open_workload
from arm_ray.planning.timing import Clock, Placement
from arm_ray.planning.workload import (
    FLOAT32,
    GroupWork,
    StateUse,
    Workload,
    group_work,
    state_uses,
)
from arm_ray.schedule import states_needed_after
from arm_ray.steps import most_trials

_SCALING = (1, 2, 4, 8, 16, 32, 64)
# The share of the disk and the efficiency depend on each other; this settles them.
_DISK_ROUNDS = 3
# Hidden states are sent more often where layers are dealt round: only for something in return.
_GAIN = 0.95


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
class IterationFacts:
    """One iteration (or the one pass of a merge without forward passes); bytes and operations.

    `seconds` is the time from the end of the iteration before to its own, without `step_s`, in
    which the step is chosen, and `compare_s`, for the loss of the state; `forward_s` and `merge_s`
    are summed over the shards.
    """

    iteration: int
    regime: str
    inputs: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    sent_bytes: int
    forward_flops: float
    capture_flops: float
    rotation_flops: float
    merge_flops: float
    forward_s: float
    merge_s: float
    write_s: float
    seconds: float
    step_s: float = 0.0
    compare_s: float = 0.0


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
        host_bytes_per_node: The most that the shards of one node need on the host.
        problems: Why it does not fit; empty where it does.
        remedies: What would fit.
        assumptions: What was not read but assumed.
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
    smallest: tuple[Fit, ...]
    problems: tuple[str, ...]
    remedies: tuple[str, ...]
    assumptions: tuple[str, ...]

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
    smallest = fits(workload, runtime, cluster, _auto_shards(runtime))
    count = _num_shards(workload, runtime, cluster, smallest)
    partition = choose_partition(workload, config, cluster, count, cluster.nodes)
    placement = place(workload, runtime, cluster, count, cluster.nodes, partition)
    memory = memory_of(workload, runtime, cluster, placement)
    timed = _Timed(workload, config, cluster, placement)
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
        scaling=_scaling(workload, config, cluster, placement, partition),
        check_s=timed.check_s,
        export_s=timed.export_s,
        compare_s=timed.final_compare_s,
        disk=_disk_facts(config, workload),
        smallest=smallest,
        problems=problems,
        remedies=remedies_of(cluster, smallest) if problems else (),
        assumptions=tuple(notes),
    )


def choose_partition(
    workload: Workload, config: MergeConfig, cluster: Cluster, shards: int, nodes: int
) -> Partition:
    """`runtime.partition`, where it is auto by a simulation of both.

    On the device, where a shard sends its first hidden states after one call however its layers
    lie, they are contiguous.

    Args:
        workload: The merge.
        config: Its configuration.
        cluster: For the rates of the device.
        shards: How many.
        nodes: On how many nodes at most.
    """
    runtime = config.runtime
    if runtime.partition != "auto":
        return runtime.partition
    turns = -(-len(workload.layout.groups) // runtime.groups_per_turn)
    is_waiting = workload.needs_forward and runtime.residency != "device"
    if shards == 1 or shards >= turns or not is_waiting:
        return "contiguous"
    row = place(workload, runtime, cluster, shards, nodes, "contiguous")
    dealt = place(workload, runtime, cluster, shards, nodes, "looped")
    seconds = [
        _Timed(workload, config, cluster, placement).simulation.makespan_s
        for placement in (row, dealt)
    ]
    is_faster = seconds[1] < _GAIN * seconds[0]
    fits_too = _fits(workload, config, cluster, dealt) or not _fits(workload, config, cluster, row)
    return "looped" if is_faster and fits_too else "contiguous"


def _fits(workload: Workload, config: MergeConfig, cluster: Cluster, placement: Placement) -> bool:
    """Whether shards fit into the cluster, and into what they are given."""
    memory = memory_of(workload, config.runtime, cluster, placement)
    limit = config.runtime.memory_gb
    if limit is not None and any(need.host.total > limit * 1e9 for need in memory):
        return False
    return not problems_of(workload, config.runtime, cluster, placement, memory)


def _auto_shards(runtime: RuntimeConfig) -> int:
    """Shards on this machine's CPU slots, as `plan_placement` counts them."""
    if runtime.layer_shards != "auto":
        return runtime.layer_shards
    return max(1, (os.cpu_count() or 1) // runtime.threads)


def _num_shards(
    workload: Workload, runtime: RuntimeConfig, cluster: Cluster, smallest: Sequence[Fit]
) -> int:
    groups = len(workload.layout.groups)
    if not cluster.device.is_gpu:
        places = _auto_shards(runtime)
    elif cluster.gpus is not None:
        places = cluster.gpus * cluster.shards_per_gpu(runtime)
    else:
        # As many GPUs as it takes.
        fit = next(f for f in smallest if f.residency == runtime.residency)
        places = fit.shards or runtime.most_shards(groups)
    return choose_num_shards(runtime.layer_shards, places, runtime.most_shards(groups))


class _Timed:
    """Times and sums of one placement."""

    def __init__(
        self, workload: Workload, config: MergeConfig, cluster: Cluster, placement: Placement
    ) -> None:
        self._workload, self._config, self._placement = workload, config, placement
        self._uses = state_uses(workload)
        device = cluster.device
        # Shards that wait for others leave the node's disk to those that work.
        users = float(placement.per_node)
        for _ in range(_DISK_ROUNDS):
            self._clock = Clock(workload, config.runtime, device, placement, users)
            self.simulation = simulate(self._times(), config.runtime.lookahead)
            users = max(1.0, placement.per_node * self.simulation.efficiency)
        share = device.bandwidth_efficiency * placement.nodes
        given = sum(_state_bytes(workload, state) for state in workload.dtypes)
        state = FLOAT32 * workload.parameters
        exported = state / device.disk_read + _model_bytes(workload, config) / device.disk_write
        self.check_s = given / device.disk_read / share if workload.needs_forward else 0.0
        self.export_s = exported / share if workload.needs_forward else 0.0

    def facts(self) -> tuple[IterationFacts, ...]:
        """One row for each iteration, or one for the only pass."""
        if not self._workload.needs_forward:
            return (self._linear_facts(),)
        ends = (0.0, *self.simulation.finished_s)
        return tuple(
            self._iteration_facts(use, ends[i + 1] - ends[i]) for i, use in enumerate(self._uses)
        )

    def _step_s(self, use: StateUse) -> float:
        """Seconds of the rounds in which an iteration's step is chosen, one after the other."""
        samples = self._workload.step_samples
        if not samples:
            return 0.0
        rounds, check = most_trials(self._config.schedule, len(use.plan.contributors))
        known = int(use.plan.previous != use.plan.reference)
        sizes = [(rounds[0], rounds[0] - 1), *((n, n) for n in rounds[1:])]
        seconds = sum(self._losses_s(samples, subjects, tried) for subjects, tried in sizes)
        return seconds + self._losses_s(self._workload.check_samples, check + known, check - 1)

    @property
    def compare_s(self) -> float:
        """Seconds of the loss of one state on the samples that models are compared on."""
        return self._losses_s(self._workload.compared_samples[0], 1, 0)

    @property
    def final_compare_s(self) -> float:
        """Seconds of the checkpoints' losses, and of the final ones."""
        checkpoints = len(self._workload.dtypes)
        compared, final = self._workload.compared_samples
        return self._losses_s(compared, checkpoints, 0) + self._losses_s(final, checkpoints + 1, 0)

    def _losses_s(self, samples: int, subjects: int, tried: int) -> float:
        if not samples:
            return 0.0
        return simulate([self._clock.losses(samples, subjects, tried)], 0).makespan_s

    def _times(self) -> list[IterationTimes]:
        if self._workload.needs_forward:
            return self._clock.iterations(self._uses)
        model = _model_bytes(self._workload, self._config)
        return [self._clock.linear_pass(self._uses, self._written(), model)]

    def _written(self) -> int:
        """States that a linear pass writes."""
        if self._config.keep_states == "all":
            return len(self._uses)
        # An adapter is made from the last state, also where none is kept.
        makes_adapter = self._config.output_format == "adapter"
        return int(self._config.keep_states == "last" or makes_adapter)

    def _iteration_facts(self, use: StateUse, seconds: float) -> IterationFacts:
        workload, plan = self._workload, use.plan
        groups = range(len(workload.layout.groups))
        work = sum((group_work(workload, g, len(plan.inputs)) for g in groups), GroupWork())
        parts = [self._clock.group(use, g) for g in groups]
        calls = workload.micro_batches * len(plan.inputs)
        from_disk = use.read if self._config.runtime.residency == "disk" else use.loaded
        return IterationFacts(
            iteration=plan.iteration,
            regime=plan.regime,
            inputs=plan.inputs,
            read_bytes=sum(_state_bytes(workload, state) for state in from_disk),
            written_bytes=FLOAT32 * workload.parameters,
            sent_bytes=calls * workload.hidden_bytes * self._placement.num_sends,
            forward_flops=work.forward_flops,
            capture_flops=work.capture_flops,
            rotation_flops=work.rotation_flops,
            merge_flops=work.merge_flops,
            forward_s=sum(calls * p.forward_call + p.forward_once for p in parts),
            merge_s=sum(p.rotation + p.elementwise for p in parts),
            write_s=sum(p.write for p in parts),
            seconds=seconds,
            step_s=self._step_s(use),
            compare_s=self.compare_s,
        )

    def _linear_facts(self) -> IterationFacts:
        workload = self._workload
        groups = range(len(workload.layout.groups))
        flops = sum(
            group_work(workload, g, len(use.plan.inputs)).merge_flops
            for use in self._uses
            for g in groups
        )
        state = FLOAT32 * workload.parameters
        return IterationFacts(
            iteration=len(self._uses),
            regime="all in one pass",
            inputs=tuple(workload.dtypes),
            read_bytes=sum(_state_bytes(workload, name) for name in workload.dtypes),
            written_bytes=self._written() * state + _model_bytes(workload, self._config),
            sent_bytes=0,
            forward_flops=0.0,
            capture_flops=0.0,
            rotation_flops=0.0,
            merge_flops=flops,
            forward_s=0.0,
            merge_s=sum(self.simulation.busy_s),
            write_s=0.0,
            seconds=self.simulation.makespan_s,
        )


def _scaling(
    workload: Workload,
    config: MergeConfig,
    cluster: Cluster,
    chosen: Placement,
    partition: Partition,
) -> tuple[ScalePoint, ...]:
    """Other numbers of actors, with as many on a node as in the plan. Memory is not looked at."""
    groups = len(workload.layout.groups)
    if partition == "looped":
        groups = -(-groups // config.runtime.groups_per_turn)
    counts = sorted({*(n for n in _SCALING if n <= groups), len(chosen.shards)})
    points = []
    for count in counts:
        nodes = -(-count // chosen.per_node)
        placement = place(workload, config.runtime, cluster, count, nodes, partition)
        simulation = _Timed(workload, config, cluster, placement).simulation
        points.append(ScalePoint(count, simulation.makespan_s, simulation.efficiency))
    return tuple(points)


def _state_bytes(workload: Workload, state: str) -> int:
    return sum(workload.group_bytes(state, g) for g in range(len(workload.layout.groups)))


def _model_bytes(workload: Workload, config: MergeConfig) -> int:
    """Of the final model; of an adapter, the most that it takes."""
    if config.output_format == "adapter":
        layout = workload.layout
        return adapter_bytes(layout.shapes, layout.rotated, config.adapter_rank)
    dtypes = workload.storage_dtypes
    return sum(workload.elements(n) * dtypes[n].itemsize for n in workload.layout.shapes)


def _model_facts(workload: Workload, config: MergeConfig) -> ModelFacts:
    layout = workload.layout
    given = [_state_bytes(workload, state) for state in workload.dtypes]
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
        model_bytes=_model_bytes(workload, config),
        compute_dtype=str(workload.compute_dtype).removeprefix("torch."),
        samples=workload.samples,
        tokens_per_sample=workload.tokens,
        micro_batches=workload.micro_batches,
    )


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


def _disk_facts(config: MergeConfig, workload: Workload) -> DiskFacts:
    """As `RunDirectory.check_disk_space` counts it for a new run."""
    schedule = config.schedule
    total = schedule.max_iterations
    most = total
    if config.keep_states != "all":
        needed = (
            len(states_needed_after(schedule, workload.num_candidates, t))
            for t in range(1, total + 1)
        )
        # The best state so far stays, where models are compared.
        most = min(total, max(needed) + 1 + config.compares_losses)
    state, model = FLOAT32 * workload.parameters, _model_bytes(workload, config)
    kept = {"all": total, "last": 1, "none": 0}[config.keep_states]
    return DiskFacts(most, kept, state, model, most * state + model)

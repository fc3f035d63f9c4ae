"""How long a merge takes on some shards, and which layers these have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from arm_ray.checkpoints.adapter_export import adapter_bytes
from arm_ray.config import MergeConfig
from arm_ray.model.partition import Partition
from arm_ray.planning.cluster import Cluster, place, problems_of
from arm_ray.planning.cluster import shard_memory as memory_of
from arm_ray.planning.simulator import IterationTimes, simulate
from arm_ray.planning.state_life import (
    StateLife,
    best_interval,
    linear_life,
    state_life,
    wants_last,
)
from arm_ray.planning.timing import Clock, Placement
from arm_ray.planning.workload import (
    FLOAT32,
    GroupWork,
    StateUse,
    Workload,
    group_work,
    state_uses,
)
from arm_ray.schedule import iterations_needed_after
from arm_ray.steps import most_trials

# The share of the disk and the efficiency depend on each other; this settles them.
_DISK_ROUNDS = 3
# Hidden states are sent more often where layers are dealt round: only for something in return.
_GAIN = 0.95


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


def choose_partition(
    workload: Workload, config: MergeConfig, cluster: Cluster, shards: int, nodes: int
) -> Partition:
    """`runtime.partition`, where it is auto by a simulation of both.

    On the device, where a shard sends its first hidden states after one call however its layers
    lie, they are contiguous, unless only the other one fits: layers that are dealt round need
    copies in the compute dtype of one group at a time.

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
    turns = runtime.most_shards(len(workload.layout.groups), "looped")
    if shards == 1 or shards >= turns or not workload.needs_forward:
        return "contiguous"
    row = place(workload, runtime, cluster, shards, nodes, "contiguous")
    dealt = place(workload, runtime, cluster, shards, nodes, "looped")
    fits_row, fits_dealt = (_fits(workload, config, cluster, each) for each in (row, dealt))
    if runtime.residency == "device":
        return "looped" if fits_dealt and not fits_row else "contiguous"
    life = state_life(config, workload.num_candidates, None)
    seconds = [
        Estimate(workload, config, cluster, placement, life).simulation.makespan_s
        for placement in (row, dealt)
    ]
    is_faster = seconds[1] < _GAIN * seconds[0]
    return "looped" if is_faster and (fits_dealt or not fits_row) else "contiguous"


def _fits(workload: Workload, config: MergeConfig, cluster: Cluster, placement: Placement) -> bool:
    """Whether shards fit into the cluster, and into what they are given."""
    memory = memory_of(workload, config.runtime, cluster, placement)
    limit = config.runtime.memory_gb
    if limit is not None and any(need.host.total > limit * 1e9 for need in memory):
        return False
    return not problems_of(workload, config.runtime, cluster, placement, memory)


def life_of(
    workload: Workload,
    config: MergeConfig,
    cluster: Cluster,
    placement: Placement,
    last: int | None = None,
) -> StateLife:
    """What becomes of a merge's states, with `runtime.recovery_every` by an estimate if it is auto.

    Args:
        workload: The merge.
        config: Its configuration.
        cluster: For the rates of the device.
        placement: The shards.
        last: The iteration that the merge is halted after; None: it is not.
    """
    asked, schedule, count = config.runtime.recovery_every, config.schedule, workload.num_candidates
    if not workload.needs_forward:
        return linear_life(config, last)
    never = state_life(config, count, None, last)
    timed = Estimate(workload, config, cluster, placement, never)
    seconds = sum(row.seconds + row.step_s + row.compare_s for row in timed.facts())
    iteration_s = seconds / schedule.max_iterations
    every = None if isinstance(asked, str) else asked
    if asked == "auto" and len(never.written) < never.last:
        needed = iterations_needed_after(schedule, count, schedule.max_iterations - 1)
        write_s = len(needed) * FLOAT32 * workload.parameters / timed.disk_write
        every = best_interval(iteration_s, write_s)
    return replace(state_life(config, count, every, last), iteration_s=iteration_s)


class Estimate:
    """Times and sums of one placement.

    Args:
        workload: The merge.
        config: Its configuration.
        cluster: For the rates of the device.
        placement: The shards.
        life: Which states are written.
    """

    def __init__(
        self,
        workload: Workload,
        config: MergeConfig,
        cluster: Cluster,
        placement: Placement,
        life: StateLife,
    ) -> None:
        self._workload, self._config, self._placement = workload, config, placement
        self._life = life
        self._uses = state_uses(workload)
        device = cluster.device
        # Where losses are taken, an iteration begins once the one before is known to go on.
        ahead = 0 if workload.takes_losses else config.runtime.lookahead
        # Shards that wait for others leave the node's disk to those that work.
        users = float(placement.per_node)
        for _ in range(_DISK_ROUNDS):
            self._clock = Clock(workload, config.runtime, device, placement, users)
            self.simulation = simulate(self._times(), ahead)
            users = max(1.0, placement.per_node * self.simulation.efficiency)
        share = device.bandwidth_efficiency * placement.nodes
        self.disk_write = share * device.disk_write
        given = sum(state_bytes(workload, state) for state in workload.dtypes)
        self.check_s = given / device.disk_read / share if workload.needs_forward else 0.0
        self.export_s = self._export_s(share * device.disk_read)

    def _export_s(self, disk_read: float) -> float:
        """Seconds to write the model, and the last state where only its end makes it wanted."""
        workload, config = self._workload, self._config
        if not workload.needs_forward:
            return 0.0
        state, life = FLOAT32 * workload.parameters, self._life
        late = state if wants_last(config) and life.last not in life.written else 0
        seconds = (model_bytes(workload, config) + late) / self.disk_write
        return seconds + (state / disk_read if config.runtime.residency == "disk" else 0.0)

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
            return self._clock.iterations(self._uses, self._life)
        model = model_bytes(self._workload, self._config)
        return [self._clock.linear_pass(self._uses, len(self._life.written), model)]

    def _iteration_facts(self, use: StateUse, seconds: float) -> IterationFacts:
        workload, plan = self._workload, use.plan
        groups = range(len(workload.layout.groups))
        work = sum((group_work(workload, g, len(plan.inputs)) for g in groups), GroupWork())
        parts = [self._clock.group(use, g) for g in groups]
        calls = workload.micro_batches * len(plan.inputs)
        is_written = plan.iteration in self._life.written
        from_disk = use.read if self._config.runtime.residency == "disk" else use.loaded
        return IterationFacts(
            iteration=plan.iteration,
            regime=plan.regime,
            inputs=plan.inputs,
            read_bytes=sum(state_bytes(workload, state) for state in from_disk),
            written_bytes=FLOAT32 * workload.parameters * is_written,
            sent_bytes=calls * workload.hidden_bytes * self._placement.num_sends,
            forward_flops=work.forward_flops,
            capture_flops=work.capture_flops,
            rotation_flops=work.rotation_flops,
            merge_flops=work.merge_flops,
            forward_s=sum(calls * p.forward_call + p.forward_once for p in parts),
            merge_s=sum(p.rotation + p.elementwise for p in parts),
            write_s=sum(p.write for p in parts) * is_written,
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
            read_bytes=sum(state_bytes(workload, name) for name in workload.dtypes),
            written_bytes=len(self._life.written) * state + model_bytes(workload, self._config),
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


def state_bytes(workload: Workload, state: str) -> int:
    """Of a state, as it is stored; bytes."""
    return sum(workload.group_bytes(state, g) for g in range(len(workload.layout.groups)))


def model_bytes(workload: Workload, config: MergeConfig) -> int:
    """Of the final model; of an adapter, the most that it takes."""
    if config.output_format == "adapter":
        layout = workload.layout
        return adapter_bytes(layout.shapes, layout.matrices, config.adapter_rank)
    dtypes = workload.storage_dtypes
    return sum(workload.elements(n) * dtypes[n].itemsize for n in workload.layout.shapes)

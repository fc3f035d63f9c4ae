"""What each layer shard of a merge is given, and whether it fits."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arm_ray.config import MergeConfig
from arm_ray.errors import PlacementError
from arm_ray.events import RunPlanned
from arm_ray.merging.method import Method
from arm_ray.model.partition import Partition, choose_balance, partition_layers
from arm_ray.planning.cluster import (
    Cluster,
    fits,
    layer_runs,
    make_cluster,
    remedies_of,
    runs_text,
)
from arm_ray.planning.estimate import Estimate, choose_partition, life_of
from arm_ray.planning.memory import Peak, actor_memory
from arm_ray.planning.plan import cpu_shards
from arm_ray.planning.sources import workload_of
from arm_ray.planning.state_life import StateLife
from arm_ray.planning.timing import Placement as Timed
from arm_ray.planning.workload import Workload
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.shards.meter import DeviceMemory
from arm_ray.runtime.shards.placement import Placement
from arm_ray.runtime.shards.spec import ShardSpec


def shard_specs(
    config: MergeConfig,
    method: Method,
    inputs: MergeInputs,
    run: Path,
    placement: Placement,
    last: int | None = None,
) -> list[ShardSpec]:
    """What each layer shard of a merge is given, in the order of the layers.

    Args:
        config: The configuration.
        method: How states are merged.
        inputs: The checked checkpoints.
        run: The run directory.
        placement: Number of shards, and their device.
        last: The iteration that the merge is halted after; None: it is not.
    """
    planned = _Planned(config, inputs, placement)
    shares = planned.shares(method)
    life = planned.life(shares, last) if method.needs_forward else None
    rate = config.runtime.disk_mb_per_s
    # There is one shard for all cores. With forward passes it keeps to the memory that is planned.
    workers = os.cpu_count() if placement.is_here and not method.needs_forward else None
    return [
        ShardSpec(
            inputs.layout,
            groups,
            inputs.checkpoints,
            run,
            config.schedule,
            method,
            placement.device,
            inputs.compute_dtype,
            config.runtime.threads,
            config.runtime.residency,
            second_moments=inputs.second_moments,
            disk_bytes_per_s=None if rate is None else rate * 1e6 / len(shares),
            scratch=config.runtime.scratch,
            niceness=config.runtime.niceness,
            life=life,
            workers=workers,
        )
        for groups in shares
    ]


# Starting Ray and actors takes about so many seconds.
SHORT_S = 20.0


@dataclass(frozen=True)
class _Planned:
    """What `auto` stands for, as `arm-ray plan` would choose it for one node."""

    config: MergeConfig
    inputs: MergeInputs
    placement: Placement

    @property
    def partition(self) -> Partition:
        """`runtime.partition`."""
        asked, count = self.config.runtime.partition, self.placement.num_shards
        if asked != "auto" or count == 1:
            return "contiguous" if asked == "auto" else asked
        return choose_partition(self._workload, self.config, self._cluster, count, 1)

    def shares(self, method: Method) -> list[tuple[int, ...]]:
        """The layer groups of each shard."""
        runtime, placement = self.config.runtime, self.placement
        return partition_layers(
            self.inputs.layout,
            placement.num_shards,
            choose_balance(runtime.balance, on_gpu=placement.device == "cuda"),
            needs_forward=method.needs_forward,
            partition=self.partition,
            turn=runtime.groups_per_turn,
        )

    def life(self, shares: Sequence[Sequence[int]], last: int | None) -> StateLife:
        """What becomes of the states, with `runtime.recovery_every`."""
        placed = Timed(shares, 1)
        return life_of(self._workload, self.config, self._cluster, placed, last)

    def event(self, method: Method, last: int | None) -> RunPlanned:
        """See `planned`."""
        shares, runtime = self.shares(method), self.config.runtime
        is_gpu = self.placement.device == "cuda"
        timed = Estimate(
            self._workload, self.config, self._cluster, Timed(shares, 1), self.life(shares, last)
        )
        rows = timed.facts()
        seconds = tuple(round(row.seconds + row.step_s + row.compare_s, 3) for row in rows)
        memory = [actor_memory(self._workload, g, runtime, on_gpu=is_gpu) for g in shares]
        return RunPlanned(
            self._cluster.device.name,
            round(sum(seconds), 3),
            seconds,
            tuple(need.host.total for need in memory),
            sum(row.sent_bytes for row in rows),
            sum(row.written_bytes for row in rows),
        )

    @functools.cached_property
    def _workload(self) -> Workload:
        return workload_of(self.config, self.inputs.layout, self.inputs.checkpoints)

    @functools.cached_property
    def _cluster(self) -> Cluster:
        gpus = self.placement.num_shards if self.placement.device == "cuda" else None
        return make_cluster(self.config.runtime, gpus=gpus)


def is_short(config: MergeConfig, inputs: MergeInputs) -> bool:
    """Whether one shard on a CPU is planned to end a merge before more of them would have begun."""
    planned = _Planned(config, inputs, Placement(1, "cpu", is_here=True))
    life = planned.life([[group.index for group in inputs.layout.groups]], None)
    return life.last * life.iteration_s <= SHORT_S


def planned(
    config: MergeConfig, method: Method, inputs: MergeInputs, placement: Placement, last: int | None
) -> RunPlanned:
    """What the iterations of a merge are planned to take, as `arm-ray plan` says it.

    Args:
        config: The configuration.
        method: How states are merged.
        inputs: The checked checkpoints.
        placement: Number of shards, and their device.
        last: The iteration that the merge is halted after; None: it is not.
    """
    return _Planned(config, inputs, placement).event(method, last)


def check_memory(
    config: MergeConfig, method: Method, inputs: MergeInputs, placement: Placement
) -> None:
    """Refuse a merge that is planned to need more memory than it was given.

    Raises:
        PlacementError: Says how much, and of what.
    """
    limit = config.runtime.memory_gb
    if limit is None:
        return
    workload = workload_of(config, inputs.layout, inputs.checkpoints)
    for index, groups in enumerate(_Planned(config, inputs, placement).shares(method)):
        is_gpu = placement.device == "cuda"
        peak = actor_memory(workload, groups, config.runtime, on_gpu=is_gpu).host
        if peak.total > limit * 1e9:
            raise PlacementError(
                "a layer shard would need more memory than it is given",
                where=f"runtime.memory_gb, shard {index + 1} of {placement.num_shards}",
                got=_peak_text(peak),
                expected=f"at most {limit:g} GB",
                hint="use runtime.residency: disk, more runtime.layer_shards, or fewer "
                "runtime.micro_batch_tokens; arm-ray plan shows what fits",
            )


# A plan was within so much of the memory of a GPU (docs/supported-machines.md).
_PLAN_ERROR = 0.1


def check_gpu_memory(
    config: MergeConfig,
    inputs: MergeInputs,
    shares: Sequence[Sequence[int]],
    found: Sequence[DeviceMemory],
) -> None:
    """Refuse GPUs that are too small for what their shards are planned to need.

    Args:
        config: The configuration.
        inputs: The checked checkpoints.
        shares: The layer groups of each shard.
        found: Memory of each shard's GPU.

    Raises:
        PlacementError: Says what the first such shard needs, what there is, and what would fit.
    """
    runtime = config.runtime
    workload = workload_of(config, inputs.layout, inputs.checkpoints)
    for index, (groups, there) in enumerate(zip(shares, found, strict=True)):
        peak = actor_memory(workload, groups, runtime, on_gpu=True).limiting
        cluster = make_cluster(runtime, gpus=len(shares), gpu_memory_gb=there.available / 1e9)
        if peak.total <= (1.0 + _PLAN_ERROR) * cluster.memory_per_shard(runtime):
            continue
        sharing = cluster.shards_per_gpu(runtime)
        smallest = fits(workload, runtime, replace(cluster, gpus=None), cpu_shards(runtime))
        raise PlacementError(
            "a GPU is too small for its layer shard",
            where=f"shard {index + 1} of {len(shares)} (layers "
            f"{runs_text(layer_runs(inputs.layout, groups))}), {there.name}",
            got=f"{there.available / 1e9:.2f} GB free of {there.total / 1e9:.2f}"
            + (f", for {sharing} shards" if sharing > 1 else ""),
            expected=f"{_peak_text(peak)} with runtime.residency: {runtime.residency}",
            hint=f"what would fit: {'; or '.join(remedies_of(cluster, smallest))}",
        )


def _peak_text(peak: Peak) -> str:
    largest = sorted(peak.terms.items(), key=lambda term: -term[1])[:3]
    terms = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest)
    return f"{peak.total / 1e9:.2f} GB: {terms}, …"

"""What a layer shard is given, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.config import ScheduleConfig
from arm_ray.events import ModuleChange
from arm_ray.merging.method import Method
from arm_ray.merging.similarity import SimilaritySums
from arm_ray.model.layout import ModelLayout
from arm_ray.model.partition import Residency, chunks_of
from arm_ray.planning.state_life import StateLife
from arm_ray.runtime.shards.transport import Transport
from arm_ray.schedule import BASE, INITIAL


@dataclass(frozen=True)
class ShardSpec:
    """What a layer shard is given once.

    Attributes:
        layout: The model.
        groups: Indices of the shard's layer groups, ascending.
        checkpoints: State name (`base`, `candidate-1`, …) -> checkpoint.
        run: The run directory.
        schedule: To know which states are read again.
        method: How they are merged.
        device: torch device of the shard, for example `cuda`; Ray gives each actor its own GPU.
        compute_dtype: Of the forward pass.
        threads: CPU threads.
        residency: Where stored weights live.
        transport: How hidden states leave the shard.
        second_moments: Name of a candidate -> where its second moments lie, for an operator that
            wants them.
        disk_bytes_per_s: Most that the shard reads and writes in a second; None: no limit.
        scratch: `runtime.scratch`.
        niceness: `runtime.niceness`.
        life: Which states are written, and how long the others stay; None: all are written.
        workers: Threads that work on pieces of tensors side by side, each with one thread to
            itself, which changes no bits; None: as many as `threads`.
        kept_base: Fingerprint of the base, whose weights stay in memory when no iteration reads
            them any more, for another merge by the same shards; None: they do not stay.
        environment: Variables of the process that the shard has to itself, with which it goes about
            as arm_ray's own; None: the process is not its own.
    """

    layout: ModelLayout
    groups: Sequence[int]
    checkpoints: Mapping[str, Checkpoint]
    run: Path
    schedule: ScheduleConfig
    method: Method
    device: str
    compute_dtype: torch.dtype
    threads: int
    residency: Residency = "device"
    transport: Transport = "object_store"
    second_moments: Mapping[str, Checkpoint] = field(default_factory=dict)
    disk_bytes_per_s: float | None = None
    scratch: str | None = None
    niceness: int = 0
    life: StateLife | None = None
    workers: int | None = None
    kept_base: str | None = None
    environment: Mapping[str, str] | None = None

    @property
    def num_candidates(self) -> int:
        """How many candidates there are."""
        return len(self.checkpoints.keys() - {BASE, INITIAL})

    def is_of_same_base(self, other: ShardSpec) -> bool:
        """Whether the base's weights that another shard keeps are this one's too."""
        return (
            self.kept_base is not None
            and self.kept_base == other.kept_base
            and tuple(self.groups) == tuple(other.groups)
            and [g.tensors for g in self.layout.groups] == [g.tensors for g in other.layout.groups]
            and (self.residency, self.device) == (other.residency, other.device)
        )

    @property
    def chunks(self) -> list[range]:
        """Groups that run one after another on a micro-batch; see `chunks_of`."""
        return chunks_of(self.groups, self.residency)

    def sends_after(self, chunk: range) -> bool:
        """Whether the layers that follow a chunk are another shard's."""
        return chunk.stop < len(self.layout.groups) and chunk.stop not in self.groups


@dataclass(frozen=True)
class GroupReport:
    """What merging one layer group gave; times in seconds, sizes in bytes.

    `modules` are in the order of the group's tensors.
    """

    group: int
    similarity: tuple[SimilaritySums, ...]
    rotated: int
    rank_deficient: tuple[str, ...]
    seconds: float
    num_bytes: int
    modules: tuple[ModuleChange, ...] = ()

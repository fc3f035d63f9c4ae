"""Where and with what a merge runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from arm_ray.config.sections import LocalStr, PositiveInt, Section, scratch_path
from arm_ray.identity import NOTHING, RESULT, Decides


class RuntimeConfig(Section):
    """Where and with what the merge runs.

    Only `threads`, `micro_batch_tokens` and `device` have an influence on the bits.
    """

    DECIDES: ClassVar[Decides] = NOTHING

    layer_shards: Literal["auto"] | PositiveInt = "auto"
    """Actors that share the layers; auto: one per GPU, or one per CPU slot without GPUs. Where
    layers are dealt round (`partition`), auto leaves places free that would make nothing faster.

    Where no cluster is named, a single one on a CPU is no actor: it runs in the driver's process,
    and Ray is not started. auto is then one where the merge is planned to take less than 20 s, or
    runs no forward passes.
    """
    layers_per_group: PositiveInt = 1
    """Decoder layers loaded, run, merged and written together."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RESULT] = "auto"
    """auto: cuda where the cluster has GPUs."""
    balance: Literal["auto", "bytes", "work"] = "auto"
    """What the shards' layers are balanced by; auto: bytes on GPUs, work on CPUs."""
    partition: Literal["auto", "contiguous", "looped"] = "auto"
    """Which layer groups a shard has: `contiguous`, a row of them; `looped`, with P shards every
    P-th, so that hidden states reach all shards after P groups; auto: contiguous on the device,
    else what a simulation of the merge takes to be the faster one."""
    groups_per_turn: PositiveInt = 1
    """Where layer groups are dealt round, how many a shard is given at a time."""
    residency: Literal["device", "host", "disk"] = "device"
    """Where the weights of a shard's layers live: `device`, host memory, or memory-mapped files."""
    transport: Literal["auto", "direct", "object_store"] = "auto"
    """How hidden states are sent: auto and direct take Ray's direct tensor transport."""
    lookahead: Annotated[int, Field(ge=0)] = 2
    """Iterations submitted before an earlier one is known not to be the last."""
    recovery_every: Literal["auto", "never"] | PositiveInt = "auto"
    """States stay in memory, unless residency is disk. Every so many iterations what the next one
    reads is written, so that a merge that is killed goes on from there; auto: as often as pays off,
    from the time of an iteration and of writing."""
    gpus_per_shard: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    """GPUs reserved for a shard; auto: 1 on cuda, 0 on cpu."""
    placement_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "SPREAD"
    """How the shards' placement group is laid over the nodes."""
    threads: Annotated[PositiveInt, RESULT] = 1
    """CPU threads of one shard. More threads sum in another order: it is part of the result."""
    micro_batch_tokens: Annotated[PositiveInt, RESULT] = 2048
    """Padded tokens in one forward pass: fewer leave less padding and fill the pipeline better."""
    max_weight_file_gb: Annotated[float, Field(gt=0.0)] = 5.0
    """Size of one weight file of the final model, 10^9 bytes."""
    placement_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    """How long to wait for the cluster to place the actors."""
    memory_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Host memory of a shard, 10^9 bytes: reserved in Ray, and the merge does not start where it is
    planned to need more; null: neither."""
    disk_mb_per_s: Annotated[float, Field(gt=0.0)] | None = None
    """Most that all shards together read and write in a second, 10^6 bytes; null: no limit."""
    storage: Literal["auto", "shared", "per_node"] = "auto"
    """shared: all nodes see the output and the checkpoints under the same paths; per_node: each
    shard copies what its layers need to its own node, and the results are assembled at the output;
    auto: shared where every node turns out to see the output, else per_node."""
    scratch: LocalStr | None = None
    """Directory on each node's own disk, for copies of what lies elsewhere; null: one below the
    system's temporary directory."""
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """Named Ray resources that each shard takes besides CPUs and GPUs, to bind shards to nodes."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Added to the niceness that Ray gives its workers (15): 4 has the shards' processes yield
    their CPUs to everything else on the node, a training job say."""
    max_recoveries: Annotated[int, Field(ge=0)] = 3
    """How often in a row lost shards are placed anew before the merge ends with an error; each
    finished iteration starts the count again."""
    elastic: bool = True
    """Whether shards are placed anew, between two iterations, once nodes have joined the cluster,
    and on fewer places than `layer_shards` once nodes have left."""

    def most_shards(self, num_groups: int, partition: str | None = None) -> int:
        """How many shards so many layer groups are enough for; None: with `partition` as it is."""
        turn = self.groups_per_turn if (partition or self.partition) == "looped" else 1
        return -(-num_groups // turn)

    @property
    def deals_layers_round(self) -> bool:
        """Whether layer groups are dealt round to the shards, as far as that is of use."""
        return self.partition == "looped" or (
            self.partition == "auto" and self.residency != "device"
        )

    @property
    def asks_for_actors(self) -> bool:
        """Whether a setting asks for what only layer shards in processes of their own can have."""
        return (
            self.layer_shards not in ("auto", 1)
            or self.storage == "per_node"
            or bool(self.resources)
            or self.memory_gb is not None
            or self.niceness > 0
            or bool(self.gpus_per_shard != "auto" and self.gpus_per_shard)
        )

    @property
    def scratch_path(self) -> Path:
        """The scratch directory of the node that asks."""
        return scratch_path(self.scratch)

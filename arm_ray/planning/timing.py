"""From bytes and operations to seconds on a device: the times that the simulator takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from arm_ray.config import RuntimeConfig
from arm_ray.merging.blocks import BLOCK_GPU
from arm_ray.merging.similarity import COMPARE_BLOCK
from arm_ray.model.partition import call_order, chunks_of, receivers
from arm_ray.planning.devices import Device
from arm_ray.planning.simulator import ChunkTimes, IterationTimes, ShardTimes
from arm_ray.planning.state_life import StateLife
from arm_ray.planning.workload import (
    COMPARE_OPERATIONS,
    FLOAT32,
    StateUse,
    Workload,
    forward_work,
    group_work,
)
from arm_ray.schedule import IterationPlan


@dataclass(frozen=True)
class Placement:
    """Shards on nodes.

    Attributes:
        shards: The layer groups of each shard.
        nodes: How many nodes; neighbours fill one after the other.
    """

    shards: Sequence[Sequence[int]]
    nodes: int

    @property
    def num_sends(self) -> int:
        """How often the hidden states of a micro-batch are sent."""
        # On the device, chunks are what lies between two sends.
        return len(call_order(self.shards, "device")) - 1

    @property
    def per_node(self) -> int:
        """Most shards on one node."""
        return -(-len(self.shards) // self.nodes)

    def node_of(self, shard: int) -> int:
        """The node of a shard."""
        return shard // self.per_node


@dataclass(frozen=True)
class GroupSeconds:
    """One layer group in one iteration.

    Attributes:
        forward_call: One micro-batch of one state.
        forward_once: Whatever happens once in an iteration: moving weights, casting, reading.
        rotation: Of the merge: factorisations and products.
        elementwise: Of the merge: differences, sums, the comparison of states.
        write: To the disk: of the merge, or beside it where merged states live in memory.
        read_ahead: Reading that goes on beside everything else.
    """

    forward_call: float
    forward_once: float
    rotation: float
    elementwise: float
    write: float
    read_ahead: float


class Clock:
    """Seconds for the parts of a merge.

    Args:
        workload: The merge.
        runtime: For the residency.
        device: Rates of one shard's device.
        placement: For the links between shards.
        disk_users: Shards that share a node's disk at a time, on average.
    """

    def __init__(
        self,
        workload: Workload,
        runtime: RuntimeConfig,
        device: Device,
        placement: Placement,
        disk_users: float,
    ) -> None:
        self._workload, self._device, self._placement = workload, device, placement
        self._residency = runtime.residency
        share = device.bandwidth_efficiency
        self._memory = share * device.memory_bandwidth
        self._host = share * device.host_bandwidth
        self._disk_read = share * device.disk_read / disk_users
        self._disk_write = share * device.disk_write / disk_users
        # Where the shards have all cores of a node, they give them up for Ray's own work.
        is_full = placement.per_node * runtime.threads >= (os.cpu_count() or 1)
        sends = len(placement.shards) > 1 and not device.is_gpu
        self._call = device.call_s if sends and is_full else 0.0
        self._moves = device.is_gpu and self._residency != "device"
        order = call_order(placement.shards, self._residency)
        self._order, self._sends = tuple(shard for shard, _ in order), receivers(order)
        self._known: dict[tuple[object, ...], GroupSeconds] = {}

    def iterations(self, uses: Sequence[StateUse], life: StateLife) -> list[IterationTimes]:
        """What the simulator takes, for each iteration.

        Args:
            uses: The iterations.
            life: Which states are written.
        """
        made = [use.plan.output for use in uses]
        found = []
        for use in uses:
            times = self._iteration(use, is_written=use.plan.iteration in life.written)
            if self._residency != "disk":
                gone = use.held - use.kept
                replaces = tuple(i for i, name in enumerate(made) if name in gone)
                times = replace(times, replaces=replaces, may_end_early=life.may_end_early)
            found.append(times)
        return found

    def losses(self, samples: int, subjects: int, tried: int) -> IterationTimes:
        """The passes of some states whose losses are taken at once.

        Args:
            samples: That each is run on.
            subjects: States.
            tried: How many of these are only tried: their layers are made first.
        """
        workload = self._workload
        calls = subjects * workload.micro_batches_of(samples)
        name = str(workload.compute_dtype).removeprefix("torch.")
        rate = self._device.forward_efficiency * self._device.flops[name]
        head = 2.0 * workload.elements(workload.layout.embedding)
        shards = []
        for index, groups in enumerate(self._placement.shards):
            flops = moved = made = 0.0
            for group in groups:
                work = forward_work(workload, workload.layout.groups[group], samples)
                layers = workload.layer_elements(group)
                flops += work.forward_flops
                moved += workload.compute_dtype.itemsize * layers
                # Each input's rows are read and cast, added, and written.
                made += tried * layers * FLOAT32 * (2.0 * len(workload.dtypes) + 3.0)
            if groups[-1] == len(workload.layout.groups) - 1:
                # All tokens of a sample count at most.
                flops += head * samples * workload.tokens
            each = subjects * max(
                flops / rate, workload.micro_batches_of(samples) * moved / self._memory
            )
            each *= self._device.forward_scale
            once = self._device.elementwise_scale * made / self._memory
            per_call = (each + once) / calls if calls else 0.0
            # A trip through all chunks takes as long as the shards' parts of it together.
            count = len(chunks_of(groups, self._residency))
            chunk = ChunkTimes(per_call / count, 0.0)
            shards.append(ShardTimes((chunk,) * count, self._send(index)))
        return IterationTimes(calls, tuple(shards), self._order)

    def linear_pass(
        self, uses: Sequence[StateUse], written: int, model_bytes: int
    ) -> IterationTimes:
        """A merge without forward passes: all iterations on one group after another.

        Args:
            uses: All iterations.
            written: Merged states that are written.
            model_bytes: Of the final model, which the same pass writes.
        """
        workload = self._workload
        shards = []
        for groups in self._placement.shards:
            seconds = 0.0
            for group in groups:
                elements = sum(map(workload.elements, workload.layout.groups[group].tensors))
                model = model_bytes * elements / workload.parameters
                given = sum(workload.group_bytes(state, group) for state in workload.dtypes)
                seconds += sum(self.group(use, group).elementwise for use in uses)
                seconds += (FLOAT32 * elements * written + model) / self._disk_write
                seconds += given / self._disk_read
            shards.append(ShardTimes((ChunkTimes(0.0, seconds),)))
        return IterationTimes(0, tuple(shards))

    def group(self, use: StateUse, group: int) -> GroupSeconds:
        """Seconds of one layer group in one iteration."""
        key = (
            group,
            *(s if s in self._workload.dtypes else "merged" for s in use.plan.inputs),
            frozenset(use.read if self._residency == "disk" else use.loaded),
            use.aside & use.read,
            use.aside_after & use.kept,
        )
        if key not in self._known:
            self._known[key] = self._group(use, group)
        return self._known[key]

    def _iteration(self, use: StateUse, *, is_written: bool) -> IterationTimes:
        calls = self._workload.micro_batches * len(use.plan.inputs)
        shards = []
        for index, groups in enumerate(self._placement.shards):
            chunks = [
                self._chunk([self.group(use, group) for group in chunk], calls, is_written)
                for chunk in chunks_of(groups, self._residency)
            ]
            shards.append(ShardTimes(tuple(chunks), self._send(index)))
        return IterationTimes(calls, tuple(shards), self._order)

    def _chunk(self, parts: Sequence[GroupSeconds], calls: int, is_written: bool) -> ChunkTimes:
        forward = sum(calls * part.forward_call + part.forward_once for part in parts)
        merge = sum(part.rotation + part.elementwise for part in parts)
        write = sum(part.write for part in parts) if is_written else 0.0
        if self._residency == "disk":
            merge, write = merge + write, 0.0
        # Reading ahead costs what it takes longer than the work beside it.
        forward += max(0.0, sum(part.read_ahead for part in parts) - forward - merge)
        # Without activations, what happens once comes before the merge.
        if not calls:
            return ChunkTimes(0.0, forward + merge, write)
        return ChunkTimes(forward / calls + self._call, merge, write)

    def _send(self, shard: int) -> float:
        """Seconds to send a micro-batch's hidden states to the shard with the next layers."""
        placement, device = self._placement, self._device
        if shard not in self._sends:
            return 0.0
        is_near = placement.node_of(shard) == placement.node_of(self._sends[shard])
        rate = device.link_bandwidth if is_near else device.network_bandwidth
        return self._workload.hidden_bytes / (device.bandwidth_efficiency * rate)

    def _group(self, use: StateUse, group: int) -> GroupSeconds:
        workload, device, plan = self._workload, self._device, use.plan
        work = group_work(workload, group, len(plan.inputs))
        calls = workload.micro_batches * len(plan.inputs)
        name = str(workload.compute_dtype).removeprefix("torch.")
        forward_rate = device.forward_efficiency * device.flops[name]
        product_rate = device.merge_efficiency * device.flops["float32"]
        factor_rate = device.factor_efficiency * device.flops["float64"]
        names = workload.layout.groups[group].tensors
        elements = sum(map(workload.elements, names))
        layer_bytes = workload.compute_dtype.itemsize * workload.layer_elements(group)
        call = 0.0
        if calls:
            products = work.forward_flops / calls / forward_rate
            # A small micro-batch takes as long as reading the weights.
            call = max(products, layer_bytes / self._memory)
            call += work.capture_bytes / calls / self._memory
            call *= device.forward_scale
        rotation = work.factor_flops / factor_rate + work.apply_flops / product_rate
        rotation += work.factorisations * device.factorisation_s
        rotation *= device.rotation_scale
        elementwise = work.merge_bytes / self._memory
        blocks = work.compare_blocks
        if device.is_gpu:
            blocks = max(len(names), blocks * COMPARE_BLOCK // BLOCK_GPU)
        elementwise += blocks * COMPARE_OPERATIONS * device.launch_s
        elementwise *= device.elementwise_scale
        new_bytes = FLOAT32 * elements
        write = new_bytes / self._disk_write
        if device.is_gpu and self._residency == "host":
            # Where the new state lives, written or not.
            elementwise += new_bytes / self._host
        elif device.is_gpu:
            write += new_bytes / self._host
        if self._moves:
            # Each state's rows are moved as they are stored, and cast there.
            moved = sum(workload.group_bytes(state, group) for state in use.read)
            elementwise += moved / self._host
        elif device.is_gpu and self._residency == "device":
            # What is only compared with lies on the host; it goes there once.
            moves = [*(use.aside & use.read), *((use.aside_after - use.aside) & use.kept)]
            elementwise += sum(workload.group_bytes(s, group) for s in moves) / self._host
        ahead = self._residency == "disk"
        states = use.read if ahead else use.loaded
        read = sum(workload.group_bytes(s, group) for s in states) / self._disk_read
        copies = self._copies(plan, group, layer_bytes)
        once = copies if ahead else copies + read
        return GroupSeconds(call, once, rotation, elementwise, write, read if ahead else 0.0)

    def _copies(self, plan: IterationPlan, group: int, layer_bytes: int) -> float:
        """Seconds to make the compute copies of a group."""
        if self._moves:
            return len(plan.inputs) * layer_bytes / self._host
        sample = self._workload.layout.groups[group].tensors[-1]
        cast = [
            s
            for s in plan.inputs
            if self._workload.dtype(s, sample) != self._workload.compute_dtype
        ]
        return 3.0 * len(cast) * layer_bytes / self._memory

"""The most memory that an actor needs, term by term.

This follows `runtime.shards.weights.WeightStore` and `runtime.shards.layer_shard.LayerShard`: for
each iteration it looks at the end of the forward passes and at the merge of each layer group,
tensor by tensor, and keeps the instant with the largest sum. What is memory-mapped is counted
apart: the page cache holds it, and gives it back when memory is short.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from arm_ray.config import RuntimeConfig
from arm_ray.model.partition import chunks_of
from arm_ray.planning.devices import GB
from arm_ray.planning.workload import (
    FLOAT32,
    FLOAT64,
    LOGITS,
    WRITERS,
    StateUse,
    Workload,
    linear_piece,
    state_uses,
)
from arm_ray.planning.workspace import largest_piece, merge_workspace
from arm_ray.schedule import BASE, IterationPlan
from arm_ray.steps import most_trials

Terms = dict[str, int]

# A process with torch and transformers; measured on Linux with a CPU build.
PROCESS_CPU = round(0.45 * GB)
# Assumed: the same with the CUDA libraries; and the context, cuBLAS and NCCL on the GPU.
PROCESS_CUDA = round(2.0 * GB)
CONTEXT_CUDA = round(1.0 * GB)
# What allocators hold without using it. On a CPU glibc's heap and oneDNN's cache after forward
# passes, as measured on a model of 135 M parameters (weights that stay are not in that heap, see
# `runtime.shards.weights.host_memory`); on a GPU assumed, a share of the tensors.
FRAGMENTS_CPU = round(0.05 * GB)
FRAGMENTS_CUDA = 0.05

PROCESS, ALLOCATOR = "process", "allocator fragments"
CHECKPOINTS, MERGED = "base and candidates", "merged states (float32)"
COMPUTE, ACTIVATIONS = "compute copies", "activations of a micro-batch"
HIDDEN, MEANS = "hidden states", "mean inputs"
NEW_STATE, WORKSPACE = "new state of a group", "merge workspace"
TRANSFER = "transfer buffers"
HEAD = "head and logits"
ROTATIONS = "rotations"


@dataclass(frozen=True)
class Peak:
    """The largest sum in one kind of memory; bytes.

    Attributes:
        total: The sum.
        terms: What it consists of.
        when: At which instant.
    """

    total: int = 0
    terms: Terms = field(default_factory=dict)
    when: str = ""


@dataclass(frozen=True)
class ActorMemory:
    """What one actor needs at most.

    Attributes:
        host: Process memory on the host, without memory-mapped files.
        gpu: Memory of its GPU; None on a CPU.
        page_cache: Memory-mapped weights that are in use; faster if they stay in memory.
        resident: The most of both at one instant, which is what the system shows of the process.
    """

    host: Peak
    gpu: Peak | None
    page_cache: int
    resident: int = 0

    @property
    def limiting(self) -> Peak:
        """The GPU's where there is one, else the host's."""
        return self.gpu or self.host


def actor_memory(
    workload: Workload, groups: Sequence[int], runtime: RuntimeConfig, *, on_gpu: bool
) -> ActorMemory:
    """The most memory of one actor over the whole schedule.

    Args:
        workload: The merge.
        groups: The actor's layer groups.
        runtime: For the residency and the transport.
        on_gpu: Whether it computes on a GPU.
    """
    walk = _Walk(workload, groups, runtime, on_gpu)
    if not workload.needs_forward:
        for group in groups:
            walk.linear(group)
        return walk.result()
    seen = set()
    for use in state_uses(workload):
        signature = _signature(workload, use)
        if signature not in seen:
            seen.add(signature)
            walk.iteration(use)
    return walk.result()


def _signature(workload: Workload, use: StateUse) -> tuple[object, ...]:
    """Iterations with the same signature need the same memory."""

    def kinds(states: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(s if s in workload.dtypes else "merged" for s in states))

    plan = use.plan
    return (
        kinds(plan.inputs),
        kinds({plan.previous, BASE} - set(plan.inputs)),
        kinds(use.held),
        kinds(use.read),
        kinds(use.kept),
        kinds(use.aside & use.read),
        kinds(use.aside_after & use.kept),
    )


class _Walk:
    """Goes through the instants of a schedule on one actor and remembers the largest."""

    def __init__(
        self, workload: Workload, groups: Sequence[int], runtime: RuntimeConfig, on_gpu: bool
    ) -> None:
        self._workload, self._groups, self._on_gpu = workload, groups, on_gpu
        self._residency = runtime.residency
        # On a GPU one piece is merged after the other.
        self._threads = 1 if on_gpu else runtime.threads
        self._object_store = runtime.transport == "object_store"
        self._host, self._gpu = Peak(), Peak()
        self._mapped = self._resident = 0
        self._is_first = groups[0] == 0
        self._is_last = groups[-1] == len(workload.layout.groups) - 1
        self._chunks = chunks_of(groups, runtime.residency)
        self._transfer = self._transfer_bytes()

    def result(self) -> ActorMemory:
        gpu = self._gpu if self._on_gpu else None
        return ActorMemory(self._host, gpu, self._mapped, self._resident)

    def iteration(self, use: StateUse) -> None:
        """All instants of one iteration."""
        for chunk in self._chunks:
            means = {group: self._means(use.plan, group) for group in chunk}
            copies = {group: self._compute(use.plan, group) for group in chunk}
            self._note(
                f"{use.plan.regime}, forward",
                self._stored(use, chunk[0], use.held | set(use.plan.inputs)),
                {
                    COMPUTE: sum(copies.values()),
                    MEANS: sum(means.values()),
                    ACTIVATIONS: self._activations(),
                    HIDDEN: self._hidden(use.plan),
                },
            )
            if self._workload.takes_losses:
                self._note(
                    f"{use.plan.regime}, losses",
                    self._stored(use, chunk[0], use.held | use.read),
                    self._loss_terms(use, chunk, sum(means.values()), sum(copies.values())),
                )
            for group in chunk:
                left = range(group, chunk[-1] + 1)
                kept, workspace = merge_workspace(
                    self._workload,
                    use.plan,
                    group,
                    self._residency,
                    self._on_gpu,
                    self._threads,
                )
                self._note(
                    f"{use.plan.regime}, merge",
                    self._stored(use, group, use.held | use.read),
                    {
                        COMPUTE: sum(copies[g] for g in left),
                        MEANS: sum(means[g] for g in left),
                        HIDDEN: self._hidden(use.plan),
                        NEW_STATE: kept,
                        WORKSPACE: workspace,
                    },
                )

    def _loss_terms(self, use: StateUse, chunk: range, means: int, copies: int) -> Terms:
        """While states that are tried, or states that are compared, run through a chunk."""
        workload = self._workload
        rounds, check = most_trials(workload.schedule, len(use.plan.contributors))
        most = max(*rounds, check, 1) if workload.step_samples else 1
        item = workload.compute_dtype.itemsize
        layers = sum(map(workload.layer_elements, chunk))
        embedding = workload.elements(workload.layout.embedding) * (FLOAT32 + item)
        samples = max(workload.step_samples, workload.check_samples, *workload.compared_samples)
        hidden = most * workload.micro_batches_of(samples) * workload.hidden_bytes
        # One state's embedding at a time, which also is the head, and its logits.
        head = embedding if self._is_first else 0
        if self._is_last:
            head = embedding + 2 * FLOAT32 * LOGITS
        return {
            COMPUTE: copies + most * layers * item,
            MEANS: means,
            HIDDEN: hidden,
            ACTIVATIONS: self._activations(),
            HEAD: head,
            ROTATIONS: self._rotations(use.plan),
        }

    def _rotations(self, plan: IterationPlan) -> int:
        """Reflectors of all tensors, float64, which are kept where a tensor is merged again."""
        workload = self._workload
        if not (workload.step_samples and workload.samples):
            return 0
        matrices = [
            workload.layout.matrices_in(name)
            for group in self._groups
            for name in workload.layout.groups[group].tensors
            if name in workload.layout.rotated
        ]
        rows = sum(count * d_out for count, d_out, _ in matrices)
        return FLOAT64 * workload.samples * rows * len(plan.contributors)

    def linear(self, group: int) -> None:
        """One group of a merge without forward passes: all iterations, piece by piece."""
        workload = self._workload
        names = workload.layout.groups[group].tensors
        piece = min(linear_piece(on_gpu=self._on_gpu), max(map(workload.elements, names)))
        states = len(workload.dtypes) + workload.schedule.max_iterations
        stored = self._place_stored(set(workload.dtypes), group)
        # Every state's piece in float32, and the sum, difference and cast of one iteration.
        self._note("linear pass", stored, {WORKSPACE: FLOAT32 * piece * (states + 3)})

    def _note(self, when: str, stored: dict[tuple[str, str], int], work: Terms) -> None:
        """Add an instant: stored weights by place and term, and terms where it computes."""
        host: Terms = {PROCESS: PROCESS_CUDA if self._on_gpu else PROCESS_CPU}
        gpu: Terms = {PROCESS: CONTEXT_CUDA}
        places = {"host": host, "gpu": gpu, "mapped": dict[str, int]()}
        for (place, term), size in stored.items():
            places[place][term] = places[place].get(term, 0) + size
        (gpu if self._on_gpu else host).update(work)
        if self._on_gpu:
            gpu[ALLOCATOR] = round(FRAGMENTS_CUDA * (sum(gpu.values()) - CONTEXT_CUDA))
            host[TRANSFER] = self._transfer
        elif self._workload.needs_forward:
            host[ALLOCATOR] = FRAGMENTS_CPU
        mapped = sum(places["mapped"].values())
        self._mapped = max(self._mapped, mapped)
        self._resident = max(self._resident, sum(host.values()) + mapped)
        self._host = _larger(self._host, host, when)
        self._gpu = _larger(self._gpu, gpu, when)

    def _stored(self, use: StateUse, group: int, now: Iterable[str]) -> dict[tuple[str, str], int]:
        """Stored weights while `group` is worked on: by (place, term)."""
        found: dict[tuple[str, str], int] = {}

        def add(states: Iterable[str], index: int, aside: frozenset[str] = use.aside) -> None:
            for key, size in self._place_stored(states, index, aside).items():
                found[key] = found.get(key, 0) + size

        if self._residency == "disk":
            add(use.read, group)
            following = next((index for index in self._groups if index > group), None)
            if following is not None:
                add(use.read, following)  # read ahead
            return found
        now = set(now)
        for index in self._groups:
            if index < group:
                add(use.kept, index, use.aside_after)
            elif self._residency == "device" or index == group:
                add(now, index)
            else:
                add(use.held, index)
        return found

    def _place_stored(
        self, states: Iterable[str], group: int, aside: frozenset[str] = frozenset()
    ) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        # Terms in the same order always.
        for state in sorted(states):
            is_given = state in self._workload.dtypes
            term = CHECKPOINTS if is_given else MERGED
            whole = _group_bytes(self._workload, state, group, False)
            is_formed = state in self._workload.formed
            if self._residency == "disk":
                layers = _group_bytes(self._workload, state, group, not is_formed)
                sizes = {"host": layers, "mapped": whole - layers}
            elif self._residency == "device" and self._on_gpu:
                sizes = {"host" if state in aside else "gpu": whole}
            elif self._residency == "device" and is_given and not is_formed:
                sizes = {"mapped": whole}
            else:
                sizes = {"host": whole}
            for place, size in sizes.items():
                found[place, term] = found.get((place, term), 0) + size
        return found

    def _compute(self, plan: IterationPlan, group: int) -> int:
        """Copies of the layers in the compute dtype, where they are not the stored ones."""
        moves = self._on_gpu and self._residency != "device"
        return sum(_compute_copy(self._workload, state, group, moves) for state in plan.inputs)

    def _means(self, plan: IterationPlan, group: int) -> int:
        widths = _widths(self._workload, group)
        return FLOAT32 * self._workload.samples * widths * len(plan.inputs)

    def _hidden(self, plan: IterationPlan) -> int:
        """Hidden states of one iteration that arrived, that wait inside, and that were sent.

        An upper bound: it takes each of these to hold all micro-batches of all states at once.
        The object store holds what arrived and what was sent, but not what waits inside.
        """
        workload = self._workload
        everything = workload.micro_batches * len(plan.inputs) * workload.hidden_bytes
        before = [chunk.start - 1 in self._groups for chunk in self._chunks if chunk.start]
        last = len(workload.layout.groups)
        after = [chunk.stop in self._groups for chunk in self._chunks if chunk.stop < last]
        waits = any(before)
        sides = (not all(before)) + (not all(after))
        if self._object_store:
            sides = 0
        return everything * (waits + sides)

    def _activations(self) -> int:
        """Of one decoder layer on one micro-batch, at its largest instant."""
        workload = self._workload
        item, tokens = workload.compute_dtype.itemsize, workload.rows * workload.tokens
        layout = workload.layout
        hidden, inner = int(layout.text_config.hidden_size), layout.inner_width
        attended = layout.attention_width
        # The residual and the normalised input stay; a norm computes in float32.
        norm = 3 * FLOAT32 * hidden
        # q, k and v, the rotated q and k, k and v for all heads, and the output.
        attention = 7 * item * attended
        # Gate, up and their product; then the product and its float32 copy for the mean.
        cast = 0 if item == FLOAT32 else FLOAT32
        mlp = inner * max(3 * item, item + cast)
        return tokens * (2 * item * hidden + max(norm, attention, mlp))

    def _transfer_bytes(self) -> int:
        """Host buffers for tensors on their way to the disk, and one from host memory."""
        largest = max(largest_piece(self._workload, group) for group in self._groups)
        return FLOAT32 * largest * (WRITERS + (0 if self._residency == "device" else 1))


def _larger(peak: Peak, terms: Terms, when: str) -> Peak:
    total = sum(terms.values())
    if total <= peak.total:
        return peak
    return Peak(total, {term: size for term, size in terms.items() if size}, when)


@functools.lru_cache(maxsize=100_000)
def _group_bytes(workload: Workload, state: str, group: int, layers_only: bool) -> int:
    return workload.group_bytes(state, group, layers_only=layers_only)


@functools.cache
def _compute_copy(workload: Workload, state: str, group: int, moves: bool) -> int:
    """Bytes of the copies of one state's layers in the compute dtype.

    Experts that lie one by one in the files are always put together in another place.
    """
    layout, dtype = workload.layout, workload.compute_dtype
    return sum(
        workload.elements(name) * dtype.itemsize
        for name in layout.groups[group].tensors
        if layout.is_layer_tensor(name)
        and (moves or workload.dtype(state, name) != dtype or name in layout.experts)
    )


@functools.cache
def _widths(workload: Workload, group: int) -> int:
    """The widths of the inputs of a group's rotated weights, together."""
    layout = workload.layout
    rotated = (layout.matrices_in(n) for n in layout.groups[group].tensors if n in layout.rotated)
    return sum(count * width for count, _, width in rotated)

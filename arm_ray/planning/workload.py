"""How many bytes and floating-point operations a merge has, from shapes alone.

Samples are taken to be equally long, so that nothing is padding. Operations count a
multiplication and an addition as two.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch

from arm_ray.config import ScheduleConfig
from arm_ray.merging.similarity import COMPARE_BLOCK
from arm_ray.model.layout import LayerGroup, ModelLayout
from arm_ray.schedule import (
    BASE,
    IterationPlan,
    plan_iteration,
    state_name,
    states_read_after,
    states_run_after,
)

FLOAT32 = 4
FLOAT64 = 8
# The runtime takes these sizes from here. Most samples in a micro-batch:
MAX_MICRO_BATCH_SAMPLES = 64
# Elements of a tensor that are merged at once where it needs no activations.
PIECE = 1 << 24
# The same where no rotation needs whole tensors. On a CPU a piece of every state in use should stay
# in cache; on a GPU, where each operation costs a launch, it should be large.
_LINEAR_PIECE = 1 << 19
_LINEAR_PIECE_GPU = 1 << 24
# Pieces on their way from a GPU to the disk: writers, and pieces that wait in host memory at most.
WRITERS = 4
# Logits that are computed at once, for a loss.
LOGITS = 1 << 26
# Small operations that the comparison of one block of states takes.
COMPARE_OPERATIONS = 10


def linear_piece(*, on_gpu: bool) -> int:
    """Elements of a tensor that are merged at once where no rotation needs the whole."""
    return _LINEAR_PIECE_GPU if on_gpu else _LINEAR_PIECE


@dataclass(frozen=True, eq=False)
class Workload:
    """A merge as numbers.

    Attributes:
        layout: The model.
        dtypes: `base`, `candidate-1`, … -> name -> dtype of the stored tensor.
        storage_dtypes: Name -> dtype in the final model.
        compute_dtype: Of the forward pass.
        schedule: Which states meet.
        samples: N; 0 where the operator needs no activations.
        tokens: Tokens of a sample.
        micro_batch_tokens: `runtime.micro_batch_tokens`.
        step_samples: Samples that choose a step; 0: it is not chosen.
        check_samples: Samples that check it.
        compared_samples: Samples that states and checkpoints are compared on, and those of the
            final losses.
        formed: Of the base and the candidates, those whose tensors are put together in memory when
            they are read, and not mapped.
        keeps_best: Whether the best merged state so far stays, also where no iteration reads it.
    """

    layout: ModelLayout
    dtypes: Mapping[str, Mapping[str, torch.dtype]]
    storage_dtypes: Mapping[str, torch.dtype]
    compute_dtype: torch.dtype
    schedule: ScheduleConfig
    samples: int
    tokens: int
    micro_batch_tokens: int
    step_samples: int = 0
    check_samples: int = 0
    compared_samples: tuple[int, int] = (0, 0)
    formed: frozenset[str] = frozenset()
    keeps_best: bool = False

    @property
    def num_candidates(self) -> int:
        """How many candidates there are."""
        return len(self.dtypes) - 1

    @property
    def needs_forward(self) -> bool:
        """Whether there are forward passes at all."""
        return self.samples > 0 or self.takes_losses

    @property
    def takes_losses(self) -> bool:
        """Whether losses of states are taken."""
        return self.step_samples > 0 or self.compared_samples[0] > 0

    @property
    def rows(self) -> int:
        """Samples in a micro-batch."""
        fitting = min(MAX_MICRO_BATCH_SAMPLES, self.micro_batch_tokens // self.tokens)
        most = max(self.samples, self.step_samples, self.check_samples, *self.compared_samples)
        return min(most, max(1, fitting))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an iteration."""
        return self.micro_batches_of(self.samples)

    def micro_batches_of(self, samples: int) -> int:
        """Micro-batches of so many samples."""
        return ceil(samples / self.rows) if samples else 0

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of one micro-batch of one state."""
        hidden = int(self.layout.text_config.hidden_size)
        return self.rows * self.tokens * hidden * self.compute_dtype.itemsize

    def dtype(self, state: str, name: str) -> torch.dtype:
        """Of a stored tensor; merged states are float32."""
        return self.dtypes[state][name] if state in self.dtypes else torch.float32

    def elements(self, name: str) -> int:
        """Number of elements of a tensor."""
        return prod(self.layout.shapes[name])

    @functools.cached_property
    def parameters(self) -> int:
        """Of the model; a tied `lm_head` counts once."""
        return sum(map(self.elements, self.layout.shapes))

    def group_bytes(self, state: str, group: int, *, layers_only: bool = False) -> int:
        """Stored bytes of a layer group of a state, or of its decoder-layer tensors alone."""
        return _group_bytes(self, state, group, layers_only)

    def layer_elements(self, group: int) -> int:
        """Numbers in the decoder-layer tensors of a layer group."""
        return _layer_elements(self, group)

    def plan(self, iteration: int) -> IterationPlan:
        """What an iteration merges."""
        return plan_iteration(self.schedule, self.num_candidates, iteration)


@dataclass(frozen=True)
class StateUse:
    """Which states an iteration touches.

    Attributes:
        plan: The iteration.
        held: States that earlier iterations have left in memory, where residency keeps any.
        read: All states that it reads: its inputs, and those that the result is compared with.
        kept: States left in memory after it: its own, and those that are read again.
        aside: Given states that neither this nor a later iteration runs, though they are read.
        aside_after: The same of later iterations alone.
    """

    plan: IterationPlan
    held: frozenset[str]
    read: frozenset[str]
    kept: frozenset[str]
    aside: frozenset[str] = frozenset()
    aside_after: frozenset[str] = frozenset()

    @property
    def loaded(self) -> frozenset[str]:
        """States that are read from disk for the first time."""
        return self.read - self.held


def state_uses(workload: Workload) -> list[StateUse]:
    """The use of states, iteration by iteration (`WeightStore` with residency device or host)."""
    uses: list[StateUse] = []
    held: frozenset[str] = frozenset()
    aside: frozenset[str] = frozenset()
    for iteration in range(1, workload.schedule.max_iterations + 1):
        plan = workload.plan(iteration)
        read = frozenset({*plan.inputs, plan.previous, BASE})
        again = states_read_after(workload.schedule, workload.num_candidates, iteration)
        kept = (held | read) & again | {plan.output}
        if workload.keeps_best:
            # Any of them may be the best, as long as it is one more than the others.
            kept |= {state_name(1)}
        runs = states_run_after(workload.schedule, workload.num_candidates, iteration)
        aside_after = frozenset(name for name in workload.dtypes if name not in runs)
        uses.append(StateUse(plan, held, read, frozenset(kept), aside, aside_after))
        held, aside = frozenset(kept), aside_after
    return uses


@dataclass(frozen=True)
class GroupWork:
    """One layer group in one iteration; operations, bytes and counts.

    Attributes:
        linear_flops: Products of the forward pass in the linear modules, all states.
        attention_flops: Products of causal attention, all states.
        capture_flops: Mean inputs, and mean outputs from these.
        capture_bytes: Memory traffic of the mean inputs: activations read and cast to float32.
        factor_flops: QR and SVD in float64.
        apply_flops: The rotation's products with the task vectors, float32.
        merge_flops: Element by element: task vectors, their sum, and the comparison of states.
        merge_bytes: Memory traffic of the same and of the rotation.
        factorisations: How many there are.
        compare_blocks: Blocks of the comparison of states.
    """

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    capture_flops: float = 0.0
    capture_bytes: float = 0.0
    factor_flops: float = 0.0
    apply_flops: float = 0.0
    merge_flops: float = 0.0
    merge_bytes: float = 0.0
    factorisations: int = 0
    compare_blocks: int = 0

    def __add__(self, other: GroupWork) -> GroupWork:
        return GroupWork(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )

    @property
    def forward_flops(self) -> float:
        """Of the forward pass without the capture."""
        return self.linear_flops + self.attention_flops

    @property
    def rotation_flops(self) -> float:
        """Of the rotation."""
        return self.factor_flops + self.apply_flops


# A mixture of experts has tens of thousands of tensors, which a plan asks about again and again.
@functools.cache
def _group_bytes(workload: Workload, state: str, group: int, layers_only: bool) -> int:
    layout = workload.layout
    return sum(
        workload.elements(name) * workload.dtype(state, name).itemsize
        for name in layout.groups[group].tensors
        if not layers_only or layout.is_layer_tensor(name)
    )


@functools.cache
def _layer_elements(workload: Workload, group: int) -> int:
    layout = workload.layout
    names = layout.groups[group].tensors
    return sum(workload.elements(name) for name in names if layout.is_layer_tensor(name))


@functools.cache
def group_work(workload: Workload, group: int, num_states: int) -> GroupWork:
    """The work of one layer group in an iteration with so many input states."""
    work = GroupWork()
    layer_group = workload.layout.groups[group]
    if workload.samples:
        work += forward_work(workload, layer_group, workload.samples * num_states)
    for name in layer_group.tensors:
        rotated = workload.samples > 0 and name in workload.layout.rotated
        work += _merge_work(workload, name, num_states, rotated)
    return work


def forward_work(workload: Workload, group: LayerGroup, passes: int) -> GroupWork:
    """The forward pass of one layer group over so many samples, each state's counted."""
    layers = group.end_layer - group.first_layer
    tokens = passes * workload.tokens
    weights = [name for name in group.tensors if name in workload.layout.rotated]
    layout = workload.layout
    parameters = sum(map(workload.elements, weights))
    # A token is multiplied by the weights of the experts that it is sent to.
    experts = sum(workload.elements(name) for name in weights if name in layout.experts)
    used = parameters - experts * (1.0 - layout.expert_share)
    # q, k and v share an input, and so do gate and up: of seven inputs four are different.
    shared = ("k_proj", "v_proj", "up_proj")
    widths = sum(
        layout.matrices_in(name)[2] * (layout.expert_share if name in layout.experts else 1.0)
        for name in weights
        if name.split(".")[-2] not in shared
    )
    itemsize = workload.compute_dtype.itemsize
    cast = 0 if itemsize == FLOAT32 else 2 * FLOAT32
    return GroupWork(
        linear_flops=2.0 * used * tokens,
        # Q Kᵀ and the product with V, 4·L²·(heads·head_dim) a sample; half of it is masked away.
        attention_flops=2.0 * layers * tokens * workload.tokens * layout.attention_width,
        capture_flops=2.0 * widths * tokens + 2.0 * parameters * passes,
        capture_bytes=float(widths) * tokens * (itemsize + cast),
    )


def _merge_work(workload: Workload, name: str, num_states: int, rotated: bool) -> GroupWork:
    elements = workload.elements(name)
    others = num_states - 1
    # Sum of differences, then scaled and added; five squares and three differences to compare.
    flops = elements * (2.0 * others + 2.0 + 13.0)
    # Each state read and cast; a difference and a sum for each contributor; the comparison.
    traffic = elements * FLOAT32 * (2.0 * num_states + 6.0 * others + 3.0 + 11.0)
    if not rotated:
        return GroupWork(merge_flops=flops, merge_bytes=traffic, compare_blocks=_blocks(elements))
    count, d_out, d_in = workload.layout.matrices_in(name)
    others *= count
    n = workload.samples
    if n < d_out:
        # QR, VᵀV and V T (2·d_out·N² each), and the SVD of an N x N matrix with its factors.
        factor = 6.0 * d_out * n**2 + 20.0 * n**3
        apply = 4.0 * n * d_out * d_in + 4.0 * n**2 * d_in
    else:
        factor = 6.0 * n * d_out**2 + 20.0 * d_out**3
        apply = 2.0 * d_out**2 * d_in
    return GroupWork(
        factor_flops=others * factor,
        apply_flops=others * apply,
        merge_flops=flops,
        # Signs, the two products with V and the subtraction pass over the task vector again.
        merge_bytes=traffic + others // count * elements * FLOAT32 * 7.0,
        factorisations=others,
        compare_blocks=_blocks(elements),
    )


def _blocks(elements: int) -> int:
    return ceil(elements / COMPARE_BLOCK)

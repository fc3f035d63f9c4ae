"""What the forward passes of an iteration leave in a shard, and what the method makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.errors import NumericalError, ShardLostError
from arm_ray.merging.method import Method
from arm_ray.merging.watch import check_activations, names_of
from arm_ray.model.activations import GroupOutput, MaskedMeans, Wanted, output_shifts
from arm_ray.model.architecture import expert_name
from arm_ray.model.group import Decoder
from arm_ray.model.layout import ModelLayout
from arm_ray.runtime.shards.weights import WeightStore
from arm_ray.schedule import BASE, IterationPlan

_K = TypeVar("_K")


def forward_states(method: Method, plan: IterationPlan) -> tuple[str, ...]:
    """The states that are run in an iteration, the reference first where it is one of them."""
    states: list[str] = []
    if method.needs_outputs or method.layer_coefficients is not None:
        states += plan.inputs
    if method.relaxation is not None:
        states.append(method.relaxation.of(plan.reference, BASE))
    return tuple(dict.fromkeys(states))


def wanted_of(method: Method, plan: IterationPlan, state: str) -> Wanted:
    """What the forward pass of a state is to leave."""
    relaxation = method.relaxation
    return Wanted(
        means=method.needs_outputs and state in plan.inputs,
        magnitudes=relaxation is not None and state == relaxation.of(plan.reference, BASE),
        outputs=method.layer_coefficients is not None and state in plan.inputs,
    )


@dataclass(frozen=True)
class MicroPass:
    """One micro-batch of one input state, on its way through the layers.

    Attributes:
        plan: The iteration.
        state: Name of the input state.
        index: Which micro-batch it is.
        num_samples: Different samples in the iteration's mini-batch.
        positions: `[batch]` int64: which of them these are.
        lengths: `[batch]` int64: their tokens.
    """

    plan: IterationPlan
    state: str
    index: int
    num_samples: int
    positions: Tensor
    lengths: Tensor


@dataclass
class _Iteration:
    """Of one iteration: values by sample, in rows of `[different samples, …]`."""

    lengths: Tensor
    # (state, layer group) -> samples that have come by.
    arrived: Counter[tuple[str, int]] = field(default_factory=Counter)
    means: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    # (state, expert's weight) -> which samples send it a token.
    seen: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    # (state, layer group) -> squared norm of its hidden states, on the device: nothing waits here.
    squares: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    # (contributor, place) -> information; (place, micro-batch) -> the reference's labels.
    information: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    labels: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)


class Captures:
    """Collects activations by iteration, and gives what is needed to merge a tensor.

    Args:
        layout: The model.
        method: Says what is wanted, and what is made of it.
        store: For the weights that activation shifts, the last norm and the head need.
        compute_dtype: Of the forward pass.
    """

    def __init__(
        self, layout: ModelLayout, method: Method, store: WeightStore, compute_dtype: torch.dtype
    ) -> None:
        self._layout, self._method, self._store = layout, method, store
        self._compute_dtype = compute_dtype
        self._iterations: dict[int, _Iteration] = {}
        self._averages = MaskedMeans()

    def collect(self, micro: MicroPass, group: int, output: GroupOutput) -> None:
        """Take over what one layer group gave."""
        found = self._of(micro)
        key = (micro.state, group)
        found.arrived[key] += len(micro.positions)
        square = torch.linalg.vector_norm(output.hidden, dtype=torch.float32).double() ** 2
        found.squares[key] = found.squares[key] + square if key in found.squares else square
        for name, mean in output.means.items():
            _put(found.means, (micro.state, name), micro, mean)
        for name, seen in output.seen.items():
            _put(found.seen, (micro.state, name), micro, seen)
        for name, magnitude in output.magnitudes.items():
            _put(found.magnitudes, name, micro, magnitude)
        for layer, value in output.outputs.items():
            self._inform(micro, f"layer {layer}", value)

    def collect_embedding(self, micro: MicroPass, hidden: Tensor) -> None:
        """The same for the embedding's output `[batch, tokens, hidden]`."""
        if wanted_of(self._method, micro.plan, micro.state).outputs:
            self._of(micro)
            self._inform(micro, self._layout.embedding, hidden)

    def collect_tail(self, micro: MicroPass, hidden: Tensor, decoder: Decoder) -> None:
        """The same for the last norm and the head, given the last layer's output."""
        wanted = wanted_of(self._method, micro.plan, micro.state)
        if not (wanted.magnitudes or wanted.outputs):
            return
        found, layout = self._of(micro), self._layout
        normed = decoder.final_norm(self._at_end(micro.state, layout.tail), hidden)
        if wanted.magnitudes:
            self._averages.start(hidden, micro.lengths)
            # Biases are not relaxed.
            for name in (each for each in layout.tail if each.endswith(".weight")):
                _put(found.magnitudes, name, micro, self._averages.magnitude(hidden))
            # Also of a tied head, which whoever holds the embedding asks for.
            head = self._averages.magnitude(normed)
            _put(found.magnitudes, layout.tied_copy or layout.head[0], micro, head)
            self._averages.end()
        coefficients = self._method.layer_coefficients
        if wanted.outputs and coefficients is not None:
            for name in layout.tail:
                self._inform(micro, name, normed)
            if layout.has_own_head:
                weights = self._at_end(micro.state, layout.head)
                # The vocabulary is wide: only as many tokens as are looked at.
                tokens = max(1, coefficients.max_elements // len(weights[layout.head[0]]))
                logits = decoder.logits(weights, normed[:, :tokens])
                for name in layout.head:
                    self._inform(micro, name, logits)

    def _at_end(self, state: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors behind the layers, as the forward pass takes them."""
        last = len(self._layout.groups) - 1
        return {name: self._store.in_compute_dtype(state, last, name) for name in names}

    def shifts(
        self,
        plan: IterationPlan,
        group: int,
        name: str,
        whole: Sequence[Tensor],
        columns: NDArray[np.int64],
        expert: int | None = None,
    ) -> list[Tensor]:
        """`ΔA_i` `[d_out, N]` float32 of the contributors, for one weight.

        An expert's has no column for a sample that sends it no token in one of the two models:
        there is nothing to compare. Without any column its shift is zero.

        Args:
            plan: The iteration.
            group: Index of the weight's layer group.
            name: The weight.
            whole: It, float32, of the reference and of the contributors.
            columns: `[N]`: which of the different samples each sample of the mini-batch is.
            expert: Which of the experts in the weight `whole` is of; None: the weight is a matrix.
        """
        layers = [self._store.layers(state, group) for state in plan.inputs]
        means = self._iterations[plan.iteration].means
        known = name if expert is None else expert_name(name, expert)
        shifts = output_shifts(
            [
                self._store.as_computed(state, group, name, weight, expert)
                for state, weight in zip(plan.inputs, whole, strict=True)
            ],
            [_bias(weights, name, expert) for weights in layers],
            [means[state, known] for state in plan.inputs],
        )
        for state, shift in zip(plan.contributors, shifts, strict=True):
            if not bool(torch.isfinite(shift).all()):
                raise NumericalError(
                    f"the activations of {name} are NaN or infinite",
                    where=f"{state} or {plan.reference}, iteration {plan.iteration}",
                    got=f"compute_dtype {self._compute_dtype}",
                    hint="set precision.compute_dtype to float32 or bfloat16",
                    subject=state,
                )
        chosen = torch.from_numpy(columns.copy()).to(self._store.device)
        seen = self._iterations[plan.iteration].seen
        if (plan.reference, known) not in seen:
            return [shift[:, chosen] for shift in shifts]
        found = []
        for state, shift in zip(plan.contributors, shifts, strict=True):
            both = (seen[plan.reference, known] & seen[state, known])[chosen]
            kept = shift[:, chosen[both]]
            found.append(kept if kept.shape[1] else shift.new_zeros(shift.shape[0], 1))
        return found

    def relaxation(
        self, plan: IterationPlan, name: str, columns: NDArray[np.int64]
    ) -> Tensor | None:
        """The factors `[d]` float32 of a weight's input channels; None where it is left alone."""
        step, found = self._method.relaxation, self._iterations.get(plan.iteration)
        if step is None or found is None or name not in found.magnitudes:
            return None
        magnitudes = found.magnitudes[name]
        counts = np.bincount(columns, minlength=len(magnitudes))
        weights = torch.from_numpy(counts).to(magnitudes.device)
        return step.factors(magnitudes, weights, found.lengths)

    def scales(
        self,
        plan: IterationPlan,
        name: str,
        columns: NDArray[np.int64],
        largest: Mapping[str, float] | None,
    ) -> list[float]:
        """The coefficient of each contributor for a tensor; empty where no step finds them."""
        step = self._method.layer_coefficients
        if step is None:
            return []
        chosen = torch.from_numpy(columns)
        information = self._iterations[plan.iteration].information
        place = self._place_of(name)
        if (plan.contributors[0], place) not in information:
            return []  # no activation goes through a tensor that the model does not have
        return [
            step.coefficient(
                information[state, place][chosen],
                None if largest is None else largest[state],
            )
            for state in plan.contributors
        ]

    def largest_information(self, plan: IterationPlan) -> dict[str, float]:
        """Largest information of each contributor over this shard's places and all samples."""
        found = self._iterations.get(plan.iteration)
        largest: dict[str, float] = {}
        for (state, _), values in (found.information if found else {}).items():
            largest[state] = max(largest.get(state, 0.0), float(values.max()))
        return largest

    def _place_of(self, name: str) -> str:
        """Where the activations that a tensor's ACM coefficient follows are taken."""
        layer = self._layout.layer_numbers.get(name)
        return name if layer is None else f"layer {layer}"

    def check(self, plan: IterationPlan, group: int) -> None:
        """Refuse to merge a layer group that not all samples of all states have come to.

        A call to merge is queued behind the forward calls, whatever becomes of these.

        Raises:
            NumericalError: The activations of a state are not finite, or have exploded.
            ShardLostError: A shard that sends hidden states here was lost before it sent them all.
        """
        found = self._iterations.get(plan.iteration)
        for state in forward_states(self._method, plan):
            arrived = 0 if found is None else found.arrived[state, group]
            if found is None or arrived < len(found.lengths):
                raise ShardLostError(
                    "not all hidden states arrived",
                    where=f"iteration {plan.iteration}, layer group {group}, {state}",
                    got=f"{arrived} samples",
                    hint="run the same command again to go on after the last complete iteration",
                )
        if found is not None:
            squares = {s: float(found.squares[s, group]) for s, g in found.squares if g == group}
            numbers = self._layout.layer_numbers
            layers = {numbers[n] for n in self._layout.groups[group].tensors if n in numbers}
            place, dtype = names_of(sorted(layers)), str(self._compute_dtype)
            check_activations(squares, place, plan.iteration, dtype)

    def drop(self, plan: IterationPlan, names: tuple[str, ...]) -> None:
        """Let go of a merged group's activations."""
        found = self._iterations.get(plan.iteration)
        if found is None:
            return
        for name in names:
            found.magnitudes.pop(name, None)
            for each in self._layout.captured_as(name):
                for state in plan.inputs:
                    found.means.pop((state, each), None)
                    found.seen.pop((state, each), None)

    def drop_iteration(self, iteration: int) -> None:
        """Let go of all of an iteration."""
        self._iterations.pop(iteration, None)

    def _of(self, micro: MicroPass) -> _Iteration:
        number = micro.plan.iteration
        if number not in self._iterations:
            self._iterations[number] = _Iteration(micro.lengths.new_zeros(micro.num_samples))
        found = self._iterations[number]
        found.lengths[micro.positions] = micro.lengths
        return found

    def _inform(self, micro: MicroPass, place: str, value: Tensor) -> None:
        """Keep the reference's labels; compare a contributor's with them."""
        step, plan = self._method.layer_coefficients, micro.plan
        assert step is not None
        found = self._iterations[plan.iteration]
        labels = [
            step.labels(sample[:length])
            for sample, length in zip(value, micro.lengths.tolist(), strict=True)
        ]
        key = (place, micro.index)
        if micro.state == plan.reference:
            found.labels[key] = labels
            return
        reference = found.labels[key]
        if micro.state == plan.contributors[-1]:
            del found.labels[key]
        information = torch.tensor(
            [step.information(a, b) for a, b in zip(reference, labels, strict=True)],
            dtype=torch.float64,
        )
        _put(found.information, (micro.state, place), micro, information)


def _bias(weights: Mapping[str, Tensor], name: str, expert: int | None) -> Tensor | None:
    """What is added to the outputs of a weight, `[d_out]`; None: nothing."""
    if expert is None:
        return weights.get(name.removesuffix("weight") + "bias")
    found = weights.get(f"{name}_bias")
    return None if found is None else found[expert]


def _put(into: dict[_K, Tensor], key: _K, micro: MicroPass, rows: Tensor) -> None:
    if key not in into:
        into[key] = rows.new_empty(micro.num_samples, *rows.shape[1:])
    into[key][micro.positions.to(rows.device)] = rows

"""What the forward passes of an iteration leave in a shard, and what the method makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.errors import NumericalError
from arm_ray.merging import acm, aim
from arm_ray.merging.settings import MethodSettings
from arm_ray.model.group import GroupOutput, GroupRunner, MaskedMeans, Wanted, output_shifts
from arm_ray.model.layout import EMBEDDING, FINAL_NORM, LM_HEAD, ModelLayout
from arm_ray.runtime.shards.weights import WeightStore
from arm_ray.schedule import BASE, IterationPlan

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def aim_state(settings: MethodSettings, plan: IterationPlan) -> str:
    """The state whose activations tell what AIM holds back."""
    return BASE if settings.aim.activations_of == "base" else plan.reference


def forward_states(settings: MethodSettings, plan: IterationPlan) -> tuple[str, ...]:
    """The states that are run in an iteration, the reference first where it is one of them."""
    states: list[str] = []
    if settings.rotates or "acm" in settings.steps:
        states += plan.inputs
    if "aim" in settings.steps:
        states.append(aim_state(settings, plan))
    # Another package's operator may want activations too.
    return tuple(dict.fromkeys(states)) or plan.inputs


def wanted_of(settings: MethodSettings, plan: IterationPlan, state: str, means: bool) -> Wanted:
    """What the forward pass of a state is to leave."""
    return Wanted(
        means=means and state in plan.inputs,
        magnitudes="aim" in settings.steps and state == aim_state(settings, plan),
        outputs="acm" in settings.steps and state in plan.inputs,
    )


@dataclass
class _Iteration:
    """Of one iteration: values by sample, in rows of `[different samples, …]`."""

    lengths: Tensor
    means: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    # (contributor, place) -> information; (place, micro-batch) -> the reference's labels.
    information: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    labels: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)


class Captures:
    """Collects activations by iteration, and gives what is needed to merge a tensor.

    Args:
        layout: The model.
        settings: The method's.
        needs_means: Whether mean inputs are wanted.
        store: For the weights that activation shifts, the last norm and the head need.
        device: Where the forward pass runs.
        compute_dtype: Of the forward pass.
    """

    def __init__(
        self,
        layout: ModelLayout,
        settings: MethodSettings,
        needs_means: bool,
        store: WeightStore,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self._layout, self._settings, self._needs_means = layout, settings, needs_means
        self._store, self._device, self._compute_dtype = store, device, compute_dtype
        self._iterations: dict[int, _Iteration] = {}
        self._averages = MaskedMeans()

    def wanted(self, plan: IterationPlan, state: str) -> Wanted:
        """What the forward pass of a state is to leave."""
        return wanted_of(self._settings, plan, state, self._needs_means)

    def collect(
        self,
        plan: IterationPlan,
        state: str,
        micro_index: int,
        num_samples: int,
        positions: Tensor,
        lengths: Tensor,
        output: GroupOutput,
    ) -> None:
        """Take over what one micro-batch of a state left in one group.

        Args:
            plan: The iteration.
            state: The state.
            micro_index: Which micro-batch.
            num_samples: Different samples in the mini-batch.
            positions: `[batch]` which of them these are.
            lengths: `[batch]` their tokens.
            output: What the group gave.
        """
        found = self._of(plan, num_samples, positions, lengths)
        for name, mean in output.means.items():
            _put(found.means, (state, name), num_samples, positions, mean)
        for name, magnitude in output.magnitudes.items():
            _put(found.magnitudes, name, num_samples, positions, magnitude)
        for name, value in output.outputs.items():
            place = place_of(name)
            self._inform(plan, state, micro_index, place, num_samples, positions, lengths, value)

    def collect_embedding(
        self,
        plan: IterationPlan,
        state: str,
        micro_index: int,
        num_samples: int,
        positions: Tensor,
        lengths: Tensor,
        hidden: Tensor,
    ) -> None:
        """The same for the embedding's output `[batch, tokens, hidden]`."""
        if self.wanted(plan, state).outputs:
            self._of(plan, num_samples, positions, lengths)
            self._inform(
                plan, state, micro_index, EMBEDDING, num_samples, positions, lengths, hidden
            )

    def collect_tail(
        self,
        plan: IterationPlan,
        state: str,
        micro_index: int,
        num_samples: int,
        positions: Tensor,
        lengths: Tensor,
        hidden: Tensor,
        runner: GroupRunner,
    ) -> None:
        """The same for the last norm and the head, given the last layer's output."""
        wanted = self.wanted(plan, state)
        if not (wanted.magnitudes or wanted.outputs):
            return
        found = self._of(plan, num_samples, positions, lengths)
        group = len(self._layout.groups) - 1
        weight = self._store.rows(state, group, FINAL_NORM, slice(None)).to(self._compute_dtype)
        normed = runner.final_norm(weight, hidden)
        if wanted.magnitudes:
            self._averages.start(hidden, lengths)
            for name, value in ((FINAL_NORM, hidden), (LM_HEAD, normed)):
                magnitude = self._averages.magnitude(value)
                _put(found.magnitudes, name, num_samples, positions, magnitude)
            self._averages.end()
        if wanted.outputs:
            self._inform(
                plan, state, micro_index, FINAL_NORM, num_samples, positions, lengths, normed
            )
            if LM_HEAD in self._layout.shapes:
                head = self._store.rows(state, group, LM_HEAD, slice(None)).to(self._compute_dtype)
                # The vocabulary is wide: only as many tokens as are looked at.
                tokens = max(1, self._settings.acm.max_elements // head.shape[0])
                logits = normed[:, :tokens] @ head.T
                self._inform(
                    plan, state, micro_index, LM_HEAD, num_samples, positions, lengths, logits
                )

    def shifts(
        self, plan: IterationPlan, group: int, name: str, whole: Sequence[Tensor]
    ) -> list[Tensor]:
        """`ΔA_i` `[d_out, different samples]` float32 of the contributors, for one weight.

        Args:
            plan: The iteration.
            group: Index of the weight's layer group.
            name: The weight.
            whole: It, float32, of the reference and of the contributors.
        """
        layers = [self._store.layers(state, group) for state in plan.inputs]
        bias = name.removesuffix("weight") + "bias"
        means = self._iterations[plan.iteration].means
        shifts = output_shifts(
            [
                self._store.as_computed(state, group, name, weight)
                for state, weight in zip(plan.inputs, whole, strict=True)
            ],
            [weights.get(bias) for weights in layers],
            [means[state, name] for state in plan.inputs],
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
        return shifts

    def relaxation(
        self, plan: IterationPlan, name: str, columns: NDArray[np.int64]
    ) -> Tensor | None:
        """AIM's factors `[d]` float32 for a weight; None where it is left alone."""
        found = self._iterations.get(plan.iteration)
        if found is None or name not in found.magnitudes:
            return None
        magnitudes = found.magnitudes[name]
        counts = np.bincount(columns, minlength=len(magnitudes))
        weights = torch.from_numpy(counts).to(magnitudes.device)
        return aim.relaxation(magnitudes, weights, found.lengths, self._settings.aim)

    def scales(
        self,
        plan: IterationPlan,
        name: str,
        columns: NDArray[np.int64],
        largest: dict[str, float] | None,
    ) -> list[float]:
        """ACM's coefficient of each contributor for a tensor; empty without ACM."""
        if "acm" not in self._settings.steps:
            return []
        chosen = torch.from_numpy(columns)
        information = self._iterations[plan.iteration].information
        return [
            acm.coefficient(
                information[state, place_of(name)][chosen],
                None if largest is None else largest[state],
                self._settings.acm,
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

    def drop(self, plan: IterationPlan, names: tuple[str, ...]) -> None:
        """Let go of a merged group's activations."""
        found = self._iterations.get(plan.iteration)
        if found is None:
            return
        for name in names:
            found.magnitudes.pop(name, None)
            for state in plan.inputs:
                found.means.pop((state, name), None)

    def drop_iteration(self, iteration: int) -> None:
        """Let go of all of an iteration."""
        self._iterations.pop(iteration, None)

    def _of(
        self, plan: IterationPlan, num_samples: int, positions: Tensor, lengths: Tensor
    ) -> _Iteration:
        if plan.iteration not in self._iterations:
            self._iterations[plan.iteration] = _Iteration(lengths.new_zeros(num_samples))
        found = self._iterations[plan.iteration]
        found.lengths[positions] = lengths
        return found

    def _inform(
        self,
        plan: IterationPlan,
        state: str,
        micro_index: int,
        place: str,
        num_samples: int,
        positions: Tensor,
        lengths: Tensor,
        value: Tensor,
    ) -> None:
        """Keep the reference's labels; compare a contributor's with them."""
        found = self._iterations[plan.iteration]
        limit = self._settings.acm.max_elements
        labels = [
            acm.label_codes(sample[:length])[:limit]
            for sample, length in zip(value, lengths.tolist(), strict=True)
        ]
        key = (place, micro_index)
        if state == plan.reference:
            found.labels[key] = labels
            return
        reference = found.labels[key]
        if state == plan.contributors[-1]:
            del found.labels[key]
        information = torch.tensor(
            [acm.mutual_information(a, b) for a, b in zip(reference, labels, strict=True)],
            dtype=torch.float64,
        )
        _put(found.information, (state, place), num_samples, positions.cpu(), information)


def place_of(name: str) -> str:
    """Where the activations that a tensor's ACM coefficient follows are taken: layer, or ends."""
    layer = _LAYER.match(name)
    return f"layer {layer[1]}" if layer else name


def _put(
    into: dict[object, Tensor] | dict[str, Tensor] | dict[tuple[str, str], Tensor],
    key: object,
    num_samples: int,
    positions: Tensor,
    rows: Tensor,
) -> None:
    held: dict[object, Tensor] = into  # type: ignore[assignment]
    if key not in held:
        held[key] = rows.new_empty(num_samples, *rows.shape[1:])
    held[key][positions] = rows

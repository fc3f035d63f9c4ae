"""A whole merge method: rotation, low-rank edit, thinning, an operator, relaxation.

All methods share one sequence of steps. Only the operator's is required:

    ΔW_i  = W_i − W_ref
    ΔW_i ← U_i ΔW_i                  rotation by the activation shift (ARM)
    ΔW_i ← edit(ΔW_i)                low-rank edit
    ΔW_i ← drop(ΔW_i)                DARE, DELLA, Breadcrumbs
    ΔW_i ← λ_i ΔW_i                  ACM
    W_new = W_ref + r ⊙ update(ΔW_1, …, ΔW_k)         the operator; AIM's relaxation r
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arm_ray.errors import ConfigError
from arm_ray.merging import thinning
from arm_ray.merging.acm import LayerCoefficients
from arm_ray.merging.aim import Relaxation
from arm_ray.merging.edits import edit
from arm_ray.merging.operator import (
    AnyRotation,
    MergedTensor,
    Operator,
    Sums,
    TaskVectors,
    TensorInputs,
)
from arm_ray.merging.parts import resolved
from arm_ray.merging.registry import find_operator
from arm_ray.merging.rotation import activation_rotation, minimal_rotation
from arm_ray.merging.settings import MethodSettings


@dataclass(frozen=True)
class Method:
    """An operator and the steps around it.

    Attributes:
        settings: The settings.
        operator: What turns task vectors into an update.
        tries_steps: Whether the length of a step is searched, by the losses of states that are
            tried.
        takes_losses: Whether the losses of its states are wanted.
    """

    settings: MethodSettings
    operator: Operator
    tries_steps: bool = False
    takes_losses: bool = False

    @property
    def needs_outputs(self) -> bool:
        """Whether the mean outputs of the linear modules are wanted, of all inputs."""
        return self.settings.rotates or self.operator.activations

    @property
    def needs_forward(self) -> bool:
        """Whether calibration samples are run through the models."""
        return self.needs_activations or self.tries_steps or self.takes_losses

    @property
    def needs_activations(self) -> bool:
        """Whether something is made of the activations of an iteration's inputs."""
        return self.settings.needs_calibration or self.operator.activations

    @property
    def relaxation(self) -> Relaxation | None:
        """What relaxes the update by the inputs' magnitudes; None: nothing does."""
        return Relaxation(self.settings.aim) if "aim" in self.settings.steps else None

    @property
    def layer_coefficients(self) -> LayerCoefficients | None:
        """What finds a coefficient for each layer by its outputs; None: nothing does."""
        return LayerCoefficients(self.settings.acm) if "acm" in self.settings.steps else None

    def needs_all_layers(self, *, has_own_head: bool) -> bool:
        """Whether all layers must have been run, or measured, before the first can be merged.

        Args:
            has_own_head: Whether the model's head is a tensor of its own, not the embedding.
        """
        relaxation, coefficients = self.relaxation, self.layer_coefficients
        relaxes_embedding = relaxation is not None and relaxation.relaxes_tied_head
        shares_information = coefficients is not None and coefficients.needs_all_layers
        return self.has_statistics or (relaxes_embedding and not has_own_head) or shares_information

    @property
    def has_statistics(self) -> bool:
        """Whether something must be known of the whole model before the first tensor is merged."""
        return self.rounds(2) > 0

    @property
    def _by_tensor(self) -> bool:
        statistics = self.operator.statistics
        return statistics is not None and statistics.by_tensor(self.settings)

    def rounds(self, contributors: int) -> int:
        """Rounds over the whole model before an iteration can be merged."""
        return 0 if self._by_tensor else self._rounds(self.settings, contributors)

    def tensor_rounds(self, contributors: int, tensor: tuple[str, float]) -> int:
        """Rounds over a tensor, of this name and depth, before it can be merged in pieces."""
        if not self._by_tensor:
            return 0
        return self._rounds(resolved(self.settings, *tensor), contributors)

    def _rounds(self, settings: MethodSettings, contributors: int) -> int:
        statistics = self.operator.statistics
        return statistics.rounds(settings, contributors) if statistics else 0

    def takes_rows(self, ndim: int, is_linear: bool, *, measures_tensors: bool = False) -> bool:
        """Whether a tensor may come in pieces of rows.

        Args:
            ndim: Its dimensions.
            is_linear: Whether it is the weight of a linear module of the layers.
            measures_tensors: Whether the caller does the rounds over each tensor; else `merge`
                does them on the whole.
        """
        if self._by_tensor and not measures_tensors:
            return False
        whole = self.operator.whole_tensors
        if whole(self.settings) if callable(whole) else whole:
            return False
        if is_linear and self.needs_outputs:
            return False
        if thinning.needs_whole_tensors(self.settings, ndim):
            return False
        return ndim < 2 or self.settings.edit == "none"

    def merge(self, inputs: TensorInputs) -> MergedTensor:
        """Merge one tensor, or rows of one."""
        models = _models_of(self, inputs)
        if models is not None:
            return MergedTensor(_merged_models(self, inputs, models))
        vectors, result = self._task_vectors(inputs)
        result.tensor = self._added(inputs, vectors)
        return result

    def merge_steps(self, inputs: Sequence[TensorInputs]) -> Iterator[Tensor]:
        """Merge one tensor, or rows of one, with steps of several lengths, one after another.

        What is the same for all, the task vectors and their rotation, is computed once.

        Args:
            inputs: The same tensor of the same states, once for each step: they differ in
                `coefficient`, `factors` and `statistics`.

        Yields:
            `W_new`, float32, of each step: the bits that `merge` gives.
        """
        left = [each for each in inputs if _models_of(self, each) is None]
        vectors = self._task_vectors(left[0])[0] if left else []
        for each in inputs:
            models = _models_of(self, each)
            if models is not None:
                yield _merged_models(self, each, models)
            else:
                # The operator may overwrite what it is given.
                yield self._added(
                    each, vectors if each is left[-1] else [v.clone() for v in vectors]
                )

    def _rotated(
        self, inputs: TensorInputs, index: int, vector: Tensor, result: MergedTensor
    ) -> Tensor:
        """A contributor's task vector, each of its blocks of rows rotated by itself."""
        blocks = inputs.blocks or (vector.shape[0],)
        parts, is_rotated = [], False
        for number, part in enumerate(torch.split(vector, list(blocks))):
            rows = slice(sum(blocks[:number]), sum(blocks[: number + 1]))
            rotation = _rotation(self.settings, inputs, (index, number), rows, part)
            # A candidate whose activations equal the reference's is not rotated.
            if rotation is None:
                parts.append(part)
                continue
            parts.append(rotation.apply_(part))
            is_rotated = True
            result.rotations.append(rotation.facts)
            if rotation.is_rank_deficient:
                result.rank_deficient.append((rotation.rank, rotation.full_rank))
        result.rotated += is_rotated
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _added(self, inputs: TensorInputs, vectors: list[Tensor]) -> Tensor:
        """The reference and the update that the operator makes of task vectors."""
        settings = _settings_of(self.settings, inputs)
        given = _stepped(inputs, vectors)
        if self._by_tensor and not inputs.is_measured:
            given = self._measured(given)
        update = self.operator.update(given, settings)
        if inputs.relaxation is not None:
            update *= inputs.relaxation
        return update.add_(inputs.reference)

    def _measured(self, given: TaskVectors) -> TaskVectors:
        """With the rounds over this one tensor, which is whole."""
        statistics = self.operator.statistics
        assert statistics is not None
        known, settings = given.inputs.statistics, _settings_of(self.settings, given.inputs)
        for number in range(self._rounds(settings, len(given.vectors))):
            inputs = replace(given.inputs, statistics=known)
            sums = statistics.measure(number, TaskVectors(inputs, given.vectors), settings)
            known = statistics.conclude(number, sums, known, settings)
        return TaskVectors(replace(given.inputs, statistics=known), given.vectors)

    def measure(self, number: int, inputs: TensorInputs) -> Sums:
        """One round's numbers of one tensor, or rows of one."""
        assert self.operator.statistics is not None
        models, shorter = _models_of(self, inputs), self.operator.on_models
        if models is not None and shorter is not None:
            return shorter.measure(models, _settings_of(self.settings, inputs))
        vectors, _ = self._task_vectors(inputs)
        given = _stepped(inputs, vectors)
        return self.operator.statistics.measure(number, given, _settings_of(self.settings, inputs))

    def conclude(
        self,
        number: int,
        sums: Sums,
        known: Mapping[str, object],
        tensor: tuple[str, float] | None = None,
    ) -> Mapping[str, object]:
        """What is known of the whole model after a round, or of a tensor.

        Args:
            number: The round.
            sums: What was measured in it.
            known: What was known before.
            tensor: Name and depth of the tensor; None: the whole model.
        """
        assert self.operator.statistics is not None
        settings = self.settings if tensor is None else resolved(self.settings, *tensor)
        return self.operator.statistics.conclude(number, sums, known, settings)

    def _task_vectors(self, inputs: TensorInputs) -> tuple[list[Tensor], MergedTensor]:
        """The task vectors, rotated, edited and thinned, before a step's own factors."""
        result = MergedTensor(inputs.reference)
        vectors = [weight - inputs.reference for weight in inputs.contributors]
        if self.settings.rotates and (inputs.shifts or inputs.rotations):
            if inputs.shifts and len(inputs.shifts) != len(vectors):
                raise ValueError(
                    f"shifts: got {len(inputs.shifts)} for {len(vectors)} contributors"
                )
            for index in range(len(vectors)):
                vectors[index] = self._rotated(inputs, index, vectors[index], result)
        if self.settings.edit != "none":
            vectors = [edit(v, inputs.name, inputs.is_linear, self.settings) for v in vectors]
        if thinning.thins(self.settings):
            vectors = thinning.thinned(_settings_of(self.settings, inputs), inputs, vectors)
        for vector, scale in zip(vectors, inputs.scales, strict=False):
            vector *= scale
        return vectors, result


def takes_models(method: Method, tensor: tuple[str, float]) -> bool:
    """Whether models are merged as they are where nothing changes their task vectors.

    Then the rounds do not look at a reference that is not one of the models.

    Args:
        method: How tensors are merged.
        tensor: Name and depth.
    """
    shorter, settings = method.operator.on_models, method.settings
    if shorter is None or settings.edit != "none" or thinning.thins(settings):
        return False
    return shorter.applies(resolved(settings, *tensor))


def _models_of(method: Method, inputs: TensorInputs) -> list[Tensor] | None:
    """The models to merge as they are; None: it takes task vectors."""
    changes = bool(inputs.scales) or inputs.relaxation is not None
    changes |= method.settings.rotates and bool(inputs.shifts or inputs.rotations)
    changes |= any(factor != 1.0 for factor in inputs.factors)
    if changes or not takes_models(method, (inputs.name, inputs.depth)):
        return None
    return [*([inputs.reference] if inputs.includes_reference else []), *inputs.contributors]


def _merged_models(method: Method, inputs: TensorInputs, models: Sequence[Tensor]) -> Tensor:
    shorter, at = method.operator.on_models, (inputs.name, inputs.depth)
    assert shorter is not None
    known, settings = inputs.statistics, _settings_of(method.settings, inputs)
    if not inputs.is_measured:
        for number in range(method.tensor_rounds(len(inputs.contributors), at)):
            known = method.conclude(number, shorter.measure(models, settings), known, at)
    return shorter.merge(models, known, settings)


def _settings_of(settings: MethodSettings, inputs: TensorInputs) -> MethodSettings:
    """The settings of a tensor, with the coefficient of a step, where it has one."""
    settings = resolved(settings, inputs.name, inputs.depth)
    if inputs.coefficient is None:
        return settings
    return replace(settings, coefficient=inputs.coefficient)


def _rotation(
    settings: MethodSettings,
    inputs: TensorInputs,
    key: tuple[int, int],
    rows: slice,
    vector: Tensor,
) -> AnyRotation | None:
    """The rotation of a block of rows of a contributor's task vector; None: there is none."""
    known = inputs.rotations
    if known is not None and key in known:
        return known[key]
    chosen, shift = settings.rotation, inputs.shifts[key[0]][rows]
    found: AnyRotation | None
    if chosen.variant == "minimal":
        found = minimal_rotation(shift, vector, rank_tolerance=chosen.rank_tolerance)
    else:
        found = activation_rotation(shift, sign=chosen.sign, rank_tolerance=chosen.rank_tolerance)
    if known is not None:
        known[key] = found
    return found


def _stepped(inputs: TensorInputs, vectors: list[Tensor]) -> TaskVectors:
    """What the operator is given: task vectors by the factors of a step, which are overwritten."""
    for vector, factor in zip(vectors, inputs.factors, strict=False):
        vector *= factor
    return TaskVectors(inputs, vectors)


def open_method(
    settings: MethodSettings,
    *num_models: int,
    has_window: bool = False,
    step: str = "fixed",
    takes_losses: bool = False,
) -> Method:
    """Find the operator of the settings, and check that it can be given what it needs.

    Args:
        settings: The section `method`.
        num_models: How many models an iteration merges: every number that occurs.
        has_window: Whether any iteration merges a sliding window.
        step: `schedule.step`.
        takes_losses: Whether the losses of its states are wanted.

    Raises:
        ConfigError: All problems, one line each.
    """
    operator = find_operator(settings.steps[-1])
    problems = [
        f"method.{name}: is set, but operator {settings.operator!r}"
        + (f" with edit {settings.edit!r}" if settings.edit != "none" else "")
        + " does not read it; remove it, or change method.operator"
        for name in settings.unused_sections
    ]
    problems += _coefficient_problems(settings, operator) + thinning.problems(settings)
    problems += _part_problems(settings, step)
    if step != "fixed" and not (operator.uses_coefficient or "acm" in settings.steps):
        problems.append(
            f"schedule.step: is {step!r}, but operator {operator.name!r} has no coefficient whose"
            " value could be searched; set it to fixed, or change method.operator"
        )
    if has_window and operator.candidates_only:
        problems.append(
            f"schedule: operator {operator.name!r} needs something of every model that only"
            " candidates have, and a sliding window merges states that were made;"
            " set schedule.anchor_iterations to schedule.max_iterations"
        )
    for count in num_models:
        problems += _count_problems(operator, count) + operator.check(settings, count)
    if problems:
        hint = None
        if len(num_models) > 1:
            counts = " and ".join(map(str, num_models))
            hint = (
                f"the iterations of this schedule merge {counts} models; candidates,"
                " schedule.initial, anchor_iterations and window_size decide how many"
            )
        # What does not depend on the number of models is found for each.
        listed = dict.fromkeys(f"  - {text}" for text in problems)
        raise ConfigError(
            "\n".join(["the merge method cannot be", *listed]), where="method", hint=hint
        )
    method = Method(settings, operator, step != "fixed", takes_losses)
    if method.layer_coefficients is not None:
        # They take the place of the coefficient.
        method = replace(method, settings=replace(settings, coefficient=1.0))
    return method


def _coefficient_problems(settings: MethodSettings, operator: Operator) -> list[str]:
    by_part = "coefficient" in settings.by_part
    if settings.coefficient == MethodSettings().coefficient and not by_part:
        return []
    if "acm" in settings.steps:
        reason = "operator 'acm' finds a coefficient for each layer itself"
    elif not operator.uses_coefficient:
        reason = f"operator {operator.name!r} has no coefficient"
    else:
        return []
    value = "values by part" if by_part else settings.coefficient
    return [f"method.coefficient: is set to {value}, but {reason}; remove it"]


def _part_problems(settings: MethodSettings, step: str) -> list[str]:
    """Values by part that the method could not follow."""
    problems = []
    if "coefficient" in settings.by_part and step != "fixed":
        problems.append(
            f"schedule.step: is {step!r}, which looks for one coefficient, but method.coefficient "
            "has values by part; set it to fixed"
        )
    if "ties.keep" in settings.by_part and settings.ties.scope == "global":
        problems.append(
            "method.ties.keep: has values by part, but one threshold over the whole model; set "
            "method.ties.scope to per_tensor"
        )
    return problems


def _count_problems(operator: Operator, num_models: int) -> list[str]:
    fewest, most = operator.min_models, operator.max_models
    if fewest <= num_models and (most is None or num_models <= most):
        return []
    if most is None:
        wanted = f"at least {fewest}"
    else:
        wanted = f"exactly {most}" if most == fewest else f"{fewest} to {most}"
    return [f"candidates: operator {operator.name!r} merges {wanted} models, got {num_models}"]

"""A whole merge method: rotation, low-rank edit, thinning, an operator, relaxation.

All methods share one sequence of steps. Only the operator's is required:

    ΔW_i  = W_i − W_ref
    ΔW_i ← U_i ΔW_i                  rotation by the activation shift (ARM)
    ΔW_i ← edit(ΔW_i)                low-rank edit
    ΔW_i ← drop(ΔW_i)                DARE
    ΔW_i ← λ_i ΔW_i                  ACM
    W_new = W_ref + r ⊙ update(ΔW_1, …, ΔW_k)         the operator; AIM's relaxation r
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from arm_ray.errors import ConfigError
from arm_ray.merging import dare
from arm_ray.merging.acm import LayerCoefficients
from arm_ray.merging.aim import Relaxation
from arm_ray.merging.edits import edit
from arm_ray.merging.operator import MergedTensor, Operator, Sums, TaskVectors, TensorInputs
from arm_ray.merging.registry import find_operator
from arm_ray.merging.rotation import (
    MinimalRotation,
    Rotation,
    activation_rotation,
    minimal_rotation,
)
from arm_ray.merging.settings import MethodSettings


@dataclass(frozen=True)
class Method:
    """An operator and the steps around it.

    Attributes:
        settings: The settings.
        operator: What turns task vectors into an update.
    """

    settings: MethodSettings
    operator: Operator

    @property
    def needs_outputs(self) -> bool:
        """Whether the mean outputs of the linear modules are wanted, of all inputs."""
        return self.settings.rotates or self.operator.activations

    @property
    def needs_forward(self) -> bool:
        """Whether calibration samples are run through the models."""
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
        return 0 if self._by_tensor else self._rounds(contributors)

    def tensor_rounds(self, contributors: int) -> int:
        """Rounds over each tensor before it can be merged in pieces."""
        return self._rounds(contributors) if self._by_tensor else 0

    def _rounds(self, contributors: int) -> int:
        statistics = self.operator.statistics
        return statistics.rounds(self.settings, contributors) if statistics else 0

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
        if self._thins and self.settings.dare.rescale == "l1":
            return False
        return ndim < 2 or self.settings.edit == "none"

    def merge(self, inputs: TensorInputs) -> MergedTensor:
        """Merge one tensor, or rows of one."""
        given, result = self._task_vectors(inputs)
        if self._by_tensor and not inputs.is_measured:
            given = self._measured(given)
        update = self.operator.update(given, self.settings)
        if inputs.relaxation is not None:
            update *= inputs.relaxation
        result.tensor = update.add_(inputs.reference)
        return result

    def _measured(self, given: TaskVectors) -> TaskVectors:
        """With the rounds over this one tensor, which is whole."""
        statistics = self.operator.statistics
        assert statistics is not None
        known = given.inputs.statistics
        for number in range(self._rounds(len(given.vectors))):
            inputs = replace(given.inputs, statistics=known)
            sums = statistics.measure(number, TaskVectors(inputs, given.vectors), self.settings)
            known = statistics.conclude(number, sums, known, self.settings)
        return TaskVectors(replace(given.inputs, statistics=known), given.vectors)

    def measure(self, number: int, inputs: TensorInputs) -> Sums:
        """One round's numbers of one tensor, or rows of one."""
        assert self.operator.statistics is not None
        given, _ = self._task_vectors(inputs)
        return self.operator.statistics.measure(number, given, self.settings)

    def conclude(
        self, number: int, sums: Sums, known: Mapping[str, object]
    ) -> Mapping[str, object]:
        """What is known of the whole model after a round."""
        assert self.operator.statistics is not None
        return self.operator.statistics.conclude(number, sums, known, self.settings)

    def _task_vectors(self, inputs: TensorInputs) -> tuple[TaskVectors, MergedTensor]:
        result = MergedTensor(inputs.reference)
        vectors = [weight - inputs.reference for weight in inputs.contributors]
        if self.settings.rotates and inputs.shifts:
            for index, shift in zip(range(len(vectors)), inputs.shifts, strict=True):
                rotation = self._rotation(shift, vectors[index])
                # A candidate whose activations equal the reference's is not rotated.
                if rotation is None:
                    continue
                vectors[index] = rotation.apply_(vectors[index])
                result.rotated += 1
                if rotation.is_rank_deficient:
                    result.rank_deficient.append((rotation.rank, rotation.full_rank))
        if self.settings.edit != "none":
            vectors = [edit(v, inputs.name, inputs.is_linear, self.settings) for v in vectors]
        if self._thins:
            vectors = self._thinned(inputs, vectors)
        for vector, scale in zip(vectors, inputs.scales, strict=False):
            vector *= scale
        return TaskVectors(inputs, vectors), result

    @property
    def _thins(self) -> bool:
        return "dare" in self.settings.steps

    def _thinned(self, inputs: TensorInputs, vectors: list[Tensor]) -> list[Tensor]:
        shape = tuple(inputs.reference.shape) if inputs.shape is None else inputs.shape
        # Without names, contributors are told apart by their place.
        names = inputs.contributor_names or tuple(map(str, range(len(vectors))))
        return [
            dare.drop(
                vector, inputs.rows, shape, inputs.name, name, inputs.iteration, self.settings.dare
            )
            for vector, name in zip(vectors, names, strict=True)
        ]

    def _rotation(self, shift: Tensor, vector: Tensor) -> Rotation | MinimalRotation | None:
        chosen = self.settings.rotation
        if chosen.variant == "minimal":
            return minimal_rotation(shift, vector, rank_tolerance=chosen.rank_tolerance)
        return activation_rotation(shift, sign=chosen.sign, rank_tolerance=chosen.rank_tolerance)


def open_method(settings: MethodSettings, *num_models: int, has_window: bool = False) -> Method:
    """Find the operator of the settings, and check that it can be given what it needs.

    Args:
        settings: The section `method`.
        num_models: How many models an iteration merges: every number that occurs.
        has_window: Whether any iteration merges a sliding window.

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
    problems += _coefficient_problems(settings, operator)
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
    method = Method(settings, operator)
    if method.layer_coefficients is not None:
        # They take the place of the coefficient.
        method = replace(method, settings=replace(settings, coefficient=1.0))
    return method


def _coefficient_problems(settings: MethodSettings, operator: Operator) -> list[str]:
    if settings.coefficient == MethodSettings().coefficient:
        return []
    if "acm" in settings.steps:
        reason = "operator 'acm' finds a coefficient for each layer itself"
    elif not operator.uses_coefficient:
        reason = f"operator {operator.name!r} has no coefficient"
    else:
        return []
    return [f"method.coefficient: is set to {settings.coefficient}, but {reason}; remove it"]


def _count_problems(operator: Operator, num_models: int) -> list[str]:
    fewest, most = operator.min_models, operator.max_models
    if fewest <= num_models and (most is None or num_models <= most):
        return []
    if most is None:
        wanted = f"at least {fewest}"
    else:
        wanted = f"exactly {most}" if most == fewest else f"{fewest} to {most}"
    return [f"candidates: operator {operator.name!r} merges {wanted} models, got {num_models}"]

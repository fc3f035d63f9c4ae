"""ARM: task vectors rotated by the left singular vectors of their activation shift."""

from __future__ import annotations

import torch

from arm_ray.merging import task_arithmetic
from arm_ray.merging.operator import MergedTensor, MergeSettings, Operator, TensorInputs
from arm_ray.merging.rotation import activation_rotation


def merge(inputs: TensorInputs, settings: MergeSettings) -> MergedTensor:
    """`W_ref + (λ / m) Σ U_i (W_i − W_ref)` (Eqs. 3-5).

    Tensors without activations (embeddings, norms, biases, `lm_head`) take the same update with
    `U = I`, and so does a contributor whose activations equal the reference's.
    """
    if inputs.reference_activation is None:
        return task_arithmetic.merge(inputs, settings)
    reference_activation = inputs.reference_activation
    total = torch.zeros_like(inputs.reference)
    result = MergedTensor(total)
    pairs = zip(inputs.contributors, inputs.contributor_activations, strict=True)
    for weight, activation in pairs:
        task_vector = weight - inputs.reference
        rotation = activation_rotation(
            activation - reference_activation,
            sign=settings.sign,
            rank_tolerance=settings.rank_tolerance,
        )
        if rotation is None:
            total += task_vector
            continue
        total += rotation.apply(task_vector)
        result.rotated += 1
        if rotation.is_rank_deficient:
            result.rank_deficient.append((rotation.rank, rotation.full_rank))
    total.mul_(settings.coefficient / inputs.divisor).add_(inputs.reference)
    return result


OPERATOR = Operator("arm", merge, needs_activations=True)

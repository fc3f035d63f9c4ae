"""Task Arithmetic in the mean form of the ARM paper: `W_ref + (λ / m) Σ (W_i − W_ref)`."""

from __future__ import annotations

from arm_ray.merging.operator import MergedTensor, MergeSettings, Operator, TensorInputs


def merge(inputs: TensorInputs, settings: MergeSettings) -> MergedTensor:
    """Add the scaled mean of the task vectors (Ilharco et al., 2023; Eqs. 1 and 2)."""
    first, *others = inputs.contributors or (inputs.reference,)
    total = first - inputs.reference
    for weight in others:
        total += weight - inputs.reference
    return MergedTensor(total.mul_(settings.coefficient / inputs.divisor).add_(inputs.reference))


OPERATOR = Operator("task_arithmetic", merge, needs_activations=False)

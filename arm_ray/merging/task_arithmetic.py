"""Task Arithmetic: `W_ref + (λ / m) Σ (W_i − W_ref)` in the mean form of the ARM paper."""

from __future__ import annotations

import torch
from torch import Tensor

from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """The scaled mean of the task vectors (Eqs. 1 and 2), or their sum (Ilharco et al., 2023)."""
    if not given.vectors:
        return torch.zeros_like(given.inputs.reference)
    total, *others = given.vectors
    for vector in others:
        total += vector
    divisor = given.inputs.divisor if settings.task_arithmetic.reduce == "mean" else 1
    return total.mul_(settings.coefficient / divisor)


OPERATOR = Operator("task_arithmetic", update)

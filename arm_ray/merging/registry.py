"""The merge operators by name."""

from __future__ import annotations

from arm_ray.merging import arm, task_arithmetic
from arm_ray.merging.operator import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator for operator in (arm.OPERATOR, task_arithmetic.OPERATOR)
}

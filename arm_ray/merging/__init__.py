"""Tensors in, tensors out: rotations and merge operators.

Nothing here knows of files, of Ray or of configuration objects. The names below are stable; they
are imported when they are used.
"""

from typing import TYPE_CHECKING

from arm_ray.lazy import lazily

if TYPE_CHECKING:
    from arm_ray.merging.method import Method, open_method
    from arm_ray.merging.operator import Operator, Statistics, TaskVectors, TensorInputs
    from arm_ray.merging.registry import find_operator
    from arm_ray.merging.rotation import Rotation, activation_rotation, minimal_rotation
    from arm_ray.merging.settings import OPERATOR_NAMES, MethodSettings
    from arm_ray.merging.tensors import merge_state_dicts, merge_tensors, method_settings

__all__ = [
    "OPERATOR_NAMES",
    "Method",
    "MethodSettings",
    "Operator",
    "Rotation",
    "Statistics",
    "TaskVectors",
    "TensorInputs",
    "activation_rotation",
    "find_operator",
    "merge_state_dicts",
    "merge_tensors",
    "method_settings",
    "minimal_rotation",
    "open_method",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "OPERATOR_NAMES": "arm_ray.merging.settings",
        "Method": "arm_ray.merging.method",
        "MethodSettings": "arm_ray.merging.settings",
        "Operator": "arm_ray.merging.operator",
        "Rotation": "arm_ray.merging.rotation",
        "Statistics": "arm_ray.merging.operator",
        "TaskVectors": "arm_ray.merging.operator",
        "TensorInputs": "arm_ray.merging.operator",
        "activation_rotation": "arm_ray.merging.rotation",
        "find_operator": "arm_ray.merging.registry",
        "merge_state_dicts": "arm_ray.merging.tensors",
        "merge_tensors": "arm_ray.merging.tensors",
        "method_settings": "arm_ray.merging.tensors",
        "minimal_rotation": "arm_ray.merging.rotation",
        "open_method": "arm_ray.merging.method",
    },
)

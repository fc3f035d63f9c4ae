"""NearSwap: each entry goes to another model's, but no further than a threshold."""

from __future__ import annotations

from torch import Tensor

from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`(1 − s) W_ref + s W_1 − W_ref = clamp(ΔW_1, −t, t)` with `s = min(1, t / |ΔW_1|)`."""
    [vector] = given.vectors
    return vector.clamp_(-settings.nearswap.t, settings.nearswap.t)


OPERATOR = Operator(
    "nearswap",
    update,
    uses_coefficient=False,
    # The other model of a window is a state on the way to this one.
    candidates_only=True,
    max_models=1,
)

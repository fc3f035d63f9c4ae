"""Ray, which is imported when something of it is first used: a merge without it does not wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arm_ray.lazy import LaterModule

if TYPE_CHECKING:
    import ray as ray
else:
    ray = LaterModule("ray")

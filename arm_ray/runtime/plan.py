"""A plan of a merge, for machines that are described and for this one."""

from __future__ import annotations

from arm_ray.config import MergeConfig
from arm_ray.planning.cluster import Cluster
from arm_ray.planning.devices import MEASURED
from arm_ray.planning.plan import Plan, make_plan


def plan_of(config: MergeConfig, cluster: Cluster, tokens_per_sample: int | None = None) -> Plan:
    """`make_plan`, after one layer was tried where the plan is for this machine.

    Args:
        config: The configuration.
        cluster: What the plan is for.
        tokens_per_sample: As for `make_plan`.

    Raises:
        ArmRayError: As `make_plan`.
    """
    if cluster.device.name == MEASURED:
        # Other plans need nothing of what runs a merge.
        from arm_ray.runtime.rehearsal import rehearsed

        cluster = rehearsed(config, cluster, tokens_per_sample)
    return make_plan(config, cluster, tokens_per_sample)

"""How a configuration merges states: its operator, checked against its schedule."""

from __future__ import annotations

from arm_ray.config import MergeConfig
from arm_ray.merging.method import Method, open_method
from arm_ray.schedule import merge_sizes


def method_of(config: MergeConfig) -> Method:
    """The method of a merge.

    Args:
        config: The configuration.

    Raises:
        ConfigError: The operator cannot be given what it needs; all problems, one line each.
    """
    schedule = config.schedule
    return open_method(
        config.method,
        *merge_sizes(schedule, len(config.candidates)),
        has_window=schedule.has_window,
        step=schedule.step,
        takes_losses=config.compares_losses,
    )

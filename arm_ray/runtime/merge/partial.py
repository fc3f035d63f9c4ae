"""Layer groups that are merged of iterations that are not finished, whichever shards did it."""

from __future__ import annotations

from collections.abc import Callable

from arm_ray.runtime.shards.spec import GroupReport


class PartialMerges:
    """What shards that are gone have merged, so that others take it over."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, int], GroupReport] = {}

    def add(self, iteration: int, report: GroupReport) -> None:
        """Take note of a layer group of an iteration that is merged and written."""
        self._reports[iteration, report.group] = report

    def of(self, iteration: int) -> dict[int, GroupReport]:
        """Layer group -> what merging it gave, of one iteration."""
        return {group: report for (t, group), report in self._reports.items() if t == iteration}

    def forget(self, iteration: int) -> None:
        """Let go of an iteration that is finished."""
        self.keep(lambda t, _group: t != iteration)

    def keep(self, wanted: Callable[[int, int], bool]) -> None:
        """Let go of all but some iterations and layer groups."""
        self._reports = {key: value for key, value in self._reports.items() if wanted(*key)}

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Iteration and layer group of all."""
        return set(self._reports)

"""What a linear pass writes, by what is to be kept and who reads it; no shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arm_ray.runtime.merge.dispatch import PartialMerges
from arm_ray.runtime.merge.sweeps import states_to_write
from arm_ray.runtime.shards.spec import GroupReport
from arm_ray.schedule import plan_iteration
from tests.builders.merge_case import MergeCase


def written(
    root: Path, *overrides: str, upto: int = 4, shared: bool = True, scoring: Any = None
) -> tuple[list[int], bool]:
    case = MergeCase(root)
    case.candidates = [root / "a", root / "b"]
    config = case.config("method.operator=task_arithmetic", *overrides)
    plans = [plan_iteration(config.schedule, 2, t) for t in range(1, upto + 1)]
    job: Any = SimpleNamespace(config=config, scoring=scoring, num_candidates=2)
    states, model = states_to_write(job, plans, is_end=upto == 4, is_shared=shared)
    return sorted(states), model


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["keep_states=none"], ([], True)),
        (["keep_states=last"], ([4], True)),
        (["keep_states=all"], ([1, 2, 3, 4], True)),
        (["keep_states=none", "output_format=adapter", "adapter_rank=4"], ([4], False)),
    ],
)
def test_a_pass_to_the_end_writes_the_model_and_what_is_kept(
    tmp_path: Path, overrides: list[str], expected: tuple[list[int], bool]
) -> None:
    assert written(tmp_path, *overrides) == expected


def test_a_pass_that_halts_leaves_what_the_next_one_reads(tmp_path: Path) -> None:
    # Iteration 4 merges a window of the states 3 and 2.
    assert written(tmp_path, "keep_states=none", upto=3) == ([2, 3], False)


def test_parts_on_nodes_are_put_together_from_the_last_state(tmp_path: Path) -> None:
    assert written(tmp_path, "keep_states=none", shared=False) == ([4], False)


@pytest.mark.parametrize("chooses", [True, False])
def test_states_that_are_scored_are_written(tmp_path: Path, chooses: bool) -> None:
    scoring = SimpleNamespace(is_due=lambda t: t % 2 == 0, may_choose_earlier=chooses)
    assert written(tmp_path, "keep_states=none", scoring=scoring) == ([2, 4], not chooses)


def report(group: int) -> GroupReport:
    return GroupReport(group, (), 0, (), 0.0, 0)


def test_what_lost_shards_have_merged_is_kept_by_iteration() -> None:
    partial = PartialMerges()
    for iteration, group in ((1, 0), (1, 2), (2, 0)):
        partial.add(iteration, report(group))
    assert partial.of(1) == {0: report(0), 2: report(2)}
    partial.forget(1)
    assert partial.of(1) == {}
    assert partial.keys == {(2, 0)}
    partial.keep(lambda iteration, _group: iteration > 2)
    assert partial.keys == set()

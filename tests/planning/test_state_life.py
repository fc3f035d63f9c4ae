"""Which merged states are written, what a killed merge loses, and how often it pays to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.planning.simulator import ChunkTimes, IterationTimes, ShardTimes, simulate
from arm_ray.planning.state_life import (
    SECONDS_BETWEEN_FAILURES,
    StateLife,
    best_interval,
    linear_life,
    state_life,
    states_to_come,
)

TASK = {"tasks": [{"name": "held", "type": "loss", "path": "held.jsonl"}], "every": 4}


def configure(*overrides: str, **content: Any) -> MergeConfig:
    """Twelve iterations, four of them anchored; then a window of two."""
    schedule = {"anchor_iterations": 4, "max_iterations": 12, "tolerance": 0.0, "step": "fixed"}
    given = {
        "base": "base",
        "candidates": ["one", "two"],
        "output": "run",
        "calibration": {"path": "c.jsonl"},
        "schedule": schedule,
        **content,
    }
    return parse_merge_config(given, overrides)


def life(*overrides: str, every: int | None = None, last: int | None = None, **content: Any):
    return state_life(configure(*overrides, **content), 2, every, last)


def test_nothing_is_written_where_nothing_asks() -> None:
    found = life()
    assert (found.written, found.recovery, found.most_lost) == (frozenset(), (), 12)
    # Which state is the last is known before.
    assert not found.may_end_early


@pytest.mark.parametrize("override", ["keep_states=all", "runtime.residency=disk"])
def test_what_is_on_disk_anyway_is_a_recovery_point(override: str) -> None:
    found = life(override)
    assert found.written == frozenset(range(1, 13))
    assert found.recovery == tuple(range(1, 12))
    assert (found.most_lost, found.optional) == (1, frozenset())


def test_a_recovery_point_is_all_that_the_next_iteration_reads() -> None:
    found = life(every=3)
    # Anchored iterations read the state before; a window of two reads two states. The last
    # iteration's own end needs no point.
    assert found.written == {3, 5, 6, 8, 9}
    assert found.optional == found.written
    assert found.recovery == (3, 6, 9)
    assert found.most_lost == 3


def test_states_that_are_scored_are_written_and_may_do_for_recovery() -> None:
    found = life(evaluation=TASK)
    assert found.written == {4, 8, 12}
    # After 4 the next iteration, of the window, reads 3 as well.
    assert (found.recovery, found.optional) == ((), frozenset())
    assert not found.may_end_early
    by_task = life(evaluation={**TASK, "select": {"by": "held"}})
    assert by_task.may_end_early


def test_a_merge_that_is_halted_leaves_what_the_next_iteration_reads() -> None:
    found = life(last=6)
    assert (found.last, found.written, found.optional) == (6, {5, 6}, frozenset())


@pytest.mark.parametrize(
    "overrides", [["schedule.tolerance=0.01"], ["schedule.step=subspace"], ["select.promise=true"]]
)
def test_what_may_end_a_merge_early(overrides: list[str]) -> None:
    assert life(*overrides).may_end_early


def test_a_linear_merge_writes_what_is_kept() -> None:
    for keep, written in (("none", set()), ("last", {12}), ("all", set(range(1, 13)))):
        assert linear_life(configure(f"keep_states={keep}")).written == written
    assert linear_life(configure(evaluation=TASK)).written == {4, 8, 12}


def test_the_best_interval_loses_the_least_time() -> None:
    """Against the sum that it minimises: writing, and half an interval lost with each failure."""
    for iteration_s, write_s in ((4.0, 28.0), (100.0, 30.0), (2000.0, 5.0)):

        def cost(every: int, step: float = iteration_s, write: float = write_s) -> float:
            seconds = every * step
            return write / seconds + seconds / (2.0 * SECONDS_BETWEEN_FAILURES)

        best = min(range(1, 2000), key=cost)
        assert abs(best_interval(iteration_s, write_s) - best) <= 1
    # Six iterations of 4 s are computed again; long ones are written.
    assert best_interval(4.0, 28.0) > 6
    assert best_interval(2000.0, 5.0) == 1
    assert best_interval(0.0, 1.0) == 1


def test_what_is_lost_is_said() -> None:
    never = StateLife(6, frozenset(), frozenset(), (), True, 4.0)
    assert never.loss_text == (
        "states stay in memory: a run that is killed makes at most 6 iterations again, about 24 s "
        "of work"
    )
    often = StateLife(8, frozenset({1}), frozenset(), (1, 2, 3, 4), True)
    assert often.loss_text == (
        "a run that is killed goes on after iteration 1, 2, 3, …: it makes at most 4 iterations "
        "again"
    )


@pytest.mark.parametrize(
    ("overrides", "every", "done", "expected"),
    [
        ([], None, 0, 0),
        (["keep_states=last"], None, 0, 1),
        (["output_format=adapter", "adapter_rank=4"], None, 0, 1),
        (["keep_states=all"], 3, 2, 10),
        # States 5 and 6 stay until 8 and 9 are written.
        ([], 3, 0, 4),
        (["runtime.lookahead=0"], 3, 0, 4),
        (["runtime.residency=disk", "runtime.lookahead=0"], None, 0, 3),
    ],
)
def test_room_on_the_disk(
    tmp_path: Path, overrides: list[str], every: int | None, done: int, expected: int
) -> None:
    config = configure(*overrides, output=str(tmp_path))
    assert states_to_come(config, 2, state_life(config, 2, every), done) == expected


# ---- in the simulator


def iteration(write_s: float, replaces: tuple[int, ...] = (), **more: bool) -> IterationTimes:
    """Two calls of 1 s and a merge of 1 s, on one shard."""
    shard = ShardTimes((ChunkTimes(1.0, 1.0, write_s),))
    return IterationTimes(2, (shard,), replaces=replaces, **more)


def test_writing_goes_on_beside_the_next_iteration() -> None:
    # The state of iteration 1 is on disk after 3 + 2 s, before the next merge ends.
    run = simulate([iteration(2.0), iteration(0.0, (0,)), iteration(0.0, (1,))], 2)
    assert run.makespan_s == 9.0
    assert run.busy_s == (9.0,)


def test_a_merge_waits_until_the_state_that_it_replaces_is_written() -> None:
    run = simulate([iteration(10.0), iteration(0.0, (0,)), iteration(0.0, (1,))], 2)
    # Written at 13 s: the second merge, done at 6 s, has no room before.
    assert run.finished_s == (3.0, 13.0, 16.0)
    # The last state's writing counts.
    assert simulate([iteration(10.0)], 2).makespan_s == 13.0


def test_a_merge_waits_until_an_earlier_end_is_ruled_out() -> None:
    def two(*replaced: int) -> IterationTimes:
        shards = (ShardTimes((ChunkTimes(1.0, 1.0),)), ShardTimes((ChunkTimes(1.0, 5.0),)))
        return IterationTimes(2, shards, replaces=replaced, may_end_early=True)

    # Shard 1 is done with iteration 1 at 8 s; shard 0 has merged iteration 2 at 6 s.
    run = simulate([two(), two(0)], 2)
    assert run.finished_s[0] == 8.0
    # Shard 0 is free for iteration 3 only then.
    assert simulate([two(), two(0), two(1)], 2).finished_s == (8.0, 15.0, 22.0)

"""Merged states that live in memory: what is written, what is lost with a shard, the same bits."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import DiskSpaceError, ShardLostError
from arm_ray.events import read_events
from arm_ray.runtime.merge import publisher
from arm_ray.runtime.merge.state_storage import StateStorage
from arm_ray.runtime.merge.sweeps import Sweep
from arm_ray.runtime.shards.made_states import MadeStates
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run

pytestmark = pytest.mark.usefixtures("shards_in_process")

# Two anchored iterations, then a window of two; five in all.
SCHEDULE = "schedule={anchor_iterations: 2, max_iterations: 5, tolerance: 0.0, step: fixed}"
NEVER = "runtime.recovery_every=never"


@pytest.fixture
def merged(case: MergeCase) -> Any:
    """Merges, and compares each model with that of a merge that writes every state."""
    case.make()
    run(case.config(SCHEDULE, output="written"))
    expected = load_all(case.root / "written" / "model")

    def merged(*overrides: str, output: str, **options: Any) -> list[dict[str, Any]]:
        outcome = run(case.config(SCHEDULE, *overrides, output=output), **options)
        if outcome.model is not None:
            assert_same_bits(expected, load_all(outcome.model))
        return list(read_events(outcome.run / "events.jsonl"))

    return merged


def on_disk(case: MergeCase, output: str) -> list[int]:
    root = case.root / output / "states"
    return sorted(int(p.name) for p in root.iterdir()) if root.is_dir() else []


def written(events: list[dict[str, Any]]) -> list[int]:
    return [event["iteration"] for event in events if event["event"] == "state_written"]


@pytest.mark.parametrize(
    "places",
    [(), ("runtime.residency=host",), ("runtime.layer_shards=2", "runtime.lookahead=0")],
    ids=["device", "host", "two shards"],
)
def test_what_is_kept_is_written_and_nothing_else(
    case: MergeCase, merged: Any, places: tuple[str, ...]
) -> None:
    events = merged(*places, "keep_states=none", NEVER, output="none")
    assert (written(events), on_disk(case, "none")) == ([], [])
    done = [e for e in events if e["event"] == "iteration_finished"]
    assert [e["bytes_written"] for e in done] == [0] * 5
    events = merged(*places, "keep_states=last", NEVER, output="last")
    assert on_disk(case, "last") == [5]
    events = merged(*places, "keep_states=all", output="all")
    assert (written(events), on_disk(case, "all")) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    sizes = [e["num_bytes"] for e in events if e["event"] == "state_written"]
    assert sizes == [e["bytes_written"] for e in events if e["event"] == "iteration_finished"]
    for iteration in range(1, 6):
        name = f"states/{iteration:04d}"
        assert_same_bits(load_all(case.root / "written" / name), load_all(case.root / "all" / name))


def test_recovery_points_go_once_they_are_not_needed(case: MergeCase, merged: Any) -> None:
    events = merged("keep_states=none", "runtime.recovery_every=2", output="run")
    # Iteration 3 reads the states 1 and 2; 5 reads 3 and 4.
    assert written(events) == [1, 2, 3, 4]
    assert on_disk(case, "run") == []


def lose(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Have the first wait for an iteration end with an error."""
    watch, lost = Sweep._watch, []

    def watched(self: Sweep, flight: Any) -> None:
        watch(self, flight)
        if flight.plan.iteration == at and not lost:
            lost.append(at)
            raise error

    monkeypatch.setattr(Sweep, "_watch", watched)


@pytest.mark.parametrize(
    ("every", "at", "first"),
    # After 3 iterations, 2 and 3 are on disk, which iteration 4 reads.
    [("never", 4, 1), ("3", 5, 4), ("3", 3, 1), ("1", 5, 5)],
)
def test_a_lost_shard_costs_what_is_in_no_recovery_point(
    merged: Any, monkeypatch: pytest.MonkeyPatch, every: str, at: int, first: int
) -> None:
    lose(monkeypatch, at, ShardLostError("a layer shard was lost", got="node 2"))
    settings = ("keep_states=none", f"runtime.recovery_every={every}", "runtime.lookahead=1")
    events = merged(*settings, output="run")
    starts = [e["first_iteration"] for e in events if e["event"] == "run_started"]
    assert starts == [1, first]
    said = [e["message"] for e in events if e["event"] == "warning"]
    assert [text for text in said if "they were in memory alone" in text] or every == "1"


@pytest.mark.parametrize(("every", "first"), [("never", 1), ("3", 4)])
def test_a_killed_run_goes_on_from_its_recovery_point(
    case: MergeCase, merged: Any, monkeypatch: pytest.MonkeyPatch, every: str, first: int
) -> None:
    settings = ("keep_states=none", f"runtime.recovery_every={every}", "runtime.lookahead=0")
    with monkeypatch.context() as patched:
        lose(patched, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merged(*settings, output="run")
    events = merged(*settings, output="run")
    starts = [e["first_iteration"] for e in events if e["event"] == "run_started"]
    assert starts == [1, first]
    assert on_disk(case, "run") == []


@pytest.mark.parametrize("halt", [1, 3])
def test_a_halted_run_goes_on_where_it_halted(case: MergeCase, merged: Any, halt: int) -> None:
    settings = ("keep_states=none", NEVER)
    merged(*settings, output="run", stop_after=halt)
    assert on_disk(case, "run") == {1: [1], 3: [2, 3]}[halt]
    events = merged(*settings, output="run")
    starts = [e["first_iteration"] for e in events if e["event"] == "run_started"]
    assert starts == [1, halt + 1]
    assert on_disk(case, "run") == []


def test_a_recovery_point_that_has_no_room_is_left_out(
    case: MergeCase, merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = list[object]()
    writing, results = StateStorage.writing, publisher.get_results

    def recorded(self: StateStorage, iteration: int) -> Any:
        refs = writing(self, iteration)
        full.extend(refs if iteration == 2 else [])
        return refs

    def get_results(refs: list[Any], *more: Any) -> list[Any]:
        if set(refs) & set(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return results(refs, *more)

    monkeypatch.setattr(StateStorage, "writing", recorded)
    monkeypatch.setattr(publisher, "get_results", get_results)
    events = merged("keep_states=none", "runtime.recovery_every=2", output="run")
    assert written(events) == [1, 3, 4]
    assert on_disk(case, "run") == []
    said = [e["message"] for e in events if e["event"] == "warning"]
    assert (
        "iteration 2 cannot be written for recovery: No space left on device; the merge goes on "
        "without"
    ) in said


def test_a_state_that_was_asked_for_has_to_be_written(
    merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fill_disk_at(patched, 2)
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            merged("keep_states=all", "runtime.lookahead=0", output="run")
    # The one before is there, and the run goes on from it.
    events = merged("keep_states=all", output="run")
    assert [e["first_iteration"] for e in events if e["event"] == "run_started"] == [1, 2]


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    write = MadeStates._write

    def full(self: MadeStates, directory: Path, *more: Any) -> Any:
        if directory.name == f"{iteration:04d}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, directory, *more)

    monkeypatch.setattr(MadeStates, "_write", full)


def test_the_best_state_stays_although_no_iteration_reads_it(case: MergeCase) -> None:
    case.make()
    schedule = "schedule={anchor_iterations: 4, max_iterations: 4, tolerance: 0.0, step: fixed}"
    promise = ("select.promise=true", "calibration.format=text")
    for keep in ("all", "none"):
        run(case.config(schedule, *promise, f"keep_states={keep}", NEVER, output=keep))
    chosen = [
        next(e for e in read_events(case.root / keep / "events.jsonl") if e["event"] == name)
        for keep in ("all", "none")
        for name in ("model_selected",)
    ]
    assert chosen[0]["model"] == chosen[1]["model"]
    assert_same_bits(*(load_all(case.root / keep / "model") for keep in ("all", "none")))

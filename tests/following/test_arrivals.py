"""Which checkpoint is merged next, with what, and what attach makes of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import ConfigError, RunDirectoryError
from arm_ray.following.arrivals import choose, members_of, still_needed
from arm_ray.following.config import AttachConfig, MeetingConfig, merge_config, parse_attach_config
from arm_ray.following.journal import Arrival, open_journal
from arm_ray.schedule import plan_iteration


def meeting(**settings: Any) -> MeetingConfig:
    return MeetingConfig(base="base", **settings)


def content(**changes: Any) -> dict[str, Any]:
    return {
        "run": {"path": "/runs/grpo"},
        "merge": {"base": "/models/base", "method": {"operator": "task_arithmetic"}},
        "publish": {"dir": "/published", "promote": "always"},
        **changes,
    }


def merging(**keys: Any) -> dict[str, Any]:
    return {"base": "/models/base", "method": {"operator": "task_arithmetic"}, **keys}


def test_the_newest_checkpoints_meet() -> None:
    assert members_of(meeting(), [10, 20, 30]) == (20, 30)
    assert members_of(meeting(candidates=1), [10, 20, 30]) == (30,)
    assert members_of(meeting(candidates=4), [10, 20, 30]) == ()


def test_anchors_stay() -> None:
    settings = meeting(mode="anchored", candidates=3)
    assert members_of(settings, [10, 20, 30]) == (10, 20, 30)
    assert members_of(settings, [10, 20, 30, 40, 50]) == (10, 20, 50)


def test_a_window_takes_the_new_checkpoint_alone() -> None:
    assert members_of(meeting(streaming="window", candidates=3), [10, 20]) == (20,)


def test_the_newest_is_taken_and_older_ones_are_passed_over() -> None:
    choice = choose(meeting(), [10, 20, 30, 40], [20, 30, 40], [])
    assert (choice.step, choice.members, choice.skipped) == (40, (30, 40), (20, 30))


def test_what_was_there_at_the_start_goes_in_order() -> None:
    choice = choose(meeting(), [10, 20, 30, 40], [20, 30, 40], [20, 30])
    assert (choice.step, choice.members, choice.skipped) == (20, (10, 20), ())
    choice = choose(meeting(), [10, 20, 30, 40], [40], [20, 30])
    assert (choice.step, choice.members) == (40, (30, 40))


def test_the_first_checkpoints_wait_for_company() -> None:
    assert choose(meeting(), [10], [10], []).step is None
    assert choose(meeting(), [10], [10], [10]).step is None
    # The first of two cannot be merged by itself, the second can; nothing is passed over.
    assert choose(meeting(), [10, 20], [10, 20], [10, 20]).step == 20
    assert choose(meeting(), [], [], []).step is None


@pytest.mark.parametrize("streaming", ["anchor", "window", "none"])
@pytest.mark.parametrize("mode", ["window", "anchored"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_kept_suffices_for_all_that_may_come(streaming: str, mode: str, count: int) -> None:
    settings = meeting(streaming=streaming, mode=mode, candidates=count)
    everything = list(range(10, 100, 10))
    held: set[int] = set()
    for step in everything:
        held.add(step)
        met = choose(settings, held, [step], [])
        if met.step is not None:
            expected = members_of(settings, [s for s in everything if s <= step])
            assert met.members == expected
        held &= still_needed(settings, held, [])
    assert len(held) <= max(count, 1) + 1


def test_waiting_checkpoints_keep_those_they_meet() -> None:
    assert still_needed(meeting(), [10, 20, 30, 40, 50], [30]) == {20, 30, 40, 50}
    assert still_needed(meeting(streaming="window"), [10, 20, 30], [10]) == {10, 30}


def config(**changes: Any) -> AttachConfig:
    return parse_attach_config(content(**changes))


def test_a_stream_goes_on_from_its_last_state() -> None:
    first = merge_config(config(), 1, "0001-step-000020", ["c10", "c20"], [])
    plan = plan_iteration(first.schedule, 2, 1)
    assert (plan.reference, plan.contributors) == ("base", ("candidate-1", "candidate-2"))
    assert (first.initial_state, first.schedule.max_iterations, plan.draw) == (None, 1, 1)
    second = merge_config(config(), 2, "0002-step-000030", ["c20", "c30"], ["state-1"])
    plan = plan_iteration(second.schedule, 2, 1)
    assert (plan.reference, plan.divisor, plan.draw) == ("initial", 2, 2)
    assert second.initial_state == "state-1"
    assert second.base == "/models/base"
    assert second.output == str(Path("/published/work/merges/0002-step-000030"))


def test_a_window_of_merged_states_and_the_new_checkpoint() -> None:
    given = config(merge=merging(streaming="window", candidates=3))

    def members(number: int, states: list[str]) -> tuple[list[str], int]:
        made = merge_config(given, number, "x", [f"c{number}"], states)
        plan = plan_iteration(made.schedule, len(made.candidates), 1)
        names = {f"candidate-{i + 1}": path for i, path in enumerate(made.candidates)}
        names["base"] = "base"
        return [names[name] for name in plan.inputs], plan.divisor

    assert members(1, []) == (["base", "c1"], 2)
    assert members(2, ["s1"]) == (["base", "s1", "c2"], 3)
    assert members(3, ["s1", "s2"]) == (["s1", "s2", "c3"], 3)
    assert members(4, ["s1", "s2", "s3"]) == (["s2", "s3", "c4"], 3)


def test_a_merge_afresh_has_a_schedule_of_its_own() -> None:
    given = config(merge=merging(streaming="none", schedule={"max_iterations": 5}))
    made = merge_config(given, 7, "x", ["c1", "c2"], [])
    assert (made.schedule.max_iterations, made.schedule.offset, made.initial_state) == (5, 0, None)


def test_steps_are_searched_and_attach_itself_compares() -> None:
    samples = {"path": "texts.jsonl"}
    given = config(merge=merging(calibration=samples))
    made = merge_config(given, 2, "x", ["c1", "c2"], ["state-1"])
    assert made.schedule.step == "subspace"
    # The next arrival goes on from the state, also where it is worse than a checkpoint.
    assert not made.promises
    fixed = config(merge=merging(calibration=samples, schedule={"step": "fixed"}))
    assert merge_config(fixed, 1, "x", ["c1", "c2"], []).schedule.step == "fixed"
    asked = config(merge=merging(calibration=samples, select={"promise": True}))
    assert merge_config(asked, 1, "x", ["c1", "c2"], []).promises


@pytest.mark.parametrize("name", ["select", "schedule", "runtime"])
def test_a_section_of_the_merge_that_is_none_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be") as caught:
        config(merge=merging(**{name: 5}))
    assert (caught.value.where, caught.value.got) == (f"merge.{name}", "5")


def test_no_gpu_is_taken_unless_asked_for() -> None:
    assert merge_config(config(), 1, "x", ["a", "b"], []).runtime.device == "cpu"
    shared = config(sharing={"use_gpus": True})
    assert merge_config(shared, 1, "x", ["a", "b"], []).runtime.device == "auto"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"publish": {"dir": "/runs/grpo/merged", "promote": "always"}}, "below the directory"),
        ({"output": "/runs/grpo"}, "below the directory"),
        ({"publish": {"dir": "/published"}}, "needs scores"),
        ({"merge": merging(streaming="window", mode="anchored")}, "no meaning"),
        ({"merge": merging(streaming="window", candidates=1)}, "at least 2"),
        ({"merge": merging(schedule={"max_iterations": 3})}, "merge.schedule.max_iterations"),
        ({"merge": merging(output="/x")}, "merge.output: is set by attach"),
        ({"merge": merging(methods={})}, "unknown key"),
        ({"merge": merging(runtime={"device": "cuda"})}, "use_gpus"),
        ({"sharing": {"when_full": "labelled"}}, "needs sharing.resources"),
        ({"run": {"path": "/runs/grpo", "start": "newest"}}, "run.start"),
        ({"run": {"path": "/runs/grpo", "layouts": "hf"}}, "did you mean 'layout'"),
        ({"merge": {"base": "/models/base"}}, "needs calibration|calibration: required"),
    ],
)
def test_wrong_configurations_are_told(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config(**changes)


def test_the_journal_is_what_was_written(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.taken = {10: "a", 20: "b"}
    journal.skipped = [10]
    journal.begin(Arrival(1, 20, "b", ("step-000010", "step-000020"), (), 1))
    again = open_journal(tmp_path)
    assert again == journal
    assert again.unfinished == journal.arrivals[0]
    again.end(outcome="published", value=0.5, checkpoint_value=0.4, is_best=True)
    last = open_journal(tmp_path)
    assert last.unfinished is None
    assert last.best == last.published[-1] == again.arrivals[0]


@pytest.mark.parametrize("text", ["", "{}", '{"arrivals": [{}], "taken": [], "skipped": []}'])
def test_a_broken_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "attach.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        open_journal(tmp_path)

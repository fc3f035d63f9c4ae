"""The output directory: what a merge may go on in, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import TensorSpec, write_json
from arm_ray.config import MergeConfig, load_merge_config, parse_merge_config
from arm_ray.errors import DiskSpaceError, RunDirectoryError
from arm_ray.events import Warned, read_events
from arm_ray.planning.state_life import state_life
from arm_ray.runtime.output.run_directory import RunDirectory, SpaceNeeds, open_run
from arm_ray.runtime.shards.pieces import group_writer
from arm_ray.schedule import iterations_needed_after, plan_iteration

Configure = Callable[..., MergeConfig]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "a" / "run"


@pytest.fixture
def configure(output: Path) -> Configure:
    """A configuration with overrides: 3 anchored iterations, then a window of 2, 6 in all."""

    def configure(*overrides: str, path: Path = output) -> MergeConfig:
        content: dict[str, Any] = {
            "base": "base",
            "candidates": ["one", "two"],
            "output": str(path),
            "method": {"operator": "task_arithmetic"},
        }
        return parse_merge_config(content, overrides)

    return configure


def add_state(config: MergeConfig, iteration: int, finished: bool = True) -> Path:
    """A state of one small group, complete or cut off before its manifest."""
    directory = states.state_directory(Path(config.output), iteration)
    with group_writer(directory, 0, [TensorSpec("w", torch.float32, (3,))]) as writer:
        writer.write("w", 0, torch.full((3,), float(iteration)))
    plan = plan_iteration(config.schedule, len(config.candidates), iteration)
    manifest = states.StateManifest(
        iteration, plan.regime, plan.reference, plan.contributors, 0.9, None
    )
    if finished:
        write_json(directory / states.MANIFEST_NAME, asdict(manifest))
    return directory


def started(config: MergeConfig, iterations: int) -> None:
    """A run that was halted after some iterations."""
    with open_run(config):
        for t in range(1, iterations + 1):
            add_state(config, t)


def tree(path: Path) -> dict[str, Any]:
    """All that is below a directory, with content and times."""
    return {
        str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in sorted(path.rglob("*"))
    }


def refuse(config: MergeConfig, match: str) -> RunDirectoryError:
    with pytest.raises(RunDirectoryError, match=match) as caught, open_run(config):
        pass
    return caught.value


# ---- opening


def test_a_new_directory_is_made_with_the_resolved_configuration(
    configure: Configure, output: Path
) -> None:
    config = configure()
    with open_run(config) as run:
        assert run.path == output
        assert (run.finished, run.last_iteration, run.is_complete) == ({}, 0, False)
        assert load_merge_config(output / "config.yaml") == config
    assert sorted(p.name for p in output.iterdir()) == [".lock", ".run_id", "config.yaml"]


def test_an_empty_directory_is_as_good_as_a_new_one(configure: Configure, output: Path) -> None:
    output.mkdir(parents=True)
    with open_run(configure()) as run:
        assert run.finished == {}
    shutil.rmtree(output)
    output.mkdir()
    # What a run leaves that was stopped before it wrote anything.
    (output / ".lock").touch()
    with open_run(configure()) as run:
        assert run.finished == {}


def test_a_home_directory_is_expanded(configure: Configure, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_run(configure(path=Path("~/mine"))) as run:
        assert run.path == tmp_path / "mine"


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "x"},
        {"config.json": "{}", "model.safetensors": "x"},
        {"config.yaml": "learning_rate: 1"},  # another program's
        {"config.yaml": "- a"},
        {"config.yaml": "base: ["},
        {"states/0001/group-00000.safetensors": "x"},
        {".hidden": "x"},
    ],
    ids=lambda files: "+".join(files),
)
def test_a_foreign_directory_is_not_touched(
    configure: Configure, output: Path, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    before = tree(output)
    error = refuse(configure(), "holds something else than a run")
    assert error.where == str(output)
    assert sorted(files)[0].split("/")[0] in (error.got or "")
    assert tree(output) == before


def test_a_file_is_no_output_directory(configure: Configure, output: Path) -> None:
    output.parent.mkdir()
    output.write_text("mine")
    refuse(configure(), "the output is not a directory")
    assert output.read_text() == "mine"


def test_a_directory_below_a_file_cannot_be_written(configure: Configure, output: Path) -> None:
    output.parent.write_text("mine")
    refuse(configure(), "cannot be written")


def test_a_run_goes_on_where_it_halted(configure: Configure) -> None:
    config = configure()
    started(config, 3)
    with open_run(config) as run:
        assert sorted(run.finished) == [1, 2, 3]
        assert run.last_iteration == 3
        assert run.finished[3].contributors == ("candidate-1", "candidate-2")
        assert run.finished[3].reference == "state-0002"


def test_a_run_of_thousands_of_candidates_goes_on(configure: Configure, output: Path) -> None:
    root = output / ("long" * 40) / "training"
    candidates = [str(root / f"checkpoint-{n}") for n in range(3000)]
    config = configure(f"candidates={json.dumps(candidates)}")
    with open_run(config):
        pass
    assert (output / "config.yaml").stat().st_size > 1 << 19
    with open_run(config):
        pass
    assert load_merge_config(output / "config.yaml").candidates == config.candidates


def test_two_at_once_are_refused(configure: Configure, output: Path) -> None:
    config = configure()
    with open_run(config):
        add_state(config, 1, finished=False)
        before = tree(output)
        refuse(config, "another merge is working")
        after = tree(output)
        # The one that works keeps its half-written state.
        assert {k: v for k, v in after.items() if k != ".lock"} == {
            k: v for k, v in before.items() if k != ".lock"
        }
    with open_run(config):
        pass


def test_the_lock_is_released_when_a_merge_fails(configure: Configure) -> None:
    def fail() -> None:
        with open_run(configure()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with open_run(configure()) as run:
        assert run.finished == {}


def test_what_was_cut_off_is_discarded(configure: Configure, output: Path) -> None:
    config = configure()
    started(config, 2)
    add_state(config, 3, finished=False)
    broken = add_state(config, 4)
    (broken / states.MANIFEST_NAME).write_text('{"iteration": 4, "reg')
    (output / "model.partial").mkdir()
    (output / "model.partial" / "model.safetensors").write_bytes(b"half")
    with open_run(config) as run:
        assert sorted(run.finished) == [1, 2]
    assert sorted(p.name for p in (output / "states").iterdir()) == ["0001", "0002"]
    assert not (output / "model.partial").exists()
    assert states.read_group(output / "states" / "0002", 0, ["w"])["w"].tolist() == [2.0] * 3


# ---- another configuration


def test_another_configuration_is_accepted_while_there_are_no_states(
    configure: Configure, output: Path
) -> None:
    with open_run(configure()):
        add_state(configure(), 1, finished=False)
    changed = configure("method.coefficient=0.5", "base=other")
    with open_run(changed) as run:
        assert run.config.method.coefficient == 0.5
    assert load_merge_config(output / "config.yaml") == changed


def test_another_configuration_is_refused_with_the_difference_once_there_are_states(
    configure: Configure, output: Path
) -> None:
    started(configure(), 1)
    add_state(configure(), 2, finished=False)
    before = tree(output)
    error = refuse(
        configure("method.coefficient=0.5", "runtime.layer_shards=3", "candidates=[one]"),
        "another configuration",
    )
    assert error.got is not None
    assert [line.strip() for line in error.got.strip().splitlines()] == [
        "candidates: ['one', 'two'] -> ['one']",
        "method.coefficient: 0.7 -> 0.5",
    ]
    assert tree(output) == before


def test_a_finished_model_counts_although_its_states_are_gone(
    configure: Configure, output: Path
) -> None:
    with open_run(configure()):
        (output / "model").mkdir()
    refuse(configure("schedule.max_iterations=7"), "another configuration")
    with open_run(configure()) as run:
        assert run.is_complete


def test_settings_without_influence_may_change_in_the_middle(
    configure: Configure, output: Path
) -> None:
    started(configure(), 2)
    changed = configure("runtime.layer_shards=4", "keep_states=last")
    with open_run(changed) as run:
        assert run.last_iteration == 2
    assert load_merge_config(output / "config.yaml") == changed


def test_a_moved_run_goes_on(configure: Configure, output: Path, tmp_path: Path) -> None:
    started(configure(), 2)
    output.rename(tmp_path / "moved")
    with open_run(configure(path=tmp_path / "moved")) as run:
        assert run.last_iteration == 2


# ---- inputs


def test_inputs_are_recorded_and_compared(configure: Configure, output: Path) -> None:
    config = configure()
    with open_run(config) as run:
        run.record_inputs({"base": "b1", "candidate-1": "c1"})
        assert json.loads((output / "inputs.json").read_text()) == {
            "base": "b1",
            "candidate-1": "c1",
        }
        add_state(config, 1)
    with open_run(config) as run:
        run.record_inputs({"base": "b1", "candidate-1": "c1"})
        with pytest.raises(RunDirectoryError, match="go on: base, candidate-1 changed since"):
            run.record_inputs({"base": "b2", "candidate-1": "c2"})
        run.record_inputs({"base": "b1", "candidate-1": "c1"})


def test_inputs_that_are_recorded_one_after_another_are_all_remembered(
    configure: Configure,
) -> None:
    # As a merge does it: the checkpoints first, the calibration data when Ray has read it.
    config = configure()
    with open_run(config) as run:
        run.record_inputs({"base": "b1", "candidate-1": "c1"})
        run.record_inputs({"calibration": "d1"})
        add_state(config, 1)
    for changed in ({"base": "b2", "candidate-1": "c1"}, {"calibration": "d2"}):
        with open_run(config) as run, pytest.raises(RunDirectoryError, match="changed since"):
            run.record_inputs(changed)


def test_inputs_may_change_while_there_are_no_states(configure: Configure, output: Path) -> None:
    with open_run(configure()) as run:
        run.record_inputs({"base": "b1", "calibration": "d1"})
    with open_run(configure()) as run:
        run.record_inputs({"base": "b2"})
        add_state(configure(), 1)
    assert json.loads((output / "inputs.json").read_text())["base"] == "b2"
    with open_run(configure()) as run:
        run.record_inputs({"base": "b2"})


# ---- pruning


def kept(output: Path) -> list[int]:
    return sorted(int(p.name) for p in (output / "states").iterdir())


@pytest.mark.parametrize("keep", ["last", "none"])
def test_pruning_keeps_what_later_iterations_need(
    configure: Configure, output: Path, keep: str
) -> None:
    config = configure(f"keep_states={keep}")
    left = []
    with open_run(config) as run:
        for t in range(1, 7):
            add_state(config, t)
            run.prune(iterations_needed_after(config.schedule, 2, t), t)
            left.append(kept(output))
    assert left == [[1], [2], [2, 3], [3, 4], [4, 5], [6]]


def test_pruning_of_a_window_of_three(configure: Configure, output: Path) -> None:
    config = configure(
        "keep_states=last",
        "schedule={anchor_iterations: 0, window_size: 3, max_iterations: 5}",
    )
    left = []
    with open_run(config) as run:
        for t in range(1, 6):
            add_state(config, t)
            run.prune(iterations_needed_after(config.schedule, 2, t), t)
            left.append(kept(output))
    assert left == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [5]]


def test_nothing_is_pruned_unless_asked(configure: Configure, output: Path) -> None:
    config = configure("keep_states=all")
    with open_run(config) as run:
        for t in range(1, 7):
            add_state(config, t)
            run.prune({t}, t)
    assert kept(output) == [1, 2, 3, 4, 5, 6]


def test_pruning_leaves_the_state_that_is_being_written(configure: Configure, output: Path) -> None:
    config = configure("keep_states=last")
    with open_run(config) as run:
        for t in range(1, 6):
            add_state(config, t, finished=t < 5)
        run.prune(iterations_needed_after(config.schedule, 2, 4), 4)
    assert kept(output) == [3, 4, 5]


def test_pruning_does_not_trip_over_what_others_left_there(
    configure: Configure, output: Path
) -> None:
    config = configure("keep_states=last")
    with open_run(config) as run:
        for t in range(1, 5):
            add_state(config, t)
        (output / "states" / ".DS_Store").touch()
        run.prune(iterations_needed_after(config.schedule, 2, 4), 4)
    names = sorted(p.name for p in (output / "states").iterdir())
    assert names == [".DS_Store", "0003", "0004"]


# ---- disk space

Usage = namedtuple("Usage", "total used free")


def room(config: MergeConfig) -> SpaceNeeds:
    """States of 10 GB and a model of 5 GB, of a merge with forward passes."""
    return SpaceNeeds(10 * 10**9, 5 * 10**9, 2, state_life(config, 2, None))


def free_space(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**15, 0, int(free)))


def fits(run: RunDirectory) -> bool:
    """Whether states of 10 GB and a model of 5 GB fit."""
    try:
        run.check_disk_space(room(run.config))
    except DiskSpaceError:
        return False
    return True


@pytest.mark.parametrize(
    ("overrides", "finished", "states_to_come"),
    [
        ((), 0, 0),  # none is written
        (("keep_states=last",), 0, 1),
        (("keep_states=last",), 6, 0),
        (("keep_states=all",), 0, 6),
        (("keep_states=all",), 2, 4),
        (("keep_states=all",), 6, 0),
        (("runtime.residency=disk",), 0, 5),  # two kept, and three being written
        (("runtime.residency=disk", "runtime.lookahead=0"), 0, 3),
        (("runtime.residency=disk",), 5, 1),
        (("runtime.residency=disk", "schedule.anchor_iterations=6"), 0, 4),
        (("runtime.residency=disk", "schedule.max_iterations=1"), 0, 1),
    ],
)
def test_the_disk_has_to_hold_the_states_to_come_and_the_model(
    configure: Configure,
    monkeypatch,
    overrides: tuple[str, ...],
    finished: int,
    states_to_come: int,
) -> None:
    config = configure(*overrides)
    started(config, finished)
    with open_run(config) as run:
        needed = states_to_come * 10e9 + 5e9
        free_space(monkeypatch, needed)
        assert fits(run)
        free_space(monkeypatch, needed - 1)
        assert not fits(run)


def test_a_full_disk_says_how_much_is_missing(
    configure: Configure, output: Path, monkeypatch
) -> None:
    free_space(monkeypatch, 21.5e9)
    with (
        open_run(configure("keep_states=all")) as run,
        pytest.raises(DiskSpaceError, match="not enough room") as caught,
    ):
        run.check_disk_space(room(run.config))
    error = caught.value
    assert (error.where, error.got) == (str(output), "21.50 GB free")
    assert error.expected == (
        "65.00 GB: 6 states of 10.00 GB and the model of 5.00 GB; 43.50 GB are missing"
    )
    assert "keep_states: none" in (error.hint or "")


# ---- events


def test_events_are_appended_over_openings(configure: Configure, output: Path) -> None:
    for number in (1, 2):
        with open_run(configure()) as run:
            run.events.write(Warned(f"message {number}"))
    records = read_events(output / "events.jsonl")
    assert [(r["event"], r["message"]) for r in records] == [
        ("warning", "message 1"),
        ("warning", "message 2"),
    ]
    assert records[0]["time"] <= records[1]["time"]


def test_a_line_that_was_cut_off_does_not_swallow_the_next(
    configure: Configure, output: Path
) -> None:
    with open_run(configure()) as run:
        run.events.write(Warned("first"))
    with (output / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "warn')
    assert [r["message"] for r in read_events(output / "events.jsonl")] == ["first"]
    with open_run(configure()) as run:
        run.events.write(Warned("after the crash"))
    messages = [r["message"] for r in read_events(output / "events.jsonl")]
    assert messages == ["first", "after the crash"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(configure: Configure, output: Path) -> None:
    output.mkdir(parents=True)
    output.chmod(0o500)
    try:
        refuse(configure(), "cannot be written")
    finally:
        output.chmod(0o700)

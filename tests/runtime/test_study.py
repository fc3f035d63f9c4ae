"""A grid of trainings, merges and scorings, each done once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from arm_ray.config import validate
from arm_ray.errors import ConfigError, NumericalError
from arm_ray.evaluation.records import read_records
from arm_ray.events import read_events
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.study import run as study_run
from arm_ray.runtime.study.run import StudyOutcome, render_study, run_study
from arm_ray.study.config import StudyConfig
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.studies import content, training

pytestmark = pytest.mark.usefixtures("shards_in_process", "trainers", "engines")
IN_PROCESS = pytest.mark.parametrize(
    ("trainers", "engines"), [("in process", "plain")], indirect=True
)


def run(given: dict[str, Any]) -> StudyOutcome:
    config = validate(StudyConfig, given, source="test")
    return run_study(config, source="test", console=Console(quiet=True))


def rows_of(given: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        Path(given["output"]) / "results.parquet"
    ).to_pylist()
    return rows


def events_of(given: dict[str, Any], name: str) -> list[dict[str, Any]]:
    events = read_events(Path(given["output"]) / "events.jsonl")
    return [event for event in events if event["event"] == name]


@IN_PROCESS
def test_a_grid_over_a_run_that_is_there(case: MergeCase) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(
        case,
        tables={"main": {"rows": ["operator"], "show": ["base", "checkpoints"]}},
        figures={"main": {"x": "operator", "kind": "bars", "show": ["base"]}},
    )
    # Without activations the order of the samples makes no other merge.
    given["axes"]["calibration_seed"] = [0, 1]
    done = run(given)
    assert done.failed == {}
    assert (len(done.study.cells), len(done.study.merges)) == (4, 3)
    rows = rows_of(given)
    assert [row["kind"] for row in rows] == ["base", *["checkpoint"] * 2, *["merged"] * 4]
    assert len({row["mean"] for row in rows}) == 6
    out = Path(given["output"])
    # By hand: the mean of each model is its nats over its tokens, and differences are paired.
    for row in rows:
        records = read_records(out / "scores" / row["model"], "held")
        nats = sum(r.scores["loss"] for r in records)
        tokens = sum(r.num_tokens for r in records)
        assert row["mean"] == pytest.approx(nats / tokens)
        assert row["n"] == len(records) == 6
        if row["kind"] == "merged":
            assert row["base_difference"] == pytest.approx(row["mean"] - rows[0]["mean"])
            best = min(rows[1:3], key=lambda r: r["mean"])
            assert row["best_checkpoint"] == best["model"]
            assert row["last_candidate_difference"] == pytest.approx(row["mean"] - rows[2]["mean"])
            assert row["base_low"] <= row["base_difference"] <= row["base_high"]
            assert row["iterations"] == 1
            assert row["seconds"] > 0.0
            assert len(row["digest"]) == 64
        assert row["arm_ray"]
        assert row["cpu"]
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == [row["model"] for row in rows]
    # The weights of what is scored are gone; the table is there.
    assert not list(out.glob("cells/*/run/model"))
    table = (out / "tables/main.md").read_text()
    assert "| operator | held |" in table
    assert "checkpoint 20" in table
    assert (out / "figures/main.svg").stat().st_size > 1000

    # Again: nothing is merged or scored once more, and the files are the same.
    before = {path: path.read_bytes() for path in out.rglob("*.*") if "events" not in path.name}
    merged, scored = (events_of(given, name) for name in ("cell_finished", "model_scored"))
    again = run(given)
    assert again.failed == {}
    assert events_of(given, "cell_finished") == merged
    assert events_of(given, "model_scored") == scored
    assert {path: path.read_bytes() for path in before} == before

    # Rendered anew from what is there.
    shutil.rmtree(out / "tables")
    render_study(validate(StudyConfig, given, source="test"))
    assert (out / "tables/main.md").read_text() == table

    # Another task: models that are gone are merged again, and only they.
    given["evaluation"]["tasks"].append({**given["evaluation"]["tasks"][0], "name": "more"})
    assert run(given).failed == {}
    assert len(events_of(given, "cell_finished")) == 2 * len(merged)
    assert {row["task"] for row in rows_of(given)} == {"held", "more"}


@IN_PROCESS
def test_series_are_trained_for_each_seed_and_from_a_merge(case: MergeCase) -> None:
    case.make("smollm2", count=0, sizes=SERVED)
    train = training(case)
    given = content(
        case,
        series={
            "first": {"train": train},
            "second": {
                "train": {**train, "steps": 2},
                "start_from": {"series": "first", "operator": "arm"},
            },
        },
        checkpoints={"first": [3]},
        tables={
            "gain": {
                "rows": ["series", "operator"],
                "value": "difference",
                "against": "best_checkpoint",
            },
            "loss": {"rows": ["series", "operator"], "show": ["base", "checkpoints"]},
        },
    )
    given["axes"] |= {"seed": [0, 1], "candidates": {"first": [[1, 2]], "second": [[1]]}}
    done = run(given)
    assert done.failed == {}
    trained = events_of(given, "series_trained")
    assert [(e["series"], e["seed"], e["error"]) for e in trained] == [
        ("first", 0, None), ("first", 1, None), ("second", 0, None), ("second", 1, None),
    ]  # fmt: skip
    rows = rows_of(given)
    starts = {
        row["model"]: row for row in rows if row["kind"] == "base" and row["seed"] is not None
    }
    assert len(starts) == 2
    for seed in (0, 1):
        [start] = [m for m, row in starts.items() if row["seed"] == seed]
        [same] = [
            row for row in rows
            if (row["kind"], row["series"], row["seed"], row["operator"])
            == ("merged", "first", seed, "arm")
        ]  # fmt: skip
        assert same["model"] == start
    # No further than to the last step that is used.
    saved = done.study.output.glob("trainings/first-seed0-*/checkpoint-*")
    assert sorted(p.name for p in saved) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    # Pooled over seeds: the mean of what each seed gives, as both have the same tokens.
    table = (done.study.output / "tables/gain.md").read_text()
    found = [
        row["best_checkpoint_difference"]
        for row in rows
        if row["kind"] == "merged" and (row["series"], row["operator"]) == ("first", "arm")
    ]
    assert f"| first | arm | {np.mean(found):+.4f} [" in table
    assert "problems and runs" in table


@IN_PROCESS
def test_a_cell_that_fails_is_written_down_and_the_others_are_done(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, report_pages: None
) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case, tables={"main": {"rows": ["operator"]}})

    merged: list[str] = []
    breaks = [True]

    def failing(config: Any, **options: Any) -> Any:
        merged.append(config.method.operator)
        if config.method.operator == "arm" and breaks[0]:
            raise NumericalError("the weights are not finite")
        return merge(config, **options)

    monkeypatch.setattr("arm_ray.runtime.study.merging.merge", failing)
    done = run(given)
    assert [*done.failed.values()] == ["the weights are not finite"]
    rows = {row["operator"]: row for row in rows_of(given) if row["kind"] == "merged"}
    assert (rows["arm"]["state"], rows["arm"]["mean"]) == ("failed", None)
    assert rows["arm"]["error"] == "the weights are not finite"
    assert (rows["ta"]["state"], math.isfinite(rows["ta"]["mean"])) == ("scored", True)
    assert "1 cells failed" in (done.study.output / "tables/main.md").read_text()
    page = (done.study.output / "report.html").read_text(encoding="utf-8")
    assert f"{done.study.merge_of(done.study.cells[0]).name}" in page
    assert [*done.study.output.rglob("report.html")] == [done.study.output / "report.html"]
    # Only what failed is tried again.
    merged.clear()
    breaks[0] = False
    assert run(given).failed == {}
    assert merged == ["arm"]
    rows = {row["operator"]: row for row in rows_of(given) if row["kind"] == "merged"}
    assert (rows["arm"]["state"], math.isfinite(rows["arm"]["mean"])) == ("scored", True)


@IN_PROCESS
def test_it_goes_on_where_it_was_stopped(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case, batch=1)
    calls: list[str] = []

    def stopping(config: Any, **options: Any) -> Any:
        calls.append(config.method.operator)
        outcome = merge(config, **options)
        if config.method.operator == "arm" and calls.count("arm") == 1:
            # As a kill: the model is there, and nothing is written down of it.
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr("arm_ray.runtime.study.merging.merge", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(given)
    # The batch before was scored, and written.
    [row] = [row for row in rows_of(given) if row["kind"] == "merged"]
    assert row["operator"] == "ta"
    done = run(given)
    assert done.failed == {}
    assert calls == ["task_arithmetic", "arm", "arm"]
    models = [event["model"] for event in events_of(given, "model_scored")]
    assert len(models) == len(set(models)) == 5
    [arm] = [m for m in done.study.merges.values() if m.config.method.operator == "arm"]
    finished = [e for e in read_events(Path(arm.config.output) / "events.jsonl")
                if e["event"] == "iteration_finished"]  # fmt: skip
    assert len(finished) == 1


@IN_PROCESS
def test_a_model_that_cannot_be_scored_keeps_no_other_from_it(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case)
    from tests.doubles.plain_engine import PlainEngine

    load = PlainEngine.load

    def failing(self: Any, source: Any, version: str) -> Any:
        if "checkpoint-10" in source.path:
            raise ValueError("no")
        return load(self, source, version)

    monkeypatch.setattr(PlainEngine, "load", failing)
    done = run(given)
    assert [*done.failed] == ["given-10"]
    rows = rows_of(given)
    assert [row["state"] for row in rows] == ["scored", "failed", "scored", "scored", "scored"]
    monkeypatch.setattr(PlainEngine, "load", load)
    assert run(given).failed == {}
    assert len(events_of(given, "cell_finished")) == 2


@IN_PROCESS
@pytest.mark.minutes
def test_cells_are_merged_at_once(case: MergeCase) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case, parallel=2, keep_models=True)
    given["axes"]["operator"]["bad"] = {"method.operator": "arm", "calibration.path": "nowhere"}
    done = run(given)
    [(failed, error)] = done.failed.items()
    assert "bad" in failed
    assert "nowhere" in error
    for found in done.study.merges.values():
        if found.name != failed:
            assert "iteration 1/1" in (found.directory / "log.txt").read_text()
            assert found.model.is_dir()


@IN_PROCESS
def test_merges_in_processes_are_ended_with_the_study(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2", sizes=SERVED)
    started: list[Any] = []

    class Process:
        returncode = None

        def __init__(self, *_arguments: Any, **_options: Any) -> None:
            started.append(self)

        def poll(self) -> int | None:
            # The second one sees Ctrl-C.
            if len(started) == 2 and self is started[1]:
                raise KeyboardInterrupt
            return self.returncode

        def terminate(self) -> None:
            self.returncode = -15

        def wait(self, _timeout: float = 0.0) -> int:
            assert self.returncode == -15
            return -15

    monkeypatch.setattr("arm_ray.runtime.study.merging.subprocess.Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        run(content(case, parallel=2))
    assert [process.returncode for process in started] == [-15, -15]
    request = json.loads(next((case.root / "out/cells").glob("*/request.json")).read_text())
    # Half of the test's Ray is the other's.
    assert request["reserved"]["CPU"] == 3.0


@IN_PROCESS
def test_what_is_not_there_is_told_before_anything_starts(case: MergeCase) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case)
    given["series"]["given"]["checkpoints"][20] = str(case.root / "nowhere")
    with pytest.raises(ConfigError, match="1 checkpoints are not there"):
        run(given)
    assert not (case.root / "out").exists()


@IN_PROCESS
def test_runs_of_one_base_are_merged_with_each_other(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2", sizes=SERVED)
    given = content(case)
    given["series"]["own"] = {"train": training(case)}
    own = {"series": "own", "step": 4}
    given["series"]["mixed"] = {"checkpoints": {1: own, 2: {"series": "given", "step": 20}}}
    other = case.root / "other.jsonl"
    shutil.copy(case.root / "calibration.jsonl", other)
    given["series"]["mixed"]["merge"] = {"calibration.path": str(other)}
    given["axes"]["candidates"] = {"given": [[10, 20]], "own": [[4]], "mixed": [[1, 2]]}
    kept_apart: list[str] = []
    real = study_run.train_stage

    def train_stage(config: Any, files: Any, *others: Any) -> Any:
        kept_apart.extend(files.values())
        return real(config, files, *others)

    monkeypatch.setattr(study_run, "train_stage", train_stage)
    done = run(given)
    assert not done.failed
    # What a merge of the run's checkpoints with others reads is no data to train on.
    assert str(other) in kept_apart
    rows = [row for row in rows_of(given) if row["series"] == "mixed"]
    assert [row["candidates"] for row in rows if row["kind"] == "merged"] == ["1+2", "1+2"]
    [last] = {row["last_candidate"] for row in rows if row["kind"] == "merged"}
    models = {row["model"]: row["checkpoint"] for row in rows_of(given) if row["series"] == "given"}
    assert models[last] == 20
    for row in rows:
        if row["kind"] == "merged":
            merged = next(m for m in done.study.merges.values() if m.name == row["model"])
            assert Path(merged.config.candidates[0]).parent.name.startswith("own")

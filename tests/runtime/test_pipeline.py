"""Training, merging and scoring in one go."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from arm_ray.config import validate
from arm_ray.errors import ArmRayError, ConfigError
from arm_ray.events import read_events
from arm_ray.report.verdict import verdict
from arm_ray.runtime.pipeline import run_pipeline
from arm_ray.training.pipeline import PipelineConfig, Stages
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.pipelines import content


def parsed(given: dict[str, Any]) -> PipelineConfig:
    return validate(PipelineConfig, given, source="test")


@pytest.mark.usefixtures("shards_in_process", "trainers", "engines")
@pytest.mark.parametrize(
    ("trainers", "engines"),
    [
        ("in process", "plain"),
        pytest.param("ray train", "vllm", marks=pytest.mark.minutes),
    ],
    indirect=True,
)
def test_a_series_is_trained_merged_and_scored(case: MergeCase, report_pages: None) -> None:
    case.make("smollm2", count=0, sizes=SERVED)
    given = content(case)
    scores = run_pipeline(parsed(given), console=Console(quiet=True))
    assert [*scores] == [
        "base",
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "ARM",
        "mean of two",
    ]
    losses = {name: tasks["held"].metrics["loss"].mean for name, tasks in scores.items()}
    assert losses["checkpoint-6"] < losses["base"]
    assert len(set(losses.values())) == len(losses)
    parts = [
        set((case.root / f"out/data/{name}.jsonl").read_text().splitlines())
        for name in ("train", "calibration", "held")
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 60
    stages = [
        e["stage"]
        for e in read_events(case.root / "out" / "events.jsonl")
        if e["event"] == "stage_finished"
    ]
    assert stages == [
        "data", "training", "ARM", "mean of two", "scores", "training on", "scores of all",
    ]  # fmt: skip

    page = (case.root / "out" / "report.html").read_text(encoding="utf-8")
    settings = parsed(given).evaluation
    told = verdict(scores, case.root / "out/evaluation", {"ARM", "mean of two"}, settings)
    assert told in page

    # Again: nothing is trained, merged or scored once more.
    files = {p: p.stat().st_mtime_ns for p in (case.root / "out").rglob("*.safetensors")}
    console = Console(record=True, file=io.StringIO(), width=200)
    again = run_pipeline(parsed(given), console=console)
    text = console.export_text()
    assert text.count("nothing to do") == 3
    assert text.count("This run is complete") == 2
    assert {m: s["held"].metrics for m, s in again.items()} == {
        m: s["held"].metrics for m, s in scores.items()
    }
    assert {p: p.stat().st_mtime_ns for p in files} == files


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"candidates": [2, 3]}, "no checkpoint is saved at step 3"),
        ({"merges": {"a b": {}, "a-b": {}}}, "same directory"),
        ({"merges": {"//": {}}}, "used for a directory"),
        ({"merges": {"ARM": {"base": "x"}}}, "'base' is set by the pipeline"),
        ({"merges": {"ARM": {"schedule": {"max_iteration": 1}}}}, "max_iterations"),
        ({"job": "sft", "train": {"learning_rate": 1.0, "output": "x"}}, "'output' is set by"),
        ({"data": {"path": "x", "shares": {"calibration": 1.0}}}, "no part 'train'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_starts(
    case: MergeCase, change: dict[str, Any], text: str
) -> None:
    case.make("smollm2", count=0)
    with pytest.raises(ConfigError, match=text):
        Stages(parsed({**content(case), **change}), "test")
    assert not (case.root / "out").exists()


def test_training_on_needs_what_it_goes_on_from(case: MergeCase) -> None:
    case.make("smollm2", count=0)
    given = content(case)
    given["train"] |= {"save_optimizer": False}
    with pytest.raises(ConfigError, match="optimizer's state"):
        Stages(parsed(given), "test")
    given["train"] |= {"save_optimizer": True, "save_total_limit": 1}
    with pytest.raises(ConfigError, match="would be removed"):
        Stages(parsed(given), "test")


@pytest.mark.usefixtures("trainers")
@pytest.mark.parametrize("trainers", ["in process"], indirect=True)
def test_another_split_of_the_same_output_is_refused(case: MergeCase) -> None:
    case.make("smollm2", count=0)
    given = content(case, evaluation={"tasks": [{"name": "held", "type": "loss", "path": "no"}]})
    with pytest.raises(ArmRayError):
        run_pipeline(parsed(given), console=Console(quiet=True))
    given["data"]["seed"] = 1
    with pytest.raises(ArmRayError, match="split otherwise"):
        run_pipeline(parsed(given), console=Console(quiet=True))

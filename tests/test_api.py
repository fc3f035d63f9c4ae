"""The functions of the package: configurations, overrides, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import arm_ray
from arm_ray.config import MergeConfig, load_merge_config
from arm_ray.errors import ConfigError
from arm_ray.events import EventLog, ModelScored
from arm_ray.following.config import AttachConfig
from tests.builders.merge_case import MergeCase


@pytest.fixture
def here(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> MergeCase:
    """Inputs of a merge that is made in this process."""
    monkeypatch.setattr("arm_ray.runtime.merge.run.is_up_or_named", lambda _address: False)
    return case.make()


def content(case: MergeCase) -> dict[str, Any]:
    return {**case.content(), "keep_states": "none"}


def test_a_merge_and_what_it_came_to(
    here: MergeCase, report_pages: None, capfd: pytest.CaptureFixture[str]
) -> None:
    result = arm_ray.merge(content(here), schedule__max_iterations=2, progress=False)
    assert capfd.readouterr() == ("", "")
    assert result.path == here.root / "run" / "model"
    assert (result.path / "model.safetensors").is_file()
    assert (result.run, result.best, result.iterations) == (here.root / "run", "state-0002", 2)
    assert result.reason == "max_iterations"
    assert result.events[-1]["event"] == "run_finished"
    assert result.report == here.root / "run" / "report.html"
    assert result.scores == ()
    again = arm_ray.merge(content(here), schedule__max_iterations=2, progress=False)
    assert (again.reason, again.best, again.path) == ("complete", "state-0002", result.path)


def test_losses_that_chose_are_scores(here: MergeCase) -> None:
    given = content(here)
    del given["schedule"]["step"]
    overrides = {"select.samples": 8, "calibration.batch_size": 4}
    result = arm_ray.merge(given, overrides=overrides, schedule__max_iterations=1, progress=False)
    assert {score.model for score in result.scores} >= {"base", "candidate-1", "candidate-2"}
    assert all(score.is_loss and score.mean > 0.0 for score in result.scores)
    assert result.best in {score.model for score in result.scores}
    assert isinstance(result.scores[0], arm_ray.Score)


def test_a_halted_merge_has_no_model(here: MergeCase) -> None:
    result = arm_ray.merge(content(here), stop_after=1, progress=False)
    assert (result.path, result.best, result.iterations) == (None, None, 1)
    assert result.reason == "stop_after"


def test_progress_is_on_standard_error(here: MergeCase, capfd: pytest.CaptureFixture[str]) -> None:
    arm_ray.merge(content(here), schedule__max_iterations=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "iteration 1/1" in err


@pytest.fixture
def file(case: MergeCase) -> Path:
    path = case.root / "merge.yaml"
    path.write_text(yaml.safe_dump({**case.content(), "candidates": ["one", "two"]}))
    return path


def test_a_configuration_is_a_file_a_mapping_or_itself(file: Path) -> None:
    loaded = arm_ray.load_config(file)
    assert loaded == load_merge_config(file)
    assert arm_ray.load_config(str(file)) == loaded
    assert arm_ray.load_config(yaml.safe_load(file.read_text())) == loaded
    assert arm_ray.load_config(loaded) == loaded
    assert isinstance(loaded, MergeConfig)


def test_overrides(file: Path, tmp_path: Path) -> None:
    loaded = arm_ray.load_config(
        file,
        overrides={"method.coefficient": 0.25, "schedule.max_iterations": 5, "output": "x: {y}"},
        schedule__max_iterations=3,
        schedule__tolerance=1e-05,
        method__operator="ties",
        select__promise=None,
        candidates=("a", tmp_path / "b", "ü"),
        trust_remote_code=["x"],
    )
    assert loaded.method.coefficient == 0.25
    assert loaded.schedule.max_iterations == 3
    assert loaded.schedule.tolerance == 1e-5
    assert loaded.method.operator == "ties"
    assert loaded.output == "x: {y}"
    assert loaded.candidates == ["a", str(tmp_path / "b"), "ü"]
    assert loaded.select.promise is None
    again = arm_ray.load_config(loaded, method__coefficient={"self_attn": 0.5, "default": 0.3})
    assert again.method.by_part == {"coefficient": {"self_attn": (0.5,)}}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"schedule__max_iteration": 3}, "did you mean 'max_iterations'?"),
        ({"method": object()}, "none that a configuration can have"),
        ({"schedule__tolerance": float("nan")}, "none that a configuration can have"),
        ({"kind": "sweep"}, "there is no such kind"),
    ],
)
def test_wrong_ones(file: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arm_ray.load_config(file, **keys)
    assert words in str(caught.value)


def test_other_kinds(tmp_path: Path) -> None:
    attach = arm_ray.load_config(
        {"run": {"path": str(tmp_path / "r")}, "merge": {"base": "b"}, "publish": {"dir": "p"}},
        "attach",
        publish__promote="always",
        merge__method__operator="task_arithmetic",
    )
    assert isinstance(attach, AttachConfig)
    models = {"models": {"a": "x"}, "output": "o", "evaluation": {"tasks": ["gsm8k"]}}
    assert arm_ray.load_config(models, "evaluate").models == {"a": "x"}
    with pytest.raises(ConfigError, match="series"):
        arm_ray.load_config({}, "study")
    with pytest.raises(ConfigError, match="merges"):
        arm_ray.load_config({}, "pipeline")


def test_a_plan(here: MergeCase) -> None:
    plan = arm_ray.plan(content(here), schedule__max_iterations=1)
    assert plan.fits
    assert plan.model.layers == 3
    assert arm_ray.plan(content(here), gpus=1, nodes=1).total_s > 0.0


def test_an_evaluation(case: MergeCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "scores"

    def scored(config: Any, **_: Any) -> None:
        output.mkdir()
        (output / "config.yaml").write_text(config.to_yaml())
        scores = {"gsm8k": {"strict": 0.5}}
        EventLog(output / "events.jsonl").write(
            ModelScored("a", "/models/a", scores, 1.0, None, ())
        )

    monkeypatch.setattr("arm_ray.runtime.scoring.evaluate.evaluate", scored)
    given = {"models": {"a": "x"}, "output": str(output), "evaluation": {"tasks": ["gsm8k"]}}
    result = arm_ray.evaluate(given, progress=False)
    assert result.of("a") == {"gsm8k": 0.5}
    assert (result.run, result.report) == (output, None)
    assert result.events[0]["event"] == "model_scored"
    with pytest.raises(KeyError):
        result.of("b")


def test_following(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from arm_ray.runtime.attach.run import AttachOutcome

    best = tmp_path / "published" / "step-000002"
    monkeypatch.setattr(
        "arm_ray.runtime.attach.run.attach", lambda *_, **__: AttachOutcome("idle", (), best)
    )
    result = arm_ray.attach(
        {"run": {"path": str(tmp_path / "run")}, "merge": {"base": "b"}},
        publish__dir=str(tmp_path / "published"),
        publish__promote="always",
        merge__method__operator="task_arithmetic",
    )
    assert (result.best, result.reason, result.arrivals) == (best, "idle", 0)
    assert result.run == tmp_path / "published" / "work"
    assert result.events == []


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = arm_ray.nothing  # type: ignore[attr-defined]
    assert set(arm_ray.__all__) <= set(dir(arm_ray))

"""Models scored by engines: any number of them, lost ones, and beside a merge."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from arm_ray.config import EvaluateConfig, MergeConfig, validate
from arm_ray.errors import (
    ArmRayError,
    EvaluationError,
    PlacementError,
    RunDirectoryError,
)
from arm_ray.evaluation.records import Record, read_records, read_scores
from arm_ray.events import read_events
from arm_ray.runtime.merge.run import MergeOutcome, merge
from arm_ray.runtime.output.claim import claimed
from arm_ray.runtime.scoring import service as scoring
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.evaluate import evaluate
from arm_ray.runtime.scoring.subject import Subject
from tests.builders.adapters import write_adapters, write_dense
from tests.builders.checkpoints import load_all
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED

pytestmark = pytest.mark.usefixtures("shards_in_process", "engines")
VLLM = pytest.param("vllm", marks=pytest.mark.minutes)
ENGINE = {"kv_cache_gb": 0.05, "max_model_len": 64, "dtype": "float32", "chunk_size": 16}


def make(case: MergeCase, family: str = "smollm2") -> MergeCase:
    case.make(family, sizes=SERVED)
    rows = [{"question": f"{i} red apples and", "answer": str(i)} for i in range(20)]
    # One prompt that no context of 64 tokens holds.
    rows.append({"question": "apples " * 100, "answer": "1"})
    (case.root / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (case.root / "scorer.py").write_text(
        "def score(completion, row):\n    return (len(completion) * 7 % 11) / 10\n"
    )
    return case


def section(case: MergeCase, **others: Any) -> dict[str, Any]:
    question = {"type": "questions", "path": str(case.root / "questions.jsonl"), "max_tokens": 6}
    return {
        "tasks": [
            {"name": "scored", **question, "scorer": f"{case.root}/scorer.py:score", "repeats": 2},
            {"name": "boxed", **question, "temperature": 0.0, "limit": 5},
            {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")},
        ],
        "engine": dict(ENGINE),
        "resamples": 200,
        **others,
    }


def evaluation(case: MergeCase, output: str, **others: Any) -> EvaluateConfig:
    content = {
        "models": {"base": str(case.root / "base"), "later": str(case.candidates[1])},
        "output": str(case.root / output),
        "tokenizer": str(case.root / "base"),
        "evaluation": section(case, **others),
    }
    return validate(EvaluateConfig, content, source="test")


def quiet() -> Console:
    return Console(quiet=True)


def records(directory: Path, model: str, tasks: tuple[str, ...]) -> dict[str, list[Record]]:
    return {task: read_records(directory / model, task) for task in tasks}


@pytest.mark.actors
def test_the_number_of_engines_and_lost_ones_change_nothing(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(case)
    one = evaluate(evaluation(case, "one"), console=quiet())
    names = ("scored", "boxed", "held")
    expected = {m: records(case.root / "one", m, names) for m in ("base", "later")}
    scored = expected["base"]["scored"]
    assert [r.finish for r in scored[-2:]] == ["too_long", "too_long"]
    assert [r.scores for r in scored[-2:]] == [{"score": 0.0}] * 2
    assert one["base"]["scored"].counts["too_long"] == 2
    assert len({r.seed for r in scored}) == len(scored) == 42
    assert {r.version for r in scored} == {"base"}
    assert one["base"]["held"].metrics["loss"].mean != one["later"]["held"].metrics["loss"].mean
    assert list(one["base"]["boxed"].metrics) == ["strict", "qwen_compat"]

    # Two engines, of which one is killed while it works, and a grader.
    load = EngineSlot.load
    killed: list[int] = []

    def load_and_kill(slot: EngineSlot, subject: Subject) -> Any:
        report = load(slot, subject)
        if subject.name == "later" and not killed:
            killed.append(slot._index)
            killing = threading.Timer(0.05, slot.engine.end)
            killing.start()
            slot._gang.graders[0].end()
            killing.join()
        return report

    monkeypatch.setattr(EngineSlot, "load", load_and_kill)
    engine = {**ENGINE, "replicas": 2}
    two = evaluate(evaluation(case, "two", engine=engine), console=quiet())
    assert killed
    for model, tasks in expected.items():
        assert records(case.root / "two", model, names) == tasks
        for task in names:
            assert two[model][task].metrics == one[model][task].metrics


def test_what_is_scored_is_not_scored_again(case: MergeCase, report_pages: None) -> None:
    make(case)
    first = evaluate(evaluation(case, "out"), console=quiet())
    directory = case.root / "out"
    assert "run-scores" in (directory / "report.html").read_text(encoding="utf-8")
    (directory / "later" / "held.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in directory.glob("*/*.json")}
    again = evaluate(evaluation(case, "out"), console=quiet())
    after = {p: p.stat().st_mtime_ns for p in directory.glob("*/*.json")}
    assert {p for p in after if after[p] != before.get(p)} == {directory / "later" / "held.json"}
    for model in first:
        for task in first[model]:
            assert again[model][task].metrics == first[model][task].metrics
    events = [e for e in read_events(directory / "events.jsonl") if e["event"] == "model_scored"]
    assert [len(e["canary"]) for e in events] == [8, 8, 0, 8]
    table = json.loads((directory / "scores.json").read_text())
    assert {p["task"] for p in table["paired"]} == {"scored", "boxed", "held"}
    assert table["models"]["base"]["tasks"]["held"]["metrics"]["loss"]["mean"] == (
        first["base"]["held"].metrics["loss"].mean
    )
    changed = evaluation(case, "out", confidence=0.8)
    assert read_scores(directory / "base", "held").digest != (
        evaluate(changed, console=quiet())["base"]["held"].digest
    )


def test_nothing_is_started_where_everything_is_scored(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(case)
    first = evaluate(evaluation(case, "out"), console=quiet())
    before = json.loads((case.root / "out" / "scores.json").read_text())

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("Ray or an engine is started")

    for name in ("ray_session", "scoring_service"):
        monkeypatch.setattr(f"arm_ray.runtime.scoring.evaluate.{name}", fail)
    assert evaluate(evaluation(case, "out"), console=quiet()) == first
    assert json.loads((case.root / "out" / "scores.json").read_text()) == before
    with pytest.raises(AssertionError, match="is started"):
        evaluate(evaluation(case, "out", confidence=0.8), console=quiet())


def test_models_of_other_shapes_are_scored_by_another_engine(case: MergeCase) -> None:
    make(case)
    other = MergeCase(case.root / "other")
    other.make("qwen2.5", sizes=SERVED)
    content = {
        "models": {"a": str(case.root / "base"), "b": str(other.root / "base")},
        "output": str(case.root / "out"),
        "evaluation": {**section(case), "tasks": section(case)["tasks"][2:]},
    }
    scores = evaluate(validate(EvaluateConfig, content, source="test"), console=quiet())
    assert scores["a"]["held"].version == "a"
    assert scores["b"]["held"].version == "b"
    assert scores["a"]["held"].metrics != scores["b"]["held"].metrics


def test_what_cannot_be_placed_or_used_is_told_at_once(case: MergeCase) -> None:
    make(case)
    many = {**ENGINE, "cpus_per_engine": 500, "placement_timeout_s": 1.0}
    with pytest.raises(PlacementError, match="1 times 500 CPU for the engines"):
        evaluate(evaluation(case, "a", engine=many), console=quiet())
    labelled = {**ENGINE, "resources": {"eval_node": 1.0}, "placement_timeout_s": 1.0}
    with pytest.raises(PlacementError, match="1 eval_node"):
        evaluate(evaluation(case, "b", engine=labelled), console=quiet())
    graders = {"resources": {"grade_node": 0.5}, "workers": 2}
    engine = {**ENGINE, "placement_timeout_s": 1.0}
    with pytest.raises(PlacementError, match=r"2 times 0\.5 grade_node, 1 CPU for the graders"):
        evaluate(evaluation(case, "b", engine=engine, grading=graders), console=quiet())
    (case.root / "c").mkdir()
    (case.root / "c" / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="something else than an evaluation"):
        evaluate(evaluation(case, "c"), console=quiet())
    content = evaluation(case, "d").model_dump(mode="json")
    content["models"] = {"later": str(case.candidates[1])}
    content["tokenizer"] = None
    with pytest.raises(EvaluationError, match="later: no tokenizer"):
        evaluate(validate(EvaluateConfig, content, source="test"), console=quiet())


# ---- beside a merge


def merged(case: MergeCase, *overrides: str, output: str = "run", **others: Any) -> MergeOutcome:
    return merge(merge_config(case, *overrides, output=output, **others), console=quiet())


def merge_config(
    case: MergeCase, *overrides: str, output: str = "run", **others: Any
) -> MergeConfig:
    content = case.content(output)
    content["evaluation"] = {**section(case), "tasks": section(case)["tasks"][2:], **others}
    return validate(MergeConfig, content, overrides, source="test")


def losses(run: Path) -> Mapping[str, float]:
    found = {}
    for file in sorted((run / "evaluation").glob("*/held.json")):
        scores = read_scores(file.parent, "held")
        assert scores is not None
        found[file.parent.name] = scores.metrics["loss"].mean
    return found


def written_states(run: Path) -> list[str]:
    """Names of the states that became models."""
    events = read_events(run / "events.jsonl")
    return [e["state"] for e in events if e["event"] == "model_written"]


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic", "ties"])
def test_the_best_state_is_published(case: MergeCase, operator: str) -> None:
    """Of states that are written all at once, or one by one, and removed when not needed."""
    make(case)
    outcome = merged(
        case,
        f"method.operator={operator}",
        "keep_states=last",
        "schedule.max_iterations=5",
        select={"by": "held"},
    )
    found = losses(outcome.run)
    assert set(found) == {"base", "candidate-1", "candidate-2"} | {
        f"state-000{t}" for t in range(1, 6)
    }
    of_states = {name: value for name, value in found.items() if name.startswith("state")}
    best = min(of_states, key=lambda name: of_states[name])
    written = [
        e for e in read_events(outcome.run / "events.jsonl") if e["event"] == "model_written"
    ]
    assert [e["state"] for e in written] == [best.removeprefix("state-")]
    left = {path.name for path in (outcome.run / "states").iterdir()}
    assert left == {best.removeprefix("state-"), "0005"}
    assert outcome.model is not None
    model, state = load_all(outcome.model), load_all(outcome.run / "states" / best[-4:])
    assert all(model[name].equal(state[name].to(model[name].dtype)) for name in state)
    card = (outcome.model / "README.md").read_text()
    assert f"This model is **{best}**" in card
    assert f"| **{best}** | {of_states[best]:.4f} ±" in card


@pytest.mark.actors
def test_scores_and_selection_are_the_same_after_a_stop(case: MergeCase) -> None:
    make(case, "llama3.2")
    whole = merged(case, output="whole", select={"by": "held"})
    config = merge_config(case, "keep_states=last", output="halted", select={"by": "held"})
    halted = merge(config, console=quiet(), stop_after=2)
    assert halted.model is None
    assert (halted.run / "states" / "0002").is_dir()
    resumed = merge(config, console=quiet())
    assert losses(resumed.run) == losses(whole.run)
    assert resumed.model is not None
    assert whole.model is not None
    one, other = load_file(resumed.model / "model.safetensors"), load_all(whole.model)
    assert all(one[name].equal(other[name]) for name in other)


def test_patience_ends_a_merge_and_waiting_makes_it_exact(case: MergeCase) -> None:
    make(case)
    overrides = ("schedule.max_iterations=12", "runtime.lookahead=0")
    select = {"by": "held", "patience": 1}
    outcome = merged(case, *overrides, wait=True, select=select)
    values = [v for name, v in losses(outcome.run).items() if name.startswith("state")]
    first = next(i for i in range(1, len(values)) if values[i] >= min(values[:i]))
    assert outcome.iterations == first + 1 == len(values)
    assert outcome.reason == "patience"
    # Without waiting more may be merged, but the same state is chosen.
    later = merged(case, *overrides[:1], output="later", select=select)
    assert written_states(outcome.run) == written_states(later.run)


def test_an_evaluation_that_fails_leaves_the_merge(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(case)

    def fail(task: Any, items: Any, size: int) -> list[Any]:
        raise ArmRayError("the evaluation broke")

    monkeypatch.setattr(scoring, "chunks_of", fail)
    outcome = merged(case, output="last")
    assert outcome.model is not None
    warnings = [e for e in read_events(outcome.run / "events.jsonl") if e["event"] == "warning"]
    assert any("the evaluation broke" in e["message"] for e in warnings)
    with pytest.raises(ArmRayError, match="the evaluation broke"):
        merged(case, output="chosen", select={"by": "held"})
    assert (case.root / "chosen" / "states" / "0001").is_dir()
    assert not (case.root / "chosen" / "model").exists()
    monkeypatch.undo()
    again = merged(case, output="chosen", select={"by": "held"})
    assert again.model is not None


def test_a_tokenizer_is_needed_before_anything_starts(case: MergeCase) -> None:
    make(case)
    AutoTokenizer.from_pretrained(case.root / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (case.root / "base" / name).unlink()
    with pytest.raises(ArmRayError, match="no tokenizer"):
        merged(case)


@pytest.mark.parametrize("engines", [VLLM], indirect=True)
def test_two_processes_share_a_model(case: MergeCase) -> None:
    """Tensor parallelism, which GPUs are for, on CPUs: the losses of one process."""
    make(case)
    tasks = [{"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")}]
    losses = {}
    for size in (1, 2):
        engine = {**ENGINE, "tensor_parallel": size}
        config = evaluation(case, f"of-{size}", engine=engine, tasks=tasks)
        scores = evaluate(config, console=quiet())
        losses[size] = [scores[m]["held"].metrics["loss"].mean for m in ("base", "later")]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[1][0] - losses[1][1]) > 1e-3


def test_an_adapter_is_scored_as_the_dense_model_it_stands_for(case: MergeCase) -> None:
    make(case)
    [adapter, _] = write_adapters(case)
    write_dense(case, adapter)
    task = {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")}
    content = {
        "models": {
            name: str(case.root / name) for name in ("base", "adapter-1", "adapter-1-dense")
        },
        "adapter_base": str(case.root / "base"),
        "tokenizer": str(case.root / "base"),
        "output": str(case.root / "adapters"),
        "evaluation": section(case, tasks=[task]),
    }
    scores = evaluate(validate(EvaluateConfig, content, source="test"), console=quiet())
    base, ours, dense = (tasks["held"].metrics["loss"].mean for tasks in scores.values())
    assert ours == pytest.approx(dense, rel=1e-6)
    assert abs(ours - base) > 1e-3
    content.pop("adapter_base")
    with pytest.raises(EvaluationError, match="its base is not named"):
        evaluate(validate(EvaluateConfig, content, source="test"), console=quiet())


def test_two_evaluations_do_not_work_in_one_directory(case: MergeCase) -> None:
    make(case)
    config = evaluation(case, "shared")
    (case.root / "shared").mkdir()
    (case.root / "shared" / "config.yaml").write_text(config.to_yaml())
    with (
        claimed(case.root / "shared", "evaluation"),
        pytest.raises(RunDirectoryError, match="another evaluation is working"),
    ):
        evaluate(config, console=quiet())

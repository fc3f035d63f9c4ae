"""Models scored on tasks of lm-evaluation-harness, through the command line."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from arm_ray.cli import main
from arm_ray.config import EvaluateConfig, validate
from arm_ray.errors import ConfigError, EvaluationError, RunDirectoryError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.lm_eval_bridge import EngineLM
from arm_ray.evaluation.lm_eval_tasks import open_tasks
from arm_ray.evaluation.settings import EngineSettings
from arm_ray.events import read_events
from arm_ray.runtime.scoring import lm_eval as module
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.lm_eval import LmEvalOptions, evaluate_lm_eval, shown_scores
from arm_ray.runtime.scoring.subject import Subject
from tests.builders.engines import Served
from tests.builders.lm_eval_tasks import CONTEXT, asked, harness, read_index_once, write_tasks
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED, save_tokenizer

ENGINE = {"kv_cache_gb": 0.05, "max_model_len": CONTEXT, "dtype": "float32", "chunk_size": 16}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    read_index_once(monkeypatch)


def make(case: MergeCase) -> Path:
    case.make("smollm2", sizes=SERVED)
    return write_tasks(case.root / "tasks")


def arguments(case: MergeCase, tasks: Path, *more: str, output: str = "out") -> list[str]:
    settings = [f"evaluation.engine.{name}={value}" for name, value in ENGINE.items()]
    return [
        "evaluate",
        f"base={case.root / 'base'}",
        f"later={case.candidates[1]}",
        f"--tokenizer={case.root / 'base'}",
        f"--output={case.root / output}",
        f"--lm-eval-path={tasks}",
        *(f"--set={text}" for text in (*settings, "evaluation.resamples=200")),
        *more,
    ]


def content_of(case: MergeCase, model: str, output: str = "out") -> dict[str, Any]:
    text = (case.root / output / model / "lm_eval.json").read_text()
    content: dict[str, Any] = json.loads(text)
    return content


def backend(path: Path, tokenizer: Path) -> Any:
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(path),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        max_length=CONTEXT - 2,
        batch_size=1,
        device="cpu",
    )


@pytest.mark.usefixtures("local_ray")
def test_log_likelihoods_of_an_engine_are_those_of_transformers(case: MergeCase) -> None:
    """In float32, within 1e-3 nats for each request, cut and split ones included."""
    make(case)
    served = Served(
        case.candidates[0],
        case.root / "base",
        EngineSettings(kv_cache_gb=0.05, max_model_len=CONTEXT, dtype="float32"),
    )
    try:
        served.load(ModelSource(str(case.candidates[0])), "first")
        tokenizer = AutoTokenizer.from_pretrained(case.root / "base")
        ours = EngineLM(served, tokenizer, CONTEXT)
        theirs = backend(case.candidates[0], case.root / "base")
        pairs = [
            asked("two red apples", " and"),
            asked("", "seven"),
            asked("Ann has " * 30 + "left", " two green ones"),
            asked("in", " seven red apples and two green ones are in"),
        ]
        found, expected = (lm.loglikelihood(pairs) for lm in (ours, theirs))
        assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        texts = [asked(text, kind="loglikelihood_rolling") for text in ("red", "two red " * 60)]
        assert ours.loglikelihood_rolling(texts) == pytest.approx(
            theirs.loglikelihood_rolling(texts), abs=1e-3
        )
        assert ours.counts["loglikelihood"].cut == 1
    finally:
        served.close()


@pytest.mark.usefixtures("local_ray", "engines")
def test_two_models_through_the_command_line(
    case: MergeCase, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = make(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LINE_INTERVAL_S", 0.0)
        assert main(arguments(case, tasks, "--lm-eval", "all,sampled")) == 0
    shown = capsys.readouterr().out
    assert "base: 3 of" in shown
    assert "were cut from the left, as lm_eval does" in shown
    assert "choices" in shown
    assert "±" in shown
    opened = open_tasks(["all"], str(tasks))
    for model, path in (("base", case.root / "base"), ("later", case.candidates[1])):
        content = content_of(case, model)
        expected = harness(backend(path, case.root / "base"), opened)
        for task, values in expected["results"].items():
            for key, value in values.items():
                if isinstance(value, float):
                    got = content["results"][task][key]
                    assert got == pytest.approx(value, rel=1e-4), (model, task, key)
        ours = content["arm_ray"]
        assert ours["version"] == model
        assert ours["requests"]["loglikelihood"] == {"requests": 36, "cut": 3}
        assert ours["requests"]["generate_until"]["requests"] == 10
        assert content["n-samples"]["choices"]["effective"] == 12
        assert set(shown_scores(content)) == {"choices", "texts", "answers", "sampled"}
    one, other = content_of(case, "base"), content_of(case, "later")
    assert one["results"]["texts"] != other["results"]["texts"]
    events = read_events(case.root / "out" / "events.jsonl")
    assert [e["model"] for e in events] == ["base", "later"]
    assert set(events[0]["scores"]) == {f"lm_eval/{t}" for t in shown_scores(one)}
    assert len(events[0]["canary"]) == 8

    # What is there is not scored again, and other settings do not take its place.
    assert main(arguments(case, tasks, "--lm-eval", "all,sampled")) == 0
    assert "base: lm_eval's numbers are there already" in capsys.readouterr().out
    assert len(read_events(case.root / "out" / "events.jsonl")) == 2
    assert main(arguments(case, tasks, "--lm-eval", "shots", "--num-fewshot=1", "--limit=3")) == 0
    limited = content_of(case, "later")
    assert limited["n-samples"]["shots"]["effective"] == 3
    assert limited["n-shot"]["shots"] == 1
    assert limited["arm_ray"]["settings"]["limit"] == 3
    kept = case.root / "out" / "later" / f"lm_eval-{other['arm_ray']['digest']}.json"
    assert json.loads(kept.read_text()) == other
    assert main(arguments(case, tasks, "--lm-eval", "all,sampled")) == 0
    assert len(read_events(case.root / "out" / "events.jsonl")) == 4


@pytest.mark.actors
@pytest.mark.usefixtures("local_ray", "engines")
def test_own_tasks_come_first_and_a_broken_model_leaves_the_others(
    case: MergeCase, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make(case)
    held = [{"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")}]
    more = (f"--set=evaluation.tasks={json.dumps(held)}", "--lm-eval=choices", "--tasks=held")
    assert main(arguments(case, tasks, *more, output="both")) == 0
    assert (case.root / "both" / "base" / "held.json").is_file()
    assert (case.root / "both" / "later" / "lm_eval.json").is_file()
    capsys.readouterr()

    # A model that no engine takes in, between two that are well; and an engine that is lost.
    config = validate(
        EvaluateConfig,
        {
            "models": {
                "base": str(case.root / "base"),
                "broken": str(case.candidates[0]),
                "later": str(case.candidates[1]),
            },
            "output": str(case.root / "three"),
            "tokenizer": str(case.root / "base"),
            "evaluation": {"tasks": held, "engine": ENGINE},
        },
        source="test",
    )
    load, ask = EngineSlot._load, EngineSlot.ask
    killed = []

    def load_or_fail(slot: EngineSlot, subject: Subject) -> Any:
        if subject.name == "broken":
            raise EvaluationError("the engine did not take in the weights")
        return load(slot, subject)

    def kill_and_ask(slot: EngineSlot, subject: Subject, method: Any, *args: Any) -> Any:
        if subject.name == "later" and not killed:
            killed.append(True)
            slot.engine.end()
        return ask(slot, subject, method, *args)

    monkeypatch.setattr(EngineSlot, "_load", load_or_fail)
    monkeypatch.setattr(EngineSlot, "ask", kill_and_ask)
    with pytest.raises(EvaluationError, match="broken: the engine did not take in"):
        evaluate_lm_eval(config, LmEvalOptions(("choices",), str(tasks)))
    told = capsys.readouterr().err
    assert "broken: reloading failed, starting the engine anew" in told
    assert "later: the engine was lost, starting it anew" in told
    assert not (case.root / "three" / "broken").exists()
    for model in ("base", "later"):
        whole = content_of(case, model, "both")
        assert content_of(case, model, "three")["results"] == whole["results"]


# ---- without an engine


def test_bad_command_lines_are_told_before_anything_starts(
    case: MergeCase, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make(case)

    def error(*more: str) -> str:
        assert main(arguments(case, tasks, *more)) == 1
        assert not (case.root / "out").exists()
        return capsys.readouterr().err

    assert "nearest: choices" in error("--lm-eval=choises")
    assert "only the documents that are asked" in error("--lm-eval=answers", "--num-fewshot=2")
    assert "no directory" in error("--lm-eval=choices", "--lm-eval-path=/nowhere/at/all")
    assert "runs code that the model wrote" in error("--lm-eval=humaneval")
    assert "no such task" in error()
    with pytest.raises(SystemExit):
        main(arguments(case, tasks, "--lm-eval=choices", "--num-fewshot=-1"))
    capsys.readouterr()

    (case.root / "bare").mkdir()
    save_tokenizer(case.root / "bare")
    template = case.root / "bare" / "chat_template.jinja"
    template.unlink(missing_ok=True)
    settings = case.root / "bare" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("chat_template", None)
    settings.write_text(json.dumps(content))
    bare = f"--tokenizer={case.root / 'bare'}"
    assert "chat template" in error("--lm-eval=choices", "--apply-chat-template", bare)

    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "arm_ray.evaluation.lm_eval_tasks")
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install arm-ray[lm-eval]" in error("--lm-eval=choices")


def test_an_output_that_holds_something_else_is_left_alone(case: MergeCase) -> None:
    tasks = make(case)
    (case.root / "out").mkdir()
    (case.root / "out" / "thesis.tex").write_text("")
    config = validate(
        EvaluateConfig,
        {
            "models": {"base": str(case.root / "base")},
            "output": str(case.root / "out"),
            "evaluation": {"tasks": ["gsm8k"]},
        },
        source="test",
    )
    with pytest.raises(RunDirectoryError, match="something else than an evaluation"):
        evaluate_lm_eval(config, LmEvalOptions(("choices",), str(tasks)))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("arm_ray.runtime.cluster.joining.in_submitted_job", lambda: True)
        relative = config.model_copy(update={"output": "out"})
        with pytest.raises(ConfigError, match="relative path"):
            evaluate_lm_eval(relative, LmEvalOptions(("choices",), str(tasks)))


def test_main_numbers_of_groups_hide_their_members() -> None:
    content = {
        "results": {
            "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "part": {"alias": "part", "acc,none": 0.25, "acc_stderr,none": "N/A"},
            "inner": {"alias": "inner", "acc,none": 0.75},
            "alone": {
                "sample_len": 3,
                "exact_match,strict": 1.0,
                "exact_match_stderr,strict": "N/A",
            },
            "empty": {"alias": "empty"},
        },
        "groups": {"whole": {}},
        "group_subtasks": {"whole": ["part"], "part": ["inner"], "empty": ["alone"]},
    }
    assert shown_scores(content) == {
        "whole": ("acc", 0.5, 0.1),
        "alone": ("exact_match (strict)", 1.0, None),
    }

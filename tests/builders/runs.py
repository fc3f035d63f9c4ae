"""What runs leave in their directories, without the runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from arm_ray.evaluation.records import Record, summarise, write_records
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.events import (
    EventLog,
    IterationFinished,
    ModelScored,
    ModelWritten,
    ModuleChange,
    RunFinished,
    RunPlanned,
    RunStarted,
    Span,
    Warned,
)

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
# Of each model, which of eight problems it answers rightly.
RIGHT: Mapping[str, Sequence[int]] = {
    "base": (1, 0, 0, 0, 0, 0, 0, 0),
    "candidate-1": (1, 1, 1, 0, 0, 0, 0, 0),
    "candidate-2": (1, 1, 0, 1, 0, 0, 0, 0),
    "state-0001": (1, 1, 1, 1, 0, 0, 0, 0),
    "state-0002": (1, 0, 1, 1, 1, 1, 1, 0),
}


def merge_run(root: Path, name: str = "run") -> Path:
    """A finished merge of two iterations, with scores of one task; the second state is chosen."""
    run = root / name
    run.mkdir(parents=True)
    config = {
        "base": "models/base",
        "candidates": ["/runs/a/checkpoint-10", "/runs/a/checkpoint-20"],
        "output": str(run),
        "method": {"operator": "arm", "coefficient": 0.7},
        "calibration": {"path": "/data/calibration.jsonl"},
        "evaluation": {
            "tasks": [{"name": "quiz", "path": str(root / "quiz.jsonl"), "type": "questions"}],
            "confidence": 0.9,
            "resamples": 1000,
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (run / "inputs.json").write_text(
        json.dumps({"base": "d0", "candidate-1": "d1", "candidate-2": "d2", "calibration": "d3"}),
        encoding="utf-8",
    )
    questions = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    questions[2]["question"] = EVIL
    rows = "".join(json.dumps(row) + "\n" for row in questions)
    (root / "quiz.jsonl").write_text(rows, encoding="utf-8")
    events = EventLog(run / "events.jsonl")
    events.write(RunStarted("0.1.0", 1, 2, "arm", 20, 14, 2, 2, "cpu", "float32", 24, "d3"))
    events.write(RunPlanned("cpu", 5.0, (2.0, 3.0), (10**9, 2 * 10**9), 400, 3000))
    events.write(Warned(f"a warning with {EVIL}"))
    for number in (1, 2):
        events.write(iteration(number))
    for model, right in RIGHT.items():
        scored(run / "evaluation", model, right)
        mean = sum(right) / len(right)
        events.write(ModelScored(model, f"/m/{model}", {"quiz": {"score": mean}}, 2.0, 0.5, ()))
    events.write(ModelWritten("0002", str(run / "model"), 1000, 0.25))
    events.write(RunFinished("max_iterations", 2, 12.5, (3 * 10**9, 10**9)))
    return run


def iteration(number: int, spans: tuple[tuple[Span, ...], ...] | None = None) -> IterationFinished:
    """An iteration of two shards and a model of two layers."""
    modules = tuple(
        ModuleChange(
            layer,
            module,
            update=0.01 * (layer + 1),
            distance=0.02,
            angle=10.0 * number + layer,
            rank=4.0,
            spectrum=(8.0, 4.0, 2.0, 1.0),
        )
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    )
    if spans is None:
        start = time.time() - 100.0 + 10.0 * number
        spans = (
            (("forward", start, 1.0), ("merge", start + 1.0, 2.0)),
            (("forward", start + 1.0, 2.0),),
        )
    return IterationFinished(
        number,
        "anchoring",
        "base" if number == 1 else "state-0001",
        ("candidate-1", "candidate-2"),
        0.5 if number == 1 else 1.0,
        None if number == 1 else 0.0,
        8,
        (),
        4.0,
        3.0,
        2.0,
        1000,
        (3.0, 2.0),
        200,
        0,
        0,
        (ModuleChange(None, "model.embed_tokens", 0.001, 0.002), *modules),
        spans,
    )


def scored(directory: Path, model: str, right: Sequence[int], task: str = "quiz") -> None:
    """The records of a model's answers; the third problem's is an attempt to run a script."""
    rows = [
        Record(
            problem=str(n),
            repeat=0,
            seed=0,
            prompt_hash="0",
            prompt_tokens=3,
            completion=EVIL if n == 2 else f"{model} says {n}",
            num_tokens=4,
            finish="stop",
            version=model,
            answer=str(n),
            note="",
            scores={"score": float(value)},
        )
        for n, value in enumerate(right)
    ]
    settings = EvaluationSettings(tasks=(task,), confidence=0.9, resamples=1000)
    summary = summarise(
        rows, settings, task=task, kind="questions", metrics=("score",), digest="d", seconds=1.0
    )
    write_records(directory / model, rows, summary)


def events_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run's events."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def keep_events(run: Path, keep: Any) -> None:
    """Rewrite a run's events: those that `keep` makes something of."""
    kept = [found for event in events_of(run) if (found := keep(event)) is not None]
    text = "".join(json.dumps(event) + "\n" for event in kept)
    (run / "events.jsonl").write_text(text, encoding="utf-8")

"""Configurations of the other jobs: evaluate, attach, pipeline and study; and command lines."""

from __future__ import annotations

from typing import Any

import yaml

from tests.refusals.place import Malformed, Place


def job(command: str, content: Any, *more: str, says: str = "") -> Malformed:
    """A command with a configuration of this content."""

    def make(place: Place) -> list[str]:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        return [command, str(place.file("config.yaml", text)), *more]

    return Malformed(make, says=says)


def attach(says: str = "", **sections: Any) -> Malformed:
    return Malformed(lambda place: place.attach(**sections), says=says)


def usage(*arguments: str) -> Malformed:
    """A wrong command line, which is told with the usage."""
    return Malformed(lambda _place: list(arguments), is_told=True, codes=(2,), says="usage: ")


def named(name: str) -> Malformed:
    """An evaluation of a model of this name, which is that of a directory."""

    def make(place: Place) -> list[str]:
        file = place.file("quiz.jsonl", '{"question": "1 + 1?", "answer": "2"}\n')
        tasks = [{"name": "quiz", "type": "questions", "path": str(file)}]
        return place.evaluate(tasks, models={name: str(place.good / "base")})

    return Malformed(make, where="")


MODELS = {"models": {"a": "b"}}
_TASKS = {"evaluation": {"tasks": ["gsm8k"]}}
_STUDY = "base: a\nseries: {}\noutput: c\n"

CASES: dict[str, Malformed] = {
    "evaluate: empty": job("evaluate", ""),
    "evaluate: a list": job("evaluate", "[a]"),
    "evaluate: no models": job("evaluate", _TASKS, says="models"),
    "evaluate: models as a list": job("evaluate", {"models": ["a"], **_TASKS}),
    "evaluate: a model that is null": job("evaluate", {"models": {"a": None}, **_TASKS}),
    "evaluate: a name with a slash": named("../a"),
    "evaluate: a name with a NUL": named("a\0b"),
    "evaluate: a name that is two dots": named(".."),
    "evaluate: an empty name": named(""),
    "evaluate: a name of 5000 characters": named("x" * 5000),
    "evaluate: no tasks": job("evaluate", MODELS, says="nothing to score the models on"),
    "evaluate: tasks as a word": job("evaluate", {**MODELS, "evaluation": {"tasks": "gsm8k"}}),
    "evaluate: an unknown key": job(
        "evaluate", {**MODELS, "evaluation": {"tasks": ["gsm8k"], "samplig": {}}}
    ),
    "evaluate: a negative temperature": job(
        "evaluate",
        {**MODELS, "evaluation": {"tasks": ["gsm8k"], "sampling": {"temperature": -1.0}}},
    ),
    "evaluate: a confidence of 95": job(
        "evaluate", {**MODELS, "evaluation": {"tasks": ["gsm8k"], "confidence": 95}}
    ),
    "evaluate: two models of one name": Malformed(
        lambda _place: ["evaluate", "a=/x", "a=/y", "--tasks", "gsm8k"], where=""
    ),
    "evaluate: options without tasks of their own": Malformed(
        lambda _place: ["evaluate", "/x", "--tasks", "gsm8k", "--num-fewshot", "3"],
        where="command line",
    ),
    "attach: empty": job("attach", ""),
    "attach: sections missing": job("attach", "run: {path: a}\n"),
    "attach: a run that is a list": job("attach", "run: [a]\nmerge: {base: b}\npublish: {dir: c}"),
    "attach: published below the run": attach(
        "nothing may be written below", run={"path": "/tmp/x"}, publish={"dir": "/tmp/x/y"}
    ),
    "attach: an output that is set twice": attach("is set by attach", merge={"output": "x"}),
    "attach: a schedule of its own": attach(
        "merge.schedule", merge={"schedule": {"max_iterations": 3}}
    ),
    "attach: a schedule that is a word": Malformed(
        lambda place: place.attach(merge={"schedule": "fast"}), where="merge.schedule"
    ),
    "attach: the best without scores": attach("needs scores", publish={"promote": "best"}),
    "attach: labelled without resources": attach(sharing={"when_full": "labelled"}),
    "attach: a window of one": attach(merge={"streaming": "window", "candidates": 1}),
    "attach: a hook that is a word": attach(publish={"hook": "reload"}),
    "attach: a hook's command as one text": attach(publish={"hook": {"command": "reload now"}}),
    "attach: a hook's empty command": attach(publish={"hook": {"command": []}}),
    "attach: a hook's program without a name": attach(publish={"hook": {"command": ["", "x"]}}),
    "attach: a negative poll": attach(run={"poll_s": -1.0}),
    "attach: a poll that never ends": attach(run={"poll_s": float("inf")}),
    "attach: an unknown layout": attach(run={"layout": "megaton"}),
    "attach: a base that is not there": Malformed(
        lambda place: place.attach(merge={"base": "/nowhere/base"}), where="/nowhere/base"
    ),
    "pipeline: empty": job("pipeline", ""),
    "pipeline: a list": job("pipeline", "[1]"),
    "pipeline: sections missing": job("pipeline", "output: /tmp/nowhere-at-all\n"),
    "pipeline: an unknown key": job("pipeline", "output: x\ntrian: {}\n"),
    "pipeline: steps and epochs": job(
        "pipeline",
        {
            "output": "x",
            "train": {
                "model": "m",
                "data": {"path": "d"},
                "learning_rate": 1.0,
                "steps": 1,
                "epochs": 1.0,
                "save_steps": 1,
            },
        },
    ),
    "study: empty": job("study", ""),
    "study: sections missing": job("study", _STUDY),
    "study: an unknown key": job("study", _STUDY + "serise: {}\n"),
    "study: a series that is a word": job("study", "base: a\nseries: x\noutput: c\n"),
    "study: a dry run of nothing": job("study", _STUDY, "--dry-run"),
    "study: tables of nothing": job("study", _STUDY, "--render"),
    "plan: empty": job("plan", ""),
    "plan: no candidates": job("plan", "base: a\noutput: c\n"),
    "plan: a device that is not known": Malformed(
        lambda place: ["plan", *place.merge()[1:], "--device", "abacus"], where=""
    ),
    "config: a key that is not known": Malformed(
        lambda _place: ["config", "schedule.windw_size"], where=""
    ),
    "init: no checkpoints": Malformed(lambda place: ["init", str(place.root), "--yes"]),
    "init: a file for a run": Malformed(
        lambda place: ["init", str(place.file("x")), "--yes", "--output", str(place.root / "y")]
    ),
    "init: a file that is there": Malformed(
        lambda place: ["init", "--yes", "--output", str(place.file("merge.yaml", "x"))],
        where="merge.yaml",
    ),
    "init: data and no data": Malformed(
        lambda place: ["init", str(place.root), "--data", "x", "--no-data"], where="command line"
    ),
    "status: of two things": Malformed(
        lambda _place: ["status", "x", "--address", "y"], where="command line"
    ),
    "a command that is not there": usage("mege"),
    "no command": usage(),
    "a number that is a word": usage("merge", "c.yaml", "--stop-after", "x"),
    "a number below one": usage("merge", "c.yaml", "--stop-after", "0"),
    "an option that is not there": usage("merge", "c.yaml", "--what"),
    "options that exclude each other": usage("merge", "c.yaml", "--quiet", "--json"),
    "a URL where a directory is needed": usage("verify", "s3://bucket/model"),
}

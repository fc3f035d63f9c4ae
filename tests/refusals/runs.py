"""Run directories that are foreign, damaged, or half there; and reports and states of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.builders.runs import merge_run
from tests.refusals.place import Malformed, Place

_LINE = '{"time": 1.0, "event": "run_started"}\n'


def merging(make: Callable[[Path], object]) -> Malformed:
    """A merge whose output is a directory that somebody has left."""

    def all_of(place: Place) -> list[str]:
        run = place.root / "run"
        run.mkdir()
        make(run)
        return place.merge()

    return Malformed(all_of)


def ours(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A run of another configuration with a finished state, and a change of it."""

    def make(run: Path) -> None:
        run.rmdir()
        merge_run(run.parent, run.name)
        (run / "model").mkdir()
        change(run)

    return make


def told(command: str, change: Callable[[Path], object], says: str = "") -> Malformed:
    """A finished merge that is changed, and what a command tells of it: never an error."""

    def make(place: Place) -> list[str]:
        run = merge_run(place.root)
        change(run)
        arguments = [command, str(run)]
        if command == "report":
            arguments += ["--output", str(place.root / "page.html")]
        return arguments

    return Malformed(make, is_told=True, codes=(0, 1), says=says)


def looked_at(change: Callable[[Path], object], says: str = "") -> dict[str, Malformed]:
    """The same by `status` and by `report`."""
    return {"status": told("status", change, says), "report": told("report", change)}


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def made(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return change


def _events(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


_BOMB = "l0: &l0 [x, x]\n" + "".join(
    f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 11)
)
# Changes of a finished run; each is looked at by `status` and by `report`.
_CHANGES: dict[str, Callable[[Path], object]] = {
    "events of noise": written("events.jsonl", bytes(range(256)) * 40),
    "events of brackets": written("events.jsonl", "[" * 100_000 + "\n"),
    "events that are numbers": written("events.jsonl", "5\nnull\n[]\n" + _LINE),
    "events without a time": written("events.jsonl", _events({"event": "run_started"})),
    "events with words for numbers": written(
        "events.jsonl",
        _events(
            {"time": "now", "event": "run_started", "max_iterations": "many"},
            {"time": "x", "event": "iteration_finished", "iteration": "one", "seconds": "two"},
            {"time": [], "event": "model_scored", "model": 5, "scores": "good"},
        ),
    ),
    "events with lists for numbers": written(
        "events.jsonl",
        _events(
            *(
                {
                    "time": [],
                    "event": name,
                    "iteration": {},
                    "scores": [],
                    "seconds": [],
                    "model": [],
                }
                for name in ("run_started", "iteration_finished", "model_scored", "run_finished")
            )
        ),
    ),
    "events beyond all time": written(
        "events.jsonl", _events({"time": 1e300, "event": "run_started"})
    ),
    "events that are not numbers": written(
        "events.jsonl", '{"time": NaN, "event": "run_finished", "seconds": Infinity}\n'
    ),
    "an event cut off": written("events.jsonl", _LINE + '{"time": 1.0, "ev'),
    "events that are a pipe": made("events.jsonl", os.mkfifo),
    "events that are a directory": made("events.jsonl", lambda path: path.mkdir()),
    "events that are a device": made("events.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "a configuration of noise": written("config.yaml", bytes(range(256))),
    "a configuration that is a list": written("config.yaml", "[a]"),
    "a configuration that grows tenfold": written("config.yaml", _BOMB),
    "a configuration of brackets": written("config.yaml", "x: " + "[" * 50_000),
    "a configuration that is a pipe": made("config.yaml", os.mkfifo),
    "a configuration of other values": written(
        "config.yaml", "candidates: 5\noutput: [a]\nmethod: x\nevaluation: 7\nbase: {a: b}\n"
    ),
    "inputs of noise": written("inputs.json", b"\xff\xfe"),
    "inputs that are a list": written("inputs.json", "[1]"),
    "inputs that are a pipe": made("inputs.json", os.mkfifo),
    "a selection that is a list": written("selection.json", "[1]"),
    "scores of noise": written("evaluation/base/quiz.json", b"\xff"),
    "scores that are a list": written("evaluation/base/quiz.json", "[1]"),
    "scores with words": written("evaluation/base/quiz.json", '{"metrics": "x", "scores": 5}'),
    "answers of noise": written("evaluation/base/quiz.parquet", b"PAR1" + bytes(90)),
    "answers that are a pipe": made("evaluation/base/quiz.parquet", os.mkfifo),
}

CASES: dict[str, Malformed] = {
    **{
        f"{command}: {name}": case
        for name, change in _CHANGES.items()
        for command, case in looked_at(change).items()
    },
    "merge: other files": merging(written("novel.txt", "once")),
    "merge: a configuration of noise": merging(written("config.yaml", bytes(range(256)))),
    "merge: a configuration that is a list": merging(written("config.yaml", "[a]")),
    "merge: a configuration that grows tenfold": merging(written("config.yaml", _BOMB)),
    "merge: a configuration that is a pipe": merging(made("config.yaml", os.mkfifo)),
    "merge: a configuration that is a directory": merging(
        made("config.yaml", lambda path: path.mkdir())
    ),
    "merge: a run of another kind": merging(written("config.yaml", "models: {a: b}\n")),
    "merge: a run of another configuration": merging(ours(lambda _run: None)),
    "merge: a run of others with inputs of noise": merging(
        ours(written("inputs.json", b"\xff\xfe"))
    ),
    "merge: a link to itself": Malformed(lambda place: _link(place)),
    "merge: a file of the system": Malformed(
        lambda place: place.merge(output="/proc/self/status"), where="/status"
    ),
    "merge: where nothing can be written": Malformed(
        lambda place: place.merge(output="/proc/run"), where="/proc/run"
    ),
    "merge: a lock that is a directory": merging(made(".lock", lambda path: path.mkdir())),
    "verify: not there": Malformed(lambda place: ["verify", str(place.root / "none")]),
    "verify: a file": Malformed(lambda place: ["verify", str(place.file("x"))]),
    "verify: an empty directory": Malformed(lambda place: ["verify", str(place.root)]),
    "verify: a run of noise": Malformed(
        lambda place: ["verify", str(place.file("run/config.yaml", b"\xff").parent)]
    ),
    "verify: a run that grows tenfold": Malformed(
        lambda place: ["verify", str(place.file("run/config.yaml", _BOMB).parent)]
    ),
    "verify --repair: a model": Malformed(
        lambda place: ["verify", "--repair", str(place.good / "base")], where="base"
    ),
    "report: not there": Malformed(lambda place: ["report", str(place.root / "none")]),
    "report: a file": Malformed(lambda place: ["report", str(place.file("x"))]),
    "report: a foreign directory": Malformed(
        lambda place: [
            "report",
            str(place.file("run/x").parent),
            "--output",
            str(place.root / "page.html"),
        ],
        is_told=True,
        codes=(0, 1),
    ),
    "status: a foreign directory": Malformed(
        lambda place: ["status", str(place.file("run/x").parent)],
        is_told=True,
        says="no run of arm_ray",
    ),
    "status: not there": Malformed(lambda place: ["status", str(place.root / "none")]),
    "serve: not there": Malformed(lambda place: ["serve", str(place.root / "none")]),
    "inspect: not there": Malformed(
        lambda place: ["inspect", str(place.root / "none")], is_told=True
    ),
    "inspect: an unknown format": Malformed(
        lambda place: ["inspect", f"zip:{place.root}"], is_told=True
    ),
}


def _link(place: Place) -> list[str]:
    (place.root / "run").symlink_to("run")
    return place.merge()

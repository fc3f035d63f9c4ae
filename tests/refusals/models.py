"""Finished models of others: `arm_ray.json`, what verify, reproduce, push and gguf do with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.provenance import write_provenance
from tests.refusals.place import Malformed, Place

_MADE = {
    "config": {
        "base": "a",
        "candidates": ["b"],
        "output": "c",
        "method": {"operator": "task_arithmetic"},
    },
    "inputs": {},
    "environment": {},
}


def model(
    command: str,
    change: Callable[[Path], object],
    *overrides: str,
    codes: tuple[int, ...] = (1,),
    **told: Any,
) -> Malformed:
    """A model with its digests, which is changed, and a command for it."""

    def make(place: Place) -> list[str]:
        path = place.root / "model"
        shutil.copytree(place.good / "checkpoint-10", path)
        write_provenance(path, _MADE)
        change(path)
        more = {
            "reproduce": ["--output", str(place.root / "again")],
            "push": ["owner/name"],
            "gguf": ["--converter", str(place.root / "none.py")],
        }
        return [command, str(path), *more.get(command, []), *overrides]

    return Malformed(make, codes=codes, **told)


def said(content: str | bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (path / "arm_ray.json").write_bytes(data)

    return change


def changed(**keys: Any) -> Callable[[Path], object]:
    """The manifest with other values; `...` takes a key away."""

    def change(path: Path) -> None:
        content = {**json.loads((path / "arm_ray.json").read_text()), **keys}
        content = {key: value for key, value in content.items() if value is not ...}
        (path / "arm_ray.json").write_text(json.dumps(content))

    return change


def file(name: str) -> Callable[[Path], object]:
    """A manifest that names another file."""
    row = {"num_bytes": 3, "digest": "0" * 64, "tensors": {}}
    return changed(files={name: row})


_QUESTIONS = {"name": "x", "type": "questions", "path": "y"}


def _scored(key: str, value: object) -> Callable[[Path], object]:
    """The manifest of a model that scores have chosen, with a key of the evaluation."""
    *sections, name = key.removeprefix("evaluation.").split(".")
    content: dict[str, Any] = {name: value}
    for section in reversed(sections):
        content = {section: content}
    return _settings(evaluation={"tasks": [_QUESTIONS], "select": {"by": "x"}, **content})


def damaged(change: Callable[[Path], object], says: str = "DAMAGED") -> Malformed:
    return model("verify", change, is_told=True, says=says)


def _pipe(path: Path) -> None:
    (path / "arm_ray.json").unlink()
    os.mkfifo(path / "arm_ray.json")


def _settings(**keys: Any) -> Callable[[Path], object]:
    return changed(config={**_MADE["config"], **keys})


CASES: dict[str, Malformed] = {
    "no manifest": model("verify", lambda path: (path / "arm_ray.json").unlink()),
    "an empty manifest": model("verify", said("")),
    "a manifest cut off": model("verify", said('{"format": 1, "fi')),
    "a manifest of noise": model("verify", said(b"\xff\xfe")),
    "a manifest that is a list": model("verify", said("[1]")),
    "a manifest of brackets": model("verify", said("[" * 100_000)),
    "a manifest that is a pipe": model("verify", _pipe),
    "a manifest of another format": model("verify", changed(format=99)),
    "a manifest without a format": model("verify", changed(format=...)),
    "a manifest without files": model("verify", changed(files=...)),
    "files that are a list": model("verify", changed(files=["a"])),
    "a file that is a word": model("verify", changed(files={"a": "b"})),
    "a file with unknown keys": model("verify", changed(files={"a": {"x": 1}})),
    "a size that is a word": model(
        "verify", changed(files={"a": {"num_bytes": "x", "digest": "y", "tensors": {}}})
    ),
    "tensors that are a number": model(
        "verify", changed(files={"a": {"num_bytes": 3, "digest": "y", "tensors": 5}})
    ),
    "a digest that is a list": model(
        "verify", changed(files={"a": {"num_bytes": 3, "digest": [1], "tensors": {}}})
    ),
    "a file above the model": damaged(file("../../etc/passwd")),
    "a file of the system": damaged(file("/etc/passwd")),
    "a file with a NUL": damaged(file("a\0b")),
    "a file of 5000 characters": damaged(file("x" * 5000)),
    "a file that is not there": damaged(file("none.bin")),
    "a weight file cut": damaged(lambda path: os.truncate(path / "model.safetensors", 9000)),
    "a pipe for a weight file": damaged(
        lambda path: [
            (path / "model.safetensors").unlink(),
            os.mkfifo(path / "model.safetensors"),
        ]
    ),
    "reproduce: no manifest": model("reproduce", lambda path: (path / "arm_ray.json").unlink()),
    "reproduce: no configuration": model("reproduce", changed(config=...)),
    "reproduce: a configuration that is a list": model("reproduce", changed(config=[1])),
    "reproduce: a configuration without candidates": model(
        "reproduce", changed(config={"base": "a"})
    ),
    "reproduce: a configuration with unknown keys": model("reproduce", _settings(metod=1)),
    "reproduce: inputs that are a list": model("reproduce", changed(inputs=[1])),
    "reproduce: inputs without a path": model("reproduce", changed(inputs={"base": {}})),
    "reproduce: an environment that is a list": model("reproduce", changed(environment=[1])),
    "reproduce: a base that is not there": model(
        "reproduce", _settings(base="/nowhere"), where="/nowhere"
    ),
    "reproduce: a grader of its own": model(
        "reproduce",
        _scored("evaluation.tasks", [{**_QUESTIONS, "scorer": "evil.py:f"}]),
        says="your own word for it",
    ),
    **{
        f"reproduce: {key} {value}": model("reproduce", _scored(key, value), where=key)
        for key, value in (
            ("evaluation.engine.options", {"trust_remote_code": True, "tokenizer": "evil/repo"}),
            ("evaluation.grading.sandbox", "unsafe_subprocess"),
            ("evaluation.grading.interpreter", "/tmp/evil"),
        )
    },
    "reproduce: a grader of its own, and an override of something else": model(
        "reproduce",
        _scored("evaluation.tasks", [{**_QUESTIONS, "scorer": "evil.py:f"}]),
        "evaluation.engine.kv_cache_gb=2",
        says="your own word for it",
    ),
    "reproduce: code of a family": model(
        "reproduce", _settings(trust_remote_code=["evil"]), says="your own word for it"
    ),
    "push: not whole": model("push", lambda path: (path / "model.safetensors").unlink()),
    "push: a repository above": Malformed(
        lambda place: ["push", str(place.good / "base"), "../../x"], where=""
    ),
    "push: not there": Malformed(lambda place: ["push", str(place.root / "none"), "owner/name"]),
    "push: no token": Malformed(
        lambda place: ["push", str(place.good / "base"), "owner/name"], where=""
    ),
    "gguf: no converter": model("gguf", lambda _path: None, where=""),
    "gguf: not there": Malformed(lambda place: ["gguf", str(place.root / "none")]),
}

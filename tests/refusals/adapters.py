"""LoRA adapters that are damaged, or do not fit their base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.builders.adapters import write_adapter
from tests.refusals.place import Malformed, Place
from tests.refusals.trainers import Harm

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE = "base_model.model.model.layers.0.mlp.up_proj"
_A, _B = f"{_MODULE}.lora_A.weight", f"{_MODULE}.lora_B.weight"


def adapter(change: Callable[[Path], object]) -> Malformed:
    """A merge of an adapter of one module, which is changed."""

    def make(place: Place) -> list[str]:
        path = place.root / "adapter"
        tensors = {_A: torch.full((4, 48), 0.1), _B: torch.full((80, 4), 0.1)}
        write_adapter(path, tensors)
        change(path)
        return place.merge(candidates=[str(path)])

    return Malformed(make)


def settings(**changes: Any) -> Malformed:
    def change(path: Path) -> None:
        content = json.loads((path / _CONFIG).read_text())
        (path / _CONFIG).write_text(json.dumps({**content, **changes}))

    return adapter(change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Malformed:
    def apply(path: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(path / _WEIGHTS).items()}
        (path / _WEIGHTS).unlink()
        change(found)
        save_file(found, path / _WEIGHTS)

    return adapter(apply)


def text(content: bytes) -> Malformed:
    return adapter(lambda path: (path / _CONFIG).write_bytes(content))


def pickle_of(content: Any) -> Malformed:
    def change(path: Path) -> None:
        (path / _WEIGHTS).unlink()
        torch.save(content, path / "adapter_model.bin")

    return adapter(change)


def _link_loop(path: Path) -> None:
    (path / _WEIGHTS).unlink()
    (path / _WEIGHTS).symlink_to(_WEIGHTS)


CASES: dict[str, Malformed] = {
    "A alone": tensors(lambda t: t.pop(_B)),
    "B alone": tensors(lambda t: t.pop(_A)),
    "ranks that differ": tensors(lambda t: t.update({_B: torch.zeros(80, 5)})),
    "another rank than it says": settings(r=16),
    "a rank of nothing": settings(r=0),
    "a rank below zero": settings(r=-4),
    "a rank that is a word": settings(r="four"),
    "a rank that is a fraction": settings(r=4.5),
    "a strength that is a word": settings(lora_alpha="much"),
    "a strength that is null": settings(lora_alpha=None),
    "a strength without end": settings(lora_alpha=float("inf")),
    "ranks of modules as a list": settings(rank_pattern=[4]),
    "a pattern that is no expression": settings(rank_pattern={"(((": 8}),
    "a pattern that takes for ever": settings(rank_pattern={"(a+)+$" + "a" * 40: 8}),
    "A of another width": tensors(lambda t: t.update({_A: torch.zeros(4, 7)})),
    "A of three dimensions": tensors(lambda t: t.update({_A: torch.zeros(4, 48, 1)})),
    "A of whole numbers": tensors(lambda t: t.update({_A: torch.zeros(4, 48, dtype=torch.int8)})),
    "A that is not a number": tensors(lambda t: t.update({_A: torch.full((4, 48), float("nan"))})),
    "a module that the base lacks": tensors(
        lambda t: t.update({n.replace("layers.0", "layers.77"): t.pop(n) for n in (_A, _B)})
    ),
    "a tensor of an unknown kind": tensors(lambda t: t.update({"more": torch.zeros(3)})),
    "no tensors": tensors(lambda t: t.clear()),
    "no weights": adapter(lambda path: (path / _WEIGHTS).unlink()),
    "weights cut": adapter(lambda path: os.truncate(path / _WEIGHTS, 200)),
    "weights that are a directory": adapter(
        lambda path: [(path / _WEIGHTS).unlink(), (path / _WEIGHTS).mkdir()]
    ),
    "weights that are a pipe": adapter(
        lambda path: [(path / _WEIGHTS).unlink(), os.mkfifo(path / _WEIGHTS)]
    ),
    "weights that link to themselves": adapter(_link_loop),
    "a pickle that runs a command": pickle_of(Harm()),
    "a pickle that is a list": pickle_of([1]),
    "a pickle without tensors": pickle_of({"a": 1}),
    "a pickle with a number for a name": pickle_of({5: torch.zeros(2)}),
    "settings that are no JSON": text(b"{"),
    "settings that are a list": text(b"[]"),
    "settings that are no text": text(b"\xff\xfe"),
    "settings of brackets": text(b"[" * 100_000),
    "another kind of adapter": settings(peft_type="PROMPT_TUNING"),
    "a kind that is a number": settings(peft_type=7),
    "an initialisation that changes the base": settings(init_lora_weights="pissa"),
    "layers repeated": settings(layer_replication=[[0, 2]]),
    "biases of an unknown kind": settings(bias="some"),
    "no base to add it to": Malformed(
        lambda place: [
            "evaluate",
            f"a={_written(place)}",
            "--tasks",
            "quiz",
            "--set",
            _quiz(place),
            "--output",
            str(place.root / "scores"),
        ]
    ),
    "a base above the directory": Malformed(lambda place: _based(place, "../../../../etc")),
    "a base that is a file of the system": Malformed(lambda place: _based(place, "/etc/passwd")),
    "a base with a NUL": Malformed(lambda place: _based(place, "a\0b")),
    "a base that is a list": Malformed(lambda place: _based(place, ["a"])),
}


def _written(place: Place) -> Path:
    return write_adapter(place.root / "adapter", {_A: torch.zeros(4, 48), _B: torch.zeros(80, 4)})


def _quiz(place: Place) -> str:
    file = place.file("quiz.jsonl", '{"question": "1 + 1?", "answer": "2"}\n')
    return f"evaluation.tasks=[{{name: quiz, type: questions, path: {file}}}]"


def _based(place: Place, base: Any) -> list[str]:
    """A configuration written from checkpoints that say what they were trained on."""
    run = place.root / "training"
    for step in (10, 20):
        path = run / f"checkpoint-{step}"
        write_adapter(
            path,
            {_A: torch.zeros(4, 48), _B: torch.zeros(80, 4)},
            base_model_name_or_path=base,
        )
        shutil.copy(path / _CONFIG, path / "trainer_state.json")
    return ["init", str(run), "--yes", "--output", str(place.root / "merge.yaml")]

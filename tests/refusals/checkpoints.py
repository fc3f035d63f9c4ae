"""Checkpoints as safetensors that are damaged, or do not fit each other."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.builders import hostile
from tests.builders.hostile import INDEX, WEIGHTS, config, in_place_of, text
from tests.refusals.place import Malformed, Place

Tensors = dict[str, torch.Tensor]
_NAME = "model.layers.0.mlp.up_proj.weight"


def candidate(change: Callable[[Path], object]) -> Malformed:
    """A merge of which a candidate is changed."""

    def make(place: Place) -> list[str]:
        path = place.root / "checkpoint"
        shutil.copytree(place.good / "checkpoint-10", path)
        change(path)
        return place.merge(candidates=[str(path)])

    return Malformed(make)


def weights(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Change the tensors of a checkpoint."""

    def apply(path: Path) -> None:
        file = path / WEIGHTS
        tensors = {name: t.clone() for name, t in load_file(file).items()}
        file.unlink()
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def _number(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[_NAME][0, 0] = value

    return change


def _put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def _zeros_at_the_end(path: Path) -> None:
    file = path / WEIGHTS
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-20_000] + bytes(20_000))


def _bomb(path: Path) -> None:
    """A header that says a terabyte, in a file with holes."""
    table = {_NAME: {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}
    raw = json.dumps(table).encode()
    (path / WEIGHTS).unlink()
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 2**40)


def _header(content: bytes) -> Callable[[Path], None]:
    """A weight file with this header, and no data."""

    def change(path: Path) -> None:
        (path / WEIGHTS).unlink()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content)

    return change


def _large_header(path: Path) -> None:
    (path / WEIGHTS).unlink()
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b'{"a": "')
        file.truncate(2 * 10**8)


def _two_files(path: Path) -> None:
    """An index of two files, of which one is cut."""
    tensors = load_file(path / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    owners = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, path / name)
        owners |= dict.fromkeys(part, name)
    (path / WEIGHTS).unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": owners}))
    os.truncate(path / "model-00002-of-00002.safetensors", 1000)


def _lacking_in_file(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    owners = dict.fromkeys([*tensors, "model.layers.9.more"], "part.safetensors")
    (path / WEIGHTS).rename(path / "part.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": owners}))


CASES: dict[str, Malformed] = {
    **{name: candidate(change) for name, change in hostile.CASES.items()},
    "an infinite weight": candidate(weights(_number(float("inf")))),
    "a weight that is not a number": candidate(weights(_number(float("nan")))),
    "a tensor less": candidate(weights(lambda t: t.pop(_NAME))),
    "another shape": candidate(weights(_put(_NAME, torch.zeros(3, 5)))),
    "a weight of no dimensions": candidate(weights(_put(_NAME, torch.zeros(())))),
    "a weight without elements": candidate(weights(_put(_NAME, torch.zeros(0, 48)))),
    "a weight of whole numbers": candidate(
        weights(_put(_NAME, torch.zeros(80, 48, dtype=torch.int32)))
    ),
    "no tensors at all": candidate(weights(lambda t: t.clear())),
    "zeros at the end": candidate(_zeros_at_the_end),
    "a terabyte with holes": candidate(_bomb),
    "a large header of zeros": candidate(_large_header),
    "a header of millions of empty tensors": candidate(
        _header(b"{" + b'"x":{},' * (1 << 22) + b'"x":{}}')
    ),
    "a header whose last name was there before": candidate(
        _header(json.dumps({f"t{i}": 0 for i in range(1 << 18)}).encode()[:-1] + b', "t0": 0}')
    ),
    "a configuration of millions of lists": candidate(
        text("config.json", b"[" + b"[]," * 10_000_000 + b"[]]")
    ),
    "an index of more than any text": candidate(
        lambda path: [
            (path / WEIGHTS).unlink(),
            (path / INDEX).write_bytes(b'{"weight_map": {"a": "' + b"x" * (1 << 26) + b'"}}'),
        ]
    ),
    "one of two files cut": candidate(_two_files),
    "a tensor that its file lacks": candidate(_lacking_in_file),
    "another width": candidate(config(hidden_size=96)),
    "another number of layers": candidate(config(num_hidden_layers=2)),
    "another family": candidate(config(model_type="qwen2")),
    "another vocabulary": candidate(config(vocab_size=77)),
    "pickles alone": candidate(lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin")),
    "stray weight files": candidate(lambda path: (path / WEIGHTS).rename(path / "x.safetensors")),
    "no weights": candidate(lambda path: (path / WEIGHTS).unlink()),
    "no configuration and no weights": candidate(
        lambda path: [file.unlink() for file in list(path.iterdir())]
    ),
    "a socket for a configuration": candidate(in_place_of("config.json", lambda f: _socket(f))),
    "a configuration of two objects": candidate(text("config.json", b'{"a": 1} {"b": 2}')),
    "a configuration with a key twice": candidate(
        text("config.json", b'{"model_type": "llama", "model_type": 7}')
    ),
    "a loop of directories": Malformed(lambda place: _loop(place)),
    "a file for a directory": Malformed(
        lambda place: place.merge(candidates=[str(place.file("checkpoint", "x"))])
    ),
    "not there": Malformed(
        lambda place: place.merge(candidates=[str(place.root / "checkpoint-1")])
    ),
    "a path with a NUL": Malformed(lambda place: place.merge(candidates=["/a\0b"]), where="merge"),
    "a path of 5000 characters": Malformed(
        lambda place: place.merge(candidates=["/" + "x" * 5000]), where="xxx"
    ),
    "an unknown format before the path": Malformed(
        lambda place: place.merge(candidates=["zip:" + str(place.good / "checkpoint-10")]),
        where="zip:",
    ),
    "the wrong format before the path": Malformed(
        lambda place: place.merge(candidates=["zero:" + str(place.good / "checkpoint-10")]),
        where="checkpoint-10",
    ),
    "no permission": Malformed(
        lambda place: place.merge(candidates=["/proc/1/fdinfo/x"]), where="/proc"
    ),
    "a damaged tokenizer": Malformed(lambda place: _tokenizer(place, b'{"version": ')),
    "a tokenizer of brackets": Malformed(lambda place: _tokenizer(place, b"[" * 100_000)),
    "a tokenizer that is a list": Malformed(lambda place: _tokenizer(place, b"[1]")),
    "an empty tokenizer": Malformed(lambda place: _tokenizer(place, b"")),
    "a base whose weights are cut": Malformed(lambda place: _base(place)),
}


def _socket(path: Path) -> None:
    import socket

    here = os.getcwd()
    # Names of sockets are short.
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _loop(place: Place) -> list[str]:
    (place.root / "a").symlink_to("b")
    (place.root / "b").symlink_to("a")
    return place.merge(candidates=[str(place.root / "a")])


def _tokenizer(place: Place, content: bytes) -> list[str]:
    shutil.copytree(place.good / "base", place.root / "base")
    (place.root / "base" / "tokenizer.json").write_bytes(content)
    arguments = place.calibrated(place.good / "calibration.jsonl")
    return [*arguments, f"base={place.root / 'base'}"]


def _base(place: Place) -> list[str]:
    shutil.copytree(place.good / "base", place.root / "base")
    os.truncate(place.root / "base" / WEIGHTS, 5000)
    return place.merge(base=str(place.root / "base"))

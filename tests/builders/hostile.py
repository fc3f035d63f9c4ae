"""Changes to a checkpoint that somebody made to do harm, or that a broken disk has left.

Each is one fault: a name, and what is done to the directory of a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a weight file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(file: Path, header: bytes, data: bytes) -> None:
    file.unlink()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def first_tensor(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the row of the first matrix in the header."""

    def apply(path: Path) -> None:
        table, data = parts(path / WEIGHTS)
        row = next(r for n, r in table.items() if n != "__metadata__" and len(r["shape"]) == 2)
        change(row)
        put(path / WEIGHTS, json.dumps(table).encode(), data)

    return apply


def header(make: Callable[[dict[str, Any]], bytes]) -> Change:
    def apply(path: Path) -> None:
        table, data = parts(path / WEIGHTS)
        put(path / WEIGHTS, make(table), data)

    return apply


def twice(table: dict[str, Any]) -> bytes:
    name = next(n for n in table if n != "__metadata__")
    return f"{json.dumps(table)[:-1]}, {json.dumps(name)}: {json.dumps(table[name])}}}".encode()


def over_each_other(table: dict[str, Any]) -> bytes:
    names = [n for n in table if n != "__metadata__"]
    table[names[1]] = dict(table[names[0]])
    return json.dumps(table).encode()


def in_place_of(name: str, make: Callable[[Path], object]) -> Change:
    def apply(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return apply


def index(file: object) -> Change:
    """Name a weight file in an index, which then is the only one that is looked for."""

    def apply(path: Path) -> None:
        table, _ = parts(path / WEIGHTS)
        names = [n for n in table if n != "__metadata__"]
        (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        (path / WEIGHTS).unlink()

    return apply


def config(**changes: Any) -> Change:
    def apply(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **changes}))

    return apply


def text(name: str, content: bytes) -> Change:
    return in_place_of(name, lambda file: file.write_bytes(content))


def _pipe_for_index(path: Path) -> None:
    (path / WEIGHTS).unlink()
    os.mkfifo(path / INDEX)


CASES: dict[str, Change] = {
    "dimensions below zero": first_tensor(lambda r: r.update(shape=[-n for n in r["shape"]])),
    "fractions for dimensions": first_tensor(
        lambda r: r.update(shape=[n + 0.5 for n in r["shape"]])
    ),
    "true for a dimension": first_tensor(lambda r: r.update(shape=[True, *r["shape"]])),
    "words for dimensions": first_tensor(lambda r: r.update(shape="many")),
    "no dimensions": first_tensor(lambda r: r.pop("shape")),
    "a dimension too many": first_tensor(lambda r: r["shape"].append(3)),
    "offsets that go back": first_tensor(lambda r: r["data_offsets"].reverse()),
    "offsets as words": first_tensor(
        lambda r: r.update(data_offsets=[str(n) for n in r["data_offsets"]])
    ),
    "offsets below zero": first_tensor(lambda r: r.update(data_offsets=[-8, 8])),
    "offsets beyond all files": first_tensor(lambda r: r.update(data_offsets=[2**63, 2**64])),
    "one offset": first_tensor(lambda r: r["data_offsets"].pop()),
    "an unknown dtype": first_tensor(lambda r: r.update(dtype="F3")),
    "a number as dtype": first_tensor(lambda r: r.update(dtype=5)),
    "a wider dtype": first_tensor(lambda r: r.update(dtype="F64")),
    "a row that is a list": header(lambda t: json.dumps({n: [1, 2] for n in t}).encode()),
    "a tensor twice": header(twice),
    "two tensors over each other": header(over_each_other),
    "a header that is a list": header(lambda _t: b"[]"),
    "a header of brackets": header(lambda _t: b"[" * 100_000 + b"]" * 100_000),
    "a deep metadata": header(
        lambda _t: b'{"__metadata__": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001
    ),
    "a header that is no JSON": header(lambda _t: b'{"a": NaN, }'),
    "a header that is no text": header(lambda _t: b'{"\xff\xfe": 1}'),
    "an empty header": header(lambda _t: b""),
    "an empty weight file": text(WEIGHTS, b""),
    "seven bytes": text(WEIGHTS, b"1234567"),
    "a header longer than the file": text(WEIGHTS, struct.pack("<Q", 2**40) + b"{}"),
    "a header of 2^63 bytes": text(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
    "a pickle as weight file": text(WEIGHTS, b"\x80\x04}\x94."),
    "a pipe as weight file": in_place_of(WEIGHTS, os.mkfifo),
    "a pipe as config.json": in_place_of("config.json", os.mkfifo),
    "a pipe as index": _pipe_for_index,
    "a device as weight file": in_place_of(WEIGHTS, lambda f: f.symlink_to("/dev/zero")),
    "a device as config.json": in_place_of("config.json", lambda f: f.symlink_to("/dev/zero")),
    "a directory as weight file": in_place_of(WEIGHTS, lambda f: f.mkdir()),
    "a directory as config.json": in_place_of("config.json", lambda f: f.mkdir()),
    "a link to itself": in_place_of(WEIGHTS, lambda f: f.symlink_to(f.name)),
    "a link to nothing": in_place_of(WEIGHTS, lambda f: f.symlink_to("gone")),
    "an index to the directory above": index("../other/model.safetensors"),
    "an index to an absolute path": index("/etc/passwd"),
    "an index with a number": index(5),
    "an index with null": index(None),
    "an index with a NUL": index("a\0b.safetensors"),
    "an index with a list": index(["model.safetensors"]),
    "an index to itself": index(INDEX),
    "an index without a map": lambda path: (
        index("x")(path),
        (path / INDEX).write_text('{"weight_map": [1]}'),
    )[0],
    "ten million layers": config(num_hidden_layers=10**7),
    "layers below zero": config(num_hidden_layers=-1),
    "no layers": config(num_hidden_layers=0),
    "words for a width": config(hidden_size="many"),
    "no heads": config(num_attention_heads=0),
    "a family that is a number": config(model_type=7),
    "a family that is null": config(model_type=None),
    "a configuration that is a list": text("config.json", b"[1, 2]"),
    "a configuration of brackets": text("config.json", b"[" * 200_000),
    "a configuration that is no text": text("config.json", b"\xff\xfe\x00"),
    "an integer of ten thousand digits": text(
        "config.json", b'{"model_type": "llama", "vocab_size": ' + b"9" * 10_000 + b"}"
    ),
    "an empty configuration": text("config.json", b""),
    "a configuration cut off": text("config.json", b'{"model_type": "lla'),
}

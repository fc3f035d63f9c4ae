"""Calibration data that are none, or not what their name says."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

from tests.refusals.place import Malformed, Place

_ROW = json.dumps({"text": "seven red apples"}) + "\n"


def data(content: str | bytes, name: str = "data.jsonl", says: str = "", **keys: Any) -> Malformed:
    """A merge with a file of this content as its data."""
    return Malformed(lambda place: place.calibrated(place.file(name, content), **keys), says=says)


def rows(*given: Any, **keys: Any) -> Malformed:
    return data("".join(json.dumps(row) + "\n" for row in given), **keys)


def made(make: Callable[[Place], object], name: str = "data.jsonl") -> Malformed:
    def all_of(place: Place) -> list[str]:
        make(place)
        return place.calibrated(place.root / name)

    return Malformed(all_of)


def chat(*messages: Any) -> Malformed:
    return rows(*({"messages": list(messages)} for _ in range(4)))


def _parquet(change: Callable[[bytes], bytes]) -> Malformed:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    def make(place: Place) -> list[str]:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": ["seven red apples"] * 200}), buffer)
        return place.calibrated(place.file("data.parquet", change(buffer.getvalue())))

    return Malformed(make)


def _columns(**columns: Any) -> Malformed:
    def make(place: Place) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), place.root / "data.parquet")
        return place.calibrated(place.root / "data.parquet")

    return Malformed(make)


def _gzip_bomb(_place: Place) -> bytes:
    """400 MB in one line, which take half a megabyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(b'{"text": "')]
    parts += [packer.compress(b"x" * (1 << 24)) for _ in range(25)]
    return b"".join([*parts, packer.flush()])


def _long_line(place: Place) -> None:
    with place.file("data.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)


CASES: dict[str, Malformed] = {
    "not there": Malformed(lambda place: place.calibrated(place.root / "none.jsonl")),
    "empty": data(""),
    "blank lines": data("\n\n  \n"),
    "no JSON": data("seven red apples\n"),
    "a list": data("[1, 2]\n"),
    "one JSON array of all rows": data(json.dumps([{"text": "a"}], indent=1)),
    "a number": data("17\n"),
    "null": data("null\n"),
    "a row cut off": data(_ROW * 3 + '{"text": "seven'),
    "two objects in a line": data('{"text": "a"} {"text": "b"}\n'),
    "single quotes": data("{'text': 'a'}\n"),
    "no UTF-8": data(b'{"text": "caf\xe9"}\n'),
    "UTF-16": data('{"text": "a"}\n'.encode("utf-16")),
    "NUL bytes": data(b"\0" * 4096),
    "binary": data(bytes(range(256)) * 64),
    "brackets": data("[" * 100_000 + "\n"),
    "an integer of ten thousand digits": data('{"text": ' + "9" * 10_000 + "}\n"),
    "a line of 100 MB without an end": made(_long_line),
    "a packed line of 400 MB": Malformed(
        lambda place: place.calibrated(place.file("data.jsonl.gz", _gzip_bomb(place)))
    ),
    "gzip that is none": data(_ROW, "data.jsonl.gz"),
    "gzip cut off": data(gzip.compress(_ROW.encode() * 500)[:-20], "data.jsonl.gz"),
    "gzip damaged": data(gzip.compress(_ROW.encode() * 500)[:20] + b"\xff" * 30, "data.jsonl.gz"),
    "gzip with another sum": data(gzip.compress(_ROW.encode())[:-8] + bytes(8), "data.jsonl.gz"),
    "Parquet cut off": _parquet(lambda content: content[: len(content) // 2]),
    "Parquet without its end": _parquet(lambda content: content[:-4]),
    "Parquet of zeros": _parquet(lambda content: bytes(len(content))),
    "Parquet whose table is damaged": _parquet(
        lambda content: content[:-60] + b"\xff" * 40 + content[-20:]
    ),
    "Parquet whose data are damaged": _parquet(
        lambda content: content[:4] + b"\xff" * 60 + content[64:]
    ),
    "Parquet that is empty": _parquet(lambda _content: b""),
    "Parquet of numbers": _columns(text=[1, 2, 3]),
    "Parquet of other columns": _columns(words=["a"]),
    "Parquet without rows": _columns(text=[]),
    "a file of an unknown kind": data(_ROW, "data.csv"),
    "a name without an ending": data(_ROW, "data"),
    "a directory without files": made(lambda place: (place.root / "data.jsonl").mkdir()),
    "a directory of other files": made(lambda place: place.file("data.jsonl/x.csv", "a,b")),
    "two splits": made(
        lambda place: [
            place.file("data.jsonl/train/a.jsonl", _ROW),
            place.file("data.jsonl/test/a.jsonl", _ROW),
        ]
    ),
    "a split of a file": data(_ROW, split="train"),
    "a pattern without files": Malformed(lambda place: place.calibrated(place.root / "*.jsonl")),
    "a pipe": made(lambda place: os.mkfifo(place.root / "data.jsonl")),
    "Parquet that is a pipe": made(
        lambda place: os.mkfifo(place.root / "data.parquet"), "data.parquet"
    ),
    "Parquet that is a device": made(
        lambda place: (place.root / "data.parquet").symlink_to("/dev/zero"), "data.parquet"
    ),
    "Parquet that is a directory": made(
        lambda place: (place.root / "data.parquet").mkdir(), "data.parquet"
    ),
    "a device": made(lambda place: (place.root / "data.jsonl").symlink_to("/dev/zero")),
    "a link to itself": made(lambda place: (place.root / "data.jsonl").symlink_to("data.jsonl")),
    "a link to nothing": made(lambda place: (place.root / "data.jsonl").symlink_to("gone.jsonl")),
    "other columns": rows({"words": "a"}),
    "a column that is missing in a row": rows(*[{"text": "a"}] * 3, {"words": "b"}),
    "texts that are empty": rows(*[{"text": ""}] * 4),
    "texts that are null": rows(*[{"text": None}] * 4),
    "a text that is a number": rows(*[{"text": 5}] * 4),
    "a text that is a list": rows(*[{"text": ["a"]}] * 4),
    "a named column that is not there": rows({"text": "a"}, format="text", text_column="body"),
    "a format that is not there": rows({"text": "a"}, format="messages"),
    "a prompt without a completion": rows({"prompt": "a"}),
    "a prompt of text and a completion of messages": rows(
        *[{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}] * 4
    ),
    "an instruction with an input": rows({"instruction": "a", "input": "b", "output": "c"}),
    "messages that are text": rows(*[{"messages": "hello"}] * 4),
    "messages that are empty": rows(*[{"messages": []}] * 3, {"messages": [1]}),
    "a message that is a word": chat("hello"),
    "a message without a role": chat({"content": "a"}),
    "a role that is a number": chat({"role": 5, "content": "a"}),
    "a role that is a list": chat({"role": ["user"], "content": "a"}),
    "ShareGPT: an unknown speaker": rows(
        *[{"conversations": [{"from": "moon", "value": "a"}]}] * 4
    ),
    "ShareGPT: a speaker that is a number": rows(*[{"conversations": [{"from": 1}]}] * 4),
    "ShareGPT: a conversation that is a mapping": rows(*[{"conversations": {"from": "human"}}] * 4),
    "tools that are no JSON": rows(
        *[{"messages": [{"role": "user", "content": "a"}], "tools": "[{"}] * 4
    ),
    "tools that are a number": rows(
        *[{"messages": [{"role": "user", "content": "a"}], "tools": 5}] * 4
    ),
    "a hub id that nobody has": Malformed(
        lambda place: place.calibrated("nobody/nothing-at-all:train"), where="nobody/nothing"
    ),
    "a hub id that reads pickles": Malformed(lambda place: place.calibrated("pandas"), where=""),
    "a data set on disk that is damaged": made(
        lambda place: [
            place.file("data.jsonl/state.json", "{"),
            place.file("data.jsonl/dataset_info.json", "{}"),
        ]
    ),
}

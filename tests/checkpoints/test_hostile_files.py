"""Files that somebody made to do harm, or that a broken disk has left: each is an error of ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.weight_file import parse_header, read_tensors
from arm_ray.errors import ArmRayError, CorruptCheckpointError
from arm_ray.model.checks import layout_of
from arm_ray.storage.regular import open_regular, read_text
from tests.builders.models import save, tiny_model

Change = Callable[[Path], None]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Nothing here takes a second; what hangs would hang for ever.
_HANGS_S = 20


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """End what waits for ever, so that it fails and does not stop all other tests."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("smollm2", seed=1), tmp_path_factory.mktemp("good") / "model")


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
        table, data = parts(path / _WEIGHTS)
        row = next(r for n, r in table.items() if n != "__metadata__" and len(r["shape"]) == 2)
        change(row)
        put(path / _WEIGHTS, json.dumps(table).encode(), data)

    return apply


def header(make: Callable[[dict[str, Any]], bytes]) -> Change:
    def apply(path: Path) -> None:
        table, data = parts(path / _WEIGHTS)
        put(path / _WEIGHTS, make(table), data)

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
        table, _ = parts(path / _WEIGHTS)
        names = [n for n in table if n != "__metadata__"]
        (path / _INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        (path / _WEIGHTS).unlink()

    return apply


def config(**changes: Any) -> Change:
    def apply(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **changes}))

    return apply


def text(name: str, content: bytes) -> Change:
    return in_place_of(name, lambda file: file.write_bytes(content))


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
    "an empty weight file": text(_WEIGHTS, b""),
    "seven bytes": text(_WEIGHTS, b"1234567"),
    "a header longer than the file": text(_WEIGHTS, struct.pack("<Q", 2**40) + b"{}"),
    "a header of 2^63 bytes": text(_WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
    "a pickle as weight file": text(_WEIGHTS, b"\x80\x04}\x94."),
    "a pipe as weight file": in_place_of(_WEIGHTS, os.mkfifo),
    "a pipe as config.json": in_place_of("config.json", os.mkfifo),
    "a pipe as index": lambda path: (
        in_place_of(_WEIGHTS, lambda _f: None)(path),
        os.mkfifo(path / _INDEX),
    )[1],
    "a device as weight file": in_place_of(_WEIGHTS, lambda f: f.symlink_to("/dev/zero")),
    "a device as config.json": in_place_of("config.json", lambda f: f.symlink_to("/dev/zero")),
    "a directory as weight file": in_place_of(_WEIGHTS, lambda f: f.mkdir()),
    "a directory as config.json": in_place_of("config.json", lambda f: f.mkdir()),
    "a link to itself": in_place_of(_WEIGHTS, lambda f: f.symlink_to(f.name)),
    "a link to nothing": in_place_of(_WEIGHTS, lambda f: f.symlink_to("gone")),
    "an index to the directory above": index("../other/model.safetensors"),
    "an index to an absolute path": index("/etc/passwd"),
    "an index with a number": index(5),
    "an index with null": index(None),
    "an index with a NUL": index("a\0b.safetensors"),
    "an index with a list": index(["model.safetensors"]),
    "an index to itself": index(_INDEX),
    "an index without a map": lambda path: (
        index("x")(path),
        (path / _INDEX).write_text('{"weight_map": [1]}'),
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


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(good, path)
    CASES[name](path)
    before = sorted(p.name for p in path.iterdir())

    def use() -> None:
        opened = open_given(str(path))
        opened.read(list(opened.tensors))
        layout_of(opened)

    with no_hang(), pytest.raises(ArmRayError) as caught:
        use()
    error = caught.value
    # What, where, and what to do; and nothing was written.
    assert error.what
    assert str(path) in (error.where or "")
    assert error.hint or error.got
    assert sorted(p.name for p in path.iterdir()) == before


def test_the_untouched_checkpoint_is_read(good: Path) -> None:
    opened = open_given(str(good))
    assert opened.read(list(opened.tensors)).keys() == opened.tensors.keys()
    assert layout_of(opened).num_layers == 3


def test_a_link_into_a_cache_is_followed(good: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: files of a snapshot are links to blobs outside of it."""
    path = tmp_path / "model"
    path.mkdir()
    for file in good.iterdir():
        (path / file.name).symlink_to(file)
    opened = open_given(str(path))
    assert opened.read(list(opened.tensors)).keys() == opened.tensors.keys()


_HEADER = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
).encode()
_FILE = struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(range(32))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(_FILE) - 1), st.binary(max_size=6), st.integers(0, 6)),
        max_size=5,
    ),
    cut=st.integers(0, len(_FILE)),
    tail=st.binary(max_size=9),
)
def test_no_bytes_are_read_as_what_they_are_not(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, bytes, int]],
    cut: int,
    tail: bytes,
) -> None:
    """Whatever is in a file: an error of ours, or what the library reads there too."""
    content = _FILE
    for place, inserted, removed in edits:
        content = content[:place] + inserted + content[place + removed :]
    content = content[: max(cut, len(content) // 2)] + tail
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        entries = parse_header(file, len(content), lambda begin, end: content[begin:end])
    except CorruptCheckpointError:
        return
    total = 0
    for entry in entries.values():
        assert 8 <= entry.begin <= entry.end <= len(content)
        total += entry.num_bytes
    assert total <= len(content)
    with contextlib.suppress(CorruptCheckpointError):
        found = read_tensors(file, entries)
        assert all(tuple(found[name].shape) == entry.shape for name, entry in entries.items())


def test_a_text_without_end_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_bytes(b"x" * 101)
    assert read_text(file, most=101) == "x" * 101
    with pytest.raises(OSError, match="more than 100 bytes"):
        read_text(file, most=100)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/null"), "a device")):
        with no_hang(), pytest.raises(OSError, match=f"no file, but {kind}"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)

"""Files that somebody made to do harm, or that a broken disk has left: each is an error of ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.weight_file import parse_header, read_tensors
from arm_ray.errors import ArmRayError, CorruptCheckpointError
from arm_ray.events import read_events
from arm_ray.model.checks import layout_of
from arm_ray.report.run_record import json_lines
from arm_ray.storage.regular import log_lines, open_regular, read_text
from arm_ray.training.records import read_log
from tests.builders.hostile import CASES
from tests.builders.models import save, tiny_model
from tests.waiting import no_hang


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("smollm2", seed=1), tmp_path_factory.mktemp("good") / "model")


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


def test_a_log_without_end_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'\n{"event": "a"}\r\n\n{"event": "b"}')
    lines = [b'{"event": "a"}', b'{"event": "b"}']
    assert list(log_lines(file, most=file.stat().st_size)) == lines
    with pytest.raises(OSError, match="more than 20 bytes"):
        list(log_lines(file, most=20))
    # A line of a gigabyte, which is not read to its end.
    os.truncate(file, 1 << 30)
    assert read_log(file) == json_lines(file) == []
    with pytest.raises(OSError, match="more than"):
        read_events(file)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/null"), "a device")):
        with no_hang(), pytest.raises(OSError, match=f"no file, but {kind}"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)

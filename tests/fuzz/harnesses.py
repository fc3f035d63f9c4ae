"""The harnesses, and whole inputs that mutations begin with."""

from __future__ import annotations

import contextlib
import encodings
import itertools
import json
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from arm_ray.calibration.files import index_file, read_rows
from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.huggingface import read_entries
from arm_ray.checkpoints.weight_file import parse_header
from arm_ray.config import load_merge_config
from arm_ray.errors import ArmRayError
from arm_ray.events import read_events
from arm_ray.report.run_record import open_record
from arm_ray.report.status import status_of

_DIRECTORY = Path(tempfile.mkdtemp(prefix="fuzz-"))
# What a pickle may not lead to, however it is made: as Python's audit hooks call it.
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile"),
    *("import", "socket.connect", "os.remove", "os.rename", "shutil.rmtree", "ctypes.dlopen"),
    "pickle.find_class",
)


def _file(name: str, data: bytes) -> Path:
    path = _DIRECTORY / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def headers(data: bytes) -> None:
    """The table of a weight file: places within the file, and none over another."""
    try:
        entries = parse_header(Path("x"), len(data), lambda begin, end: data[begin:end])
    except ArmRayError:
        return
    places = sorted((entry.begin, entry.end) for entry in entries.values())
    assert all(8 <= begin <= end <= len(data) for begin, end in places)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))


def unpickled(data: bytes) -> None:
    """A pickle, plain or torch's: nothing that is not known is looked up, and nothing is run."""
    file = _file("x.pt", data)
    with _nothing_run(), contextlib.suppress(ArmRayError):
        pickles.load(file)
    known = {"torch.Size": torch.Size, "known.Record": pickles.StandIn}
    with _nothing_run(), contextlib.suppress(ArmRayError):
        pickles.unpickle(file, known)


_watched: list[bool] = [False]
_run: list[str] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    # A hook cannot be taken away again.
    if _watched[0] and event in _FORBIDDEN and not _is_encoding(event, arguments):
        _run.append(f"{event} {arguments[:1]}")


def _is_encoding(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether Python loads one of its own encodings, which texts in archives and pickles name."""
    if event == "import":
        return str(arguments[0]).startswith("encodings")
    code = arguments[0] if event == "exec" else None
    return Path(getattr(code, "co_filename", "")).parent == Path(encodings.__file__).parent


sys.addaudithook(_audit)


@contextlib.contextmanager
def _nothing_run() -> Iterator[None]:
    _run.clear()
    _watched[0] = True
    try:
        yield
    finally:
        _watched[0] = False
    assert _run == [], f"a pickle led to {_run}"


def configurations(data: bytes) -> None:
    """A configuration: one that is written out reads back the same."""
    try:
        config = load_merge_config(_file("x.yaml", data))
    except ArmRayError:
        return
    again = load_merge_config(_file("x.yaml", config.to_yaml().encode()))
    assert again == config


def calibration(data: bytes) -> None:
    """Rows of calibration data: as many are read as were counted."""
    path = str(_file("x.jsonl", data))
    try:
        index = index_file(path)
        for chunk in index.chunks:
            numbers = list(range(chunk.first_row, chunk.first_row + chunk.num_rows))
            assert len(list(read_rows(path, chunk, numbers, list(index.columns)))) == len(numbers)
    except ArmRayError:
        return


def events(data: bytes) -> None:
    """Events of a run: what is none is left out, and the status is told."""
    run = _DIRECTORY / "run"
    run.mkdir(exist_ok=True)
    (run / "events.jsonl").write_bytes(data)
    assert all(isinstance(event["event"], str) for event in read_events(run / "events.jsonl"))
    assert open_record(run).path == run
    json.dumps(status_of(run, now=1e9).to_dict())


def indexes(data: bytes) -> None:
    """An index of weight files: no file is asked for that is not in the directory."""
    name = "model.safetensors.index.json"
    path = _file(name, data).parent
    asked: list[str] = []

    def read(file: str) -> dict[str, object]:
        asked.append(file)
        return {}

    with contextlib.suppress(ArmRayError):
        read_entries(path, {name, "a.safetensors"}, read)  # type: ignore[arg-type]
    assert set(asked) <= {"a.safetensors", name}


@dataclass(frozen=True)
class Harness:
    """What is given bytes, and whole inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _saved(content: object) -> bytes:
    path = _DIRECTORY / "seed.pt"
    torch.save(content, path)
    return path.read_bytes()


_HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
).encode()
_EVENT = {"time": 1.0, "event": "iteration_finished", "iteration": 1, "seconds": 2.0}
_STARTED = {"time": 0.5, "event": "run_started", "max_iterations": 3}

HARNESSES: Mapping[str, Harness] = {
    "headers": Harness(headers, (struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(range(32)),)),
    "pickles": Harness(
        unpickled,
        (
            _saved({"a": torch.arange(6.0), "b": [1, "x", (2.5, None)]}),
            pickle.dumps({"a": [1, 2], "b": ("x", 3.5, b"y"), "c": {1, 2}}, 4),
            pickle.dumps({"a": torch.Size([2, 3])}, 2),
            b"cos\nsystem\n(S'true'\ntR.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        ),
    ),
    "configurations": Harness(
        configurations,
        (
            b"base: a\ncandidates: [b, c]\noutput: d\nmethod: {operator: task_arithmetic}\n",
            b"base: &a x\ncandidates: [*a]\noutput: y\nschedule: {tolerance: 1e-4}\n"
            b"method:\n  operator: ties\n  coefficient: 0.5\n",
        ),
    ),
    "calibration": Harness(
        calibration,
        (
            b'{"text": "seven"}\n{"text": "red", "x": [1, {"y": null}]}\n',
            b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "a"}]}\n\n',
        ),
    ),
    "events": Harness(
        events, (f"{json.dumps(_STARTED)}\n{json.dumps(_EVENT)}\n".encode(), b'{"event": "x"}\n')
    ),
    "indexes": Harness(
        indexes,
        (
            b'{"weight_map": {"a": "a.safetensors", "b": "../x.safetensors"}}',
            b'{"metadata": {}, "weight_map": {"a": "a.safetensors"}}',
        ),
    ),
}

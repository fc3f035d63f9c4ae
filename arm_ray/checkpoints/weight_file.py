"""One `.safetensors` weight file: reading its header, and writing it tensor by tensor.

The header is parsed here, rather than by the library, to learn sizes and offsets without opening
the data, and to tell a truncated file from a whole one with a message that names the numbers.
Tensors are read by the library.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from arm_ray.errors import CorruptCheckpointError, NumericalError
from arm_ray.storage.atomic import atomic_file as atomic_file
from arm_ray.storage.atomic import start_write_back
from arm_ray.storage.atomic import write_json as write_json
from arm_ray.storage.regular import check_values, open_regular

# Name in the file -> torch dtype, for what a language model's weights are stored in.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# The same for everything that is carried over as it is.
STORED_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # Powers of two, as scales; torch 2.7 and later.
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}
_LENGTH_BYTES = 8
# Writes bytes at a position of a file.
Put = Callable[[memoryview, int], None]
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place in a weight file.

    Attributes:
        name: Hugging Face name.
        code: Its dtype as the file spells it, for example `BF16`.
        shape: Its shape.
        file: The weight file.
        begin: First byte of its data, from the start of the file.
        end: One past its last byte.
        stored: Its name in the file; None: the same.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    stored: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the table of tensors of one weight file, and check that the file is as long as it says.

    Raises:
        CorruptCheckpointError: The file is truncated, padded, or is no safetensors file.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        return parse_header(path, size, lambda begin, end: _read_range(file, begin, end))


def _read_range(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def parse_header(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> dict[str, TensorEntry]:
    """The same for a file that lies anywhere.

    Args:
        path: What it is called in the entries and in errors.
        size: Its size in bytes.
        read: Gives its bytes from the first to before the second position.
    """
    length = int.from_bytes(read(0, min(size, _LENGTH_BYTES)), "little")
    if size < _LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER_BYTES, size):
        raise _corrupt(path, f"a header of {length} bytes in a file of {size} bytes")
    raw = read(_LENGTH_BYTES, _LENGTH_BYTES + length)
    try:
        check_values(raw)
        table = json.loads(raw, object_pairs_hook=_without_twins)
        table.pop("__metadata__", None)
        entries = {name: _entry(path, name, row, length) for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _corrupt(path, f"a header that cannot be parsed: {error}") from None
    except RecursionError:
        raise _corrupt(path, "a header that is nested too deeply") from None
    _check_places(path, entries, _LENGTH_BYTES + length)
    expected = max((entry.end for entry in entries.values()), default=_LENGTH_BYTES + length)
    if size != expected:
        raise CorruptCheckpointError(
            "a weight file is truncated" if size < expected else "a weight file is too long",
            where=path,
            got=f"{size} bytes",
            expected=f"{expected} bytes, from its header",
            hint="copy or save the checkpoint again",
        )
    return entries


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two members of one name, readers would take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name} is there twice")
    return found


def _check_places(path: Path, entries: Mapping[str, TensorEntry], first: int) -> None:
    """Refuse tensors that lie outside of the data, or over each other."""
    end, before = first, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _corrupt(path, f"{name} begins at byte {entry.begin}, within {before}")
        end, before = entry.end, name


def _entry(path: Path, name: str, row: Mapping[str, Any], header_bytes: int) -> TensorEntry:
    if not isinstance(row, dict) or not {"data_offsets", "shape", "dtype"} <= row.keys():
        raise ValueError(f"{name}: no dtype, shape and data_offsets")
    offsets, shape, code = row["data_offsets"], row["shape"], row["dtype"]
    numbers = [*offsets, *shape]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError(f"{name}: {numbers} are not all sizes")
    if not isinstance(code, str):
        raise ValueError(f"{name}: the dtype {code!r}")
    begin, end = (offset + _LENGTH_BYTES + header_bytes for offset in offsets)
    if end < begin:
        raise ValueError(f"{name}: ends at byte {end}, before it begins")
    entry = TensorEntry(name, code, tuple(shape), path, begin, end)
    dtype = STORED_DTYPES.get(entry.code)
    if dtype is not None and prod(entry.shape) * dtype.itemsize != entry.num_bytes:
        raise ValueError(f"{name}: {entry.num_bytes} bytes for shape {list(entry.shape)}")
    return entry


def _corrupt(path: Path, got: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a weight file is no readable safetensors file",
        where=path,
        got=got,
        expected="a whole .safetensors file",
        hint="copy or save the checkpoint again; if a run is still writing it, wait",
    )


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of one weight file into host memory, in the dtype of the file.

    Raises:
        CorruptCheckpointError: The file cannot be read, or lacks a tensor.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library raises several types, some of its own
        raise CorruptCheckpointError(
            "a weight file cannot be read", where=path, got=error, hint="save the checkpoint again"
        ) from None


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * self.dtype.itemsize


class WeightFileWriter:
    """Writes a weight file in pieces, from any thread, and publishes it whole or not at all.

    Args:
        path: The file; an older one is replaced.
        specs: What is going to be written, in the order of the file.
        is_read_again: Whether the file is read again soon; else it does not stay in the page cache,
            where it would take the place of what others read.

    Raises:
        ValueError: On leaving, if not every announced byte was written.
        OSError: The disk is full, or the directory cannot be written.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], *, is_read_again: bool = True
    ) -> None:
        self._specs = specs
        self._context = atomic_file(path, is_read_again=is_read_again, may_race=True)
        self._due = {spec.name: spec.num_bytes for spec in specs}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return weight_file_bytes(self._specs)

    def __enter__(self) -> WeightFileWriter:
        file = self._context.__enter__()
        file.write(_encode_header(self._specs))
        file.flush()
        self._writer = SharedWriter(_put_into(file), _places(self._specs))
        return self

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write some rows of a tensor, cast to the dtype of its spec."""
        written = self._writer.write(name, first_row, rows)
        with self._lock:
            self._due[name] -= written

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        missing = sum(self._due.values())
        if kind is None and any(self._due.values()):
            incomplete = ValueError(f"{missing} announced bytes were not written")
            self._context.__exit__(ValueError, incomplete, None)
            raise incomplete
        self._context.__exit__(kind, error, trace)


def weight_file_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of a weight file of these tensors."""
    return len(_encode_header(specs)) + sum(spec.num_bytes for spec in specs)


def write_weight_file(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> int:
    """Write a weight file, taking one tensor at a time, and publish it whole or not at all.

    Args:
        path: The file; an older one is replaced.
        specs: What is written, in order.
        tensors: The tensors in the order of `specs`; each is cast to its spec's dtype.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: A tensor does not have the announced shape.
        OSError: The disk is full, or the directory cannot be written.
    """
    with WeightFileWriter(path, specs) as writer:
        for spec, tensor in zip(specs, tensors, strict=True):
            if tuple(tensor.shape) != spec.shape:
                raise ValueError(
                    f"{spec.name}: got shape {list(tensor.shape)}, expected {list(spec.shape)}"
                )
            writer.write(spec.name, 0, tensor)
    return writer.num_bytes


class SharedWeightFile:
    """A weight file that several processes fill at once, each its own tensors.

    One process calls `create`, all call `open`, and after the last has closed it, one renames the
    file into place. Until then it has a name that nothing loads.

    Attributes:
        path: The unfinished file.
        specs: All tensors in it, in order.
        places: Name -> first byte in the file, and what it is.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path, self.specs = path, tuple(specs)
        self.places = _places(self.specs)

    def create(self) -> int:
        """Make the file: its header, and room for the data; returns its size in bytes."""
        header = _encode_header(self.specs)
        size = weight_file_bytes(self.specs)
        with self.path.open("wb") as file:
            file.write(header)
            file.truncate(size)
        return size

    @contextlib.contextmanager
    def open(self) -> Iterator[SharedWriter]:
        """Open it for writing tensors; `sync` puts what was written on disk."""
        with self.path.open("r+b", buffering=0) as file:
            yield self.writer(_put_into(file))

    def writer(self, put: Put) -> SharedWriter:
        """The same for a file that is written by other means, on another node say."""
        return SharedWriter(put, self.places)

    def sync(self) -> None:
        """Wait until all that was written is on disk; once, after the last has closed the file."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def opened_for(
    files: Sequence[SharedWeightFile], names: Collection[str]
) -> Iterator[dict[str, SharedWriter]]:
    """Open those of a model's files that have any of these tensors, and no others.

    A model may have more files than a process may have open.

    Args:
        files: Of the model.
        names: Of the tensors.

    Yields:
        Tensor -> the file that it belongs to.
    """
    wanted = set(names)
    with contextlib.ExitStack() as stack:
        found: dict[str, SharedWriter] = {}
        for file in files:
            own = wanted & file.places.keys()
            if own:
                found |= dict.fromkeys(own, stack.enter_context(file.open()))
        yield found


class SharedWriter:
    """Writes tensors at their places in an open weight file."""

    def __init__(self, put: Put, places: Mapping[str, tuple[int, TensorSpec]]) -> None:
        self._put, self._places = put, places

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in the file."""
        return self._places[name][1].dtype

    def write(self, name: str, first_row: int, rows: Tensor) -> int:
        """Write some rows of a tensor, cast to the dtype of the file; returns bytes.

        Raises:
            NumericalError: They do not fit into that dtype.
        """
        offset, spec = self._places[name]
        data = narrowed(rows.detach(), spec.dtype, name).cpu().contiguous()
        view = data.reshape(-1).view(torch.uint8).numpy().data
        row_bytes = spec.num_bytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        self._put(view, offset + first_row * row_bytes)
        return data.nbytes


def narrowed(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows of a tensor in the dtype of a file.

    Raises:
        NumericalError: A finite number is too large for it, and would become infinity or NaN.
    """
    cast = rows.to(dtype)
    if not (rows.is_floating_point() and dtype.is_floating_point) or rows.dtype == dtype:
        return cast
    if torch.finfo(dtype).max >= torch.finfo(rows.dtype).max:
        return cast
    if torch.finfo(dtype).bits > 8 and isfinite(float(cast.sum())):
        # A sum that is finite has nothing in it that is not.
        return cast
    # What is not finite in the first place is as it was read; a little above is rounded down.
    numbers = rows[rows.isfinite()]
    most = float(numbers.abs().max()) if numbers.numel() else 0.0
    is_beyond = most > torch.finfo(dtype).max
    if is_beyond and not bool(torch.isfinite(numbers.to(dtype).float()).all()):
        raise NumericalError(
            f"{name} does not fit into {str(dtype).removeprefix('torch.')}",
            where="the weights that are written",
            got=f"{most:.6g}",
            expected=f"numbers of at most {torch.finfo(dtype).max:.6g}",
            hint="set precision.storage_dtype to bfloat16 or float32; the states that are finished "
            "stay, and the same command goes on from them",
        )
    return cast


def _put_into(file: IO[bytes]) -> Put:
    def put(view: memoryview, position: int) -> None:
        begin, descriptor = position, file.fileno()
        while len(view):
            written = os.pwrite(descriptor, view, position)
            position, view = position + written, view[written:]
        start_write_back(descriptor, begin, position)

    return put


def _places(specs: Sequence[TensorSpec]) -> dict[str, tuple[int, TensorSpec]]:
    places, offset = {}, len(_encode_header(specs))
    for spec in specs:
        places[spec.name] = (offset, spec)
        offset += spec.num_bytes
    return places


def _encode_header(specs: Sequence[TensorSpec]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        table[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw

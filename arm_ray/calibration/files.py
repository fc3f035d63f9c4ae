"""Indexing and reading of calibration files. Runs in Ray workers; imports no Ray.

Ray Data's own readers (``read_json``, ``read_text``, ``read_parquet``) do not fit here. The
JSON reader infers one schema from the first block and fails on a column that is null first
and a list later, or on a row larger than its block. The text reader holds a whole file in
memory. None of them tells a row's number, which errors and the row order need. So Ray Data
runs the two functions below over the files instead:

* ``index_file`` reads a file once and returns its row count, its columns, and where chunks of
  rows start. It parses every JSON line, so that a file cut off or damaged anywhere is refused
  before a long run starts.
* ``read_rows`` reads single rows of a chunk again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from arm_ray.errors import CalibrationError, StorageError
from arm_ray.storage.store import open_place

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")

# Rows between two places where reading can start in a JSON Lines file. Picking a row costs
# skipping at most this many lines.
_CHUNK_ROWS = 1024
# A longer line is not a row of calibration data, but some other kind of file.
_LINE_BYTES = 128 * 1024 * 1024
_MAX_COLUMNS = 1000


@dataclass(frozen=True)
class Chunk:
    """Rows of one file that are read together.

    Attributes:
        first_row: Row of the file that the chunk starts with, from 0.
        num_rows: Rows in the chunk.
        start: Byte to start reading at, or the row group of a Parquet file.
        first_line: Line number, from 1, at ``start``. Not used for Parquet.
    """

    first_row: int
    num_rows: int
    start: int
    first_line: int = 0


@dataclass
class FileIndex:
    """What a file holds.

    Attributes:
        num_rows: Rows in the file.
        columns: Every column that some row has, with whether some row holds more in it than
            nothing or empty text.
        chunks: The file's rows, in order.
    """

    num_rows: int = 0
    columns: dict[str, bool] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)


def index_file(path: str) -> FileIndex:
    """Reads a file once and tells what it holds.

    Args:
        path: A file with one of ``FILE_SUFFIXES``.

    Raises:
        CalibrationError: If the file cannot be read, or is malformed; names the line.
    """
    return _index_parquet(path) if path.endswith(".parquet") else _index_lines(path)


def read_rows(
    path: str, chunk: Chunk, rows: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Reads some rows of a chunk.

    Args:
        path: The file.
        chunk: The chunk, from the file's index.
        rows: Rows of the file to read, rising, all in the chunk.
        columns: Columns that will be used; others may be left out.

    Yields:
        The row's number in the file, its place as text for errors, and the row by column.

    Raises:
        CalibrationError: If the file cannot be read, or is not what the index says.
    """
    if path.endswith(".parquet"):
        found = _read_parquet(path, chunk, set(rows), columns)
    else:
        found = _read_lines(path, chunk, set(rows))
    count = 0
    for item in found:
        count += 1
        yield item
    if count != len(rows):
        raise CalibrationError(
            "A calibration file changed while it was read.",
            where=path,
            got=f"{count} of {len(rows)} rows",
            expected=f"rows {rows[0] + 1} to {rows[-1] + 1}",
            hint="Start again once nothing writes the file any more.",
        )


def _lines(path: str, start: int, first_line: int) -> Iterator[tuple[int, int, bytes]]:
    """Yields byte offset, line number and content of the lines that are not blank."""
    try:
        with _open(path) as stream:
            stream.seek(start)
            offset, number = start, first_line
            while line := stream.readline(_LINE_BYTES + 1):
                if len(line) > _LINE_BYTES:
                    raise _malformed(path, number, f"a line of more than {_LINE_BYTES} bytes")
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield offset, number, content
                offset += len(line)
                number += 1
    except (OSError, EOFError, zlib.error, StorageError) as error:  # two of damaged gzip
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked; `gzip` itself would leave the packed one open."""
    with open_place(path) as file:
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


def _parse(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _malformed(path, number, f"bytes that are not UTF-8 at {error.start}") from error
    except json.JSONDecodeError as error:
        # Not its own text, which calls every line of the file line 1.
        got = f"{error.msg}: character {error.pos + 1} of {_excerpt(line)}"
        raise _malformed(path, number, got) from error
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        raise _malformed(path, number, f"{error}, in {_excerpt(line)}") from error
    if not isinstance(row, dict):
        raise _malformed(path, number, f"JSON that is not an object: {_excerpt(line)}")
    return row


def _index_lines(path: str) -> FileIndex:
    index = FileIndex()
    # A gzip file can only be read from its start: one chunk.
    chunk_rows = None if path.endswith(".gz") else _CHUNK_ROWS
    starts: list[tuple[int, int, int]] = []
    for offset, number, line in _lines(path, 0, 1):
        row = _parse(path, number, line)
        if not starts or (chunk_rows and index.num_rows % chunk_rows == 0):
            # The first chunk starts with the file: seeking past a byte order mark or blank
            # lines gains nothing.
            starts.append((index.num_rows, offset, number) if starts else (0, 0, 1))
        index.num_rows += 1
        for name, value in row.items():
            if name in index.columns or len(index.columns) < _MAX_COLUMNS:
                filled = value is not None and value != ""
                index.columns[name] = index.columns.get(name, False) or filled
    ends = [row for row, _, _ in starts[1:]] + [index.num_rows] * bool(starts)
    index.chunks = [
        Chunk(row, end - row, offset, number)
        for (row, offset, number), end in zip(starts, ends, strict=True)
    ]
    return index


def _read_lines(
    path: str, chunk: Chunk, rows: set[int]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    last = max(rows)
    row = chunk.first_row
    for _, number, line in _lines(path, chunk.start, chunk.first_line):
        if row in rows:
            yield row, f"{path}, line {number}", _parse(path, number, line)
        row += 1
        if row > last:
            return


def _index_parquet(path: str) -> FileIndex:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = FileIndex()
    try:
        with open_place(path) as source, pq.ParquetFile(source) as file:
            metadata = file.metadata
            index.columns = {
                column.name: not pa.types.is_null(column.type) for column in file.schema_arrow
            }
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                index.chunks.append(Chunk(index.num_rows, count, group))
                index.num_rows += count
            for name in _all_null(metadata):
                index.columns[name] = False
    except (pa.ArrowException, OSError, StorageError) as error:
        raise _unreadable(path, error) from error
    return index


def _all_null(metadata: Any) -> list[str]:
    """Returns the plain columns that the file's statistics show to hold nothing but null."""
    names = []
    for number in range(metadata.num_columns):
        name = metadata.schema.column(number).path
        parts = [
            metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)
        ]
        known = [part.statistics for part in parts if part.is_stats_set]
        complete = "." not in name and parts and len(known) == len(parts)
        if complete and all(s.has_null_count and s.num_values == 0 for s in known):
            names.append(name)
    return names


def _read_parquet(
    path: str, chunk: Chunk, rows: set[int], columns: Sequence[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_place(path) as source, pq.ParquetFile(source) as file:
            # In batches, so that a large row group is never in memory at once.
            present = [name for name in columns if name in file.schema_arrow.names]
            others = {} if set(present) >= set(columns) else dict.fromkeys(file.schema_arrow.names)
            first = chunk.first_row
            batches = file.iter_batches(
                batch_size=_CHUNK_ROWS, row_groups=[chunk.start], columns=present
            )
            for batch in batches:
                picked = [row - first for row in rows if first <= row < first + batch.num_rows]
                for offset in sorted(picked):
                    values = batch.slice(offset, 1).to_pylist()[0]
                    row = first + offset
                    yield row, f"{path}, row {row + 1}", {**others, **values}
                first += batch.num_rows
    except (pa.ArrowException, OSError, StorageError) as error:
        raise _unreadable(path, error) from error


def _excerpt(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _malformed(path: str, number: int, got: str) -> CalibrationError:
    return CalibrationError(
        "A calibration file is not JSON Lines.",
        where=f"{path}, line {number}",
        got=got,
        expected="one JSON object on every line, in UTF-8",
        hint="Correct the line. A file that is one JSON array becomes JSON Lines with jq -c '.[]'.",
    )


def _unreadable(path: str, error: BaseException) -> CalibrationError:
    if isinstance(error, StorageError):
        return CalibrationError(
            f"A calibration file cannot be read: {error.what}",
            where=error.where,
            got=error.got,
            expected=error.expected,
            hint=error.hint,
        )
    text = str(error).strip()
    return CalibrationError(
        "A calibration file cannot be read.",
        where=path,
        got=f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}",
        expected="a whole, readable " + ("Parquet" if path.endswith(".parquet") else "file"),
        hint="Check that it is whole. In a cluster, every node must see it under this path.",
    )

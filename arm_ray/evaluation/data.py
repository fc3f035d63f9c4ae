"""Rows of benchmark files: JSON Lines, a JSON array, Parquet, or a data set of the hub."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from arm_ray.calibration.sources import DatasetSource, find_source, load_dataset
from arm_ray.errors import CalibrationError, EvaluationError
from arm_ray.storage.regular import parse_json
from arm_ray.storage.store import find_url, open_place
from arm_ray.storage.urls import is_url, parse_url, plain_path

Row = dict[str, Any]
# Bytes of a benchmark's file, unpacked: the largest that is known has 50 MB. All of it is held.
LARGEST_DATA = 1 << 28
# Rows of it: each is an object of some hundred bytes, however little the file says of it. The
# largest benchmark that is known has 40,000.
MOST_ROWS = 1 << 19
_ROWS_AT_ONCE = 1024
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def read_rows(path: str, limit: int | None = None) -> list[Row]:
    """Read the rows of a file or of a hub data set, in order.

    Args:
        path: A file or its URL, or a data set id (`owner/name:split`).
        limit: How many of the first rows; None for all.

    Raises:
        EvaluationError: Missing, empty or malformed; names the line.
    """
    file = Path(plain_path(path)).expanduser()
    rows = _from_file(str(file)) if file.is_file() else _from_dataset(path)
    if not rows:
        raise EvaluationError(
            "the benchmark's data are empty", where=path, got="no rows", expected="at least one"
        )
    return rows[:limit]


def find_file(data_dir: str | None, names: Sequence[str]) -> str | None:
    """The first of some relative paths that exists below the data directory."""
    if data_dir is None:
        return None
    if is_url(data_dir):
        urls = [str(parse_url(data_dir) / name) for name in names]
        return next((url for url in urls if find_url(url) is not None), None)
    root = Path(plain_path(data_dir)).expanduser()
    return next((str(root / name) for name in names if (root / name).is_file()), None)


def _from_file(file: str) -> list[Row]:
    """Rows of a file, by its path or URL."""
    if not file.endswith(_SUFFIXES):
        raise EvaluationError(
            "the benchmark's file is of a kind that is not read",
            where=file,
            got=file.rpartition("/")[2],
            expected="a name ending in " + ", ".join(_SUFFIXES),
        )
    try:
        with open_place(file) as opened:
            if file.endswith(".parquet"):
                return _parquet_rows(opened)
            source = gzip.GzipFile(fileobj=opened) if file.endswith(".gz") else opened
            content = source.read(LARGEST_DATA + 1)
        if len(content) > LARGEST_DATA:
            raise _too_many(LARGEST_DATA, "bytes")
        if content.count(b"\n") > MOST_ROWS:
            raise _too_many(MOST_ROWS, "rows")
        text = content.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise EvaluationError(
            "the benchmark's file cannot be read",
            where=file,
            got=f"{error}",
            expected="a whole, readable file",
        ) from None
    if ".jsonl" not in file.rpartition("/")[2] and text.lstrip().startswith("["):
        return _objects(_parsed(text, file), file)
    # Not splitlines: it also splits at separators that JSON allows within a text.
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _objects([_parsed(line, f"{file}, line {n}") for n, line in numbered], file)


def _parquet_rows(file: IO[bytes]) -> list[Row]:
    """All rows of a Parquet file, of which a few bytes may stand for any number of them.

    Raises:
        ValueError: There are too many, or they are too large.
        OSError: It cannot be read.
    """
    import pyarrow.parquet as pq

    rows: list[Row] = []
    with pq.ParquetFile(file) as opened:
        table = opened.metadata
        if table.num_rows > MOST_ROWS:
            raise _too_many(MOST_ROWS, "rows")
        sizes = [table.row_group(number).total_byte_size for number in range(table.num_row_groups)]
        if sum(sizes) > LARGEST_DATA:
            raise _too_many(LARGEST_DATA, "bytes")
        # A value that is written once, as large as all that is written, may stand in every row.
        at_once = LARGEST_DATA // 4 // max([1, *sizes])
        num_bytes = 0
        for batch in opened.iter_batches(max(1, min(_ROWS_AT_ONCE, at_once))):
            found = batch.to_pylist()
            rows += found
            # Not as Arrow has them, which also writes once what is repeated. The table at the end
            # may say less than there is.
            num_bytes += sum(len(repr(row)) for row in found)
            if num_bytes > LARGEST_DATA:
                raise _too_many(LARGEST_DATA, "bytes")
            if len(rows) > MOST_ROWS:
                raise _too_many(MOST_ROWS, "rows")
    return rows


def _too_many(most: int, unit: str) -> ValueError:
    return ValueError(f"it has more than {most} {unit}")


def _parsed(text: str, where: object) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise EvaluationError(
            "the benchmark's file is not valid JSON", where=where, got=error
        ) from None


def _objects(rows: Sequence[Any], where: object) -> list[Row]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(
                "a row of the benchmark's file is no object",
                where=f"{where}, row {number}",
                got=type(row).__name__,
                expected="an object with named columns",
            )
    return list(rows)


def _from_dataset(path: str) -> list[Row]:
    try:
        source = find_source(path)
        if not isinstance(source, DatasetSource):
            return [row for file in source.paths for row in _from_file(file)]
        return [dict(row) for row in load_dataset(source)]
    except CalibrationError as error:
        raise EvaluationError(
            "the benchmark's data cannot be had",
            where=path,
            got=error.got or error.what,
            expected=error.expected,
            hint="name a file in the task's `path`, or a directory in evaluation.data_dir",
        ) from None

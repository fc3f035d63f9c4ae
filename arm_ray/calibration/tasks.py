"""What Ray Data's tasks do. Imports no Ray.

The tasks return errors in the input as data: the first bad row by number is then reported
whatever order the tasks run in, and Ray neither retries the task nor prints its traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arm_ray.calibration.files import Chunk, index_file, read_rows
from arm_ray.calibration.formats import TOOLS_COLUMN, Layout, to_sample
from arm_ray.calibration.labels import encode, label_mask
from arm_ray.calibration.tokens import load_tokenizer, to_token_ids
from arm_ray.errors import CalibrationError


@dataclass(frozen=True)
class Job:
    """What a task has to know to tokenise rows.

    Attributes:
        layout: The columns that make a sample.
        tokenizer_path: Directory of the tokenizer.
        max_length: Longest sample, in tokens.
        has_labels: Whether losses are wanted: samples are then encoded as for training.
    """

    layout: Layout
    tokenizer_path: str
    max_length: int
    has_labels: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns to read."""
        system = () if self.layout.system is None else (self.layout.system,)
        return (*self.layout.columns, *system, TOOLS_COLUMN)


def index_task(table: Any) -> Any:
    """Indexes one file.

    Args:
        table: One row; ``item`` is JSON with the file's ``number`` and ``path``.

    Returns:
        A table of one row: ``number``, ``index`` (JSON of a ``FileIndex``), ``error``.
    """
    import pyarrow as pa

    item = json.loads(table.column("item")[0].as_py())
    index, error = "", None
    try:
        index = json.dumps(asdict(index_file(item["path"])))
    except CalibrationError as caught:
        error = _packed(caught)
    return pa.table(
        {"number": [item["number"]], "index": [index], "error": pa.array([error], pa.string())}
    )


def files_task(table: Any, job: Job) -> Any:
    """Reads and tokenises rows of one chunk of a file.

    Args:
        table: One row; ``item`` is JSON with the ``path``, the ``file_row`` (row of the data
            that the file starts with), the ``chunk``, the ``rows`` of the file to read and
            their ``positions`` in the stream.
        job: How to tokenise them.

    Returns:
        A table of ``position``, ``row`` (of the data), ``ids`` (int32, as bytes), ``labels``
        (bool, as bytes; empty where none are wanted), ``truncated`` and ``error``.
    """
    item = json.loads(table.column("item")[0].as_py())
    positions = dict(zip(item["rows"], item["positions"], strict=True))
    rows = read_rows(item["path"], Chunk(**item["chunk"]), item["rows"], job.columns)
    return _tokenized(
        ((positions[row], item["file_row"] + row, where, values) for row, where, values in rows),
        job,
        fallback_row=item["file_row"] + item["rows"][0],
    )


def dataset_task(table: Any, name: str, job: Job) -> Any:
    """Tokenises rows of a data set.

    Args:
        table: ``position`` in the stream, ``row`` of the data, and its ``values`` by column.
        name: The data set's name, for errors.
        job: How to tokenise them.

    Returns:
        A table as ``files_task`` returns it.
    """
    return _tokenized(
        (
            (found["position"], found["row"], f"{name}, row {found['row'] + 1}", found["values"])
            for found in table.to_pylist()
        ),
        job,
        fallback_row=0,
    )


def _tokenized(
    rows: Iterable[tuple[int, int, str, dict[str, Any]]], job: Job, fallback_row: int
) -> Any:
    """Tokenises rows up to the first that is bad, as a table of one row per sample."""
    import pyarrow as pa

    found: list[dict[str, Any]] = []
    row = fallback_row
    try:
        tokenizer = load_tokenizer(job.tokenizer_path)
        for position, row, where, values in rows:
            if job.has_labels:
                example = encode(tokenizer, values, job.layout, where)
                ids, labels = np.asarray(example.ids, dtype=np.int32), label_mask(example)
            else:
                ids = to_token_ids(tokenizer, to_sample(values, job.layout, where), where)
                labels = np.zeros(0, dtype=np.bool_)
            found.append(
                {
                    "position": position,
                    "row": row,
                    # As bytes: Ray Data would turn lists of equal length into tensors.
                    "ids": ids[: job.max_length].astype("<i4").tobytes(),
                    "labels": labels[: job.max_length].tobytes(),
                    "truncated": len(ids) > job.max_length,
                    "error": None,
                }
            )
    except CalibrationError as error:
        nothing = {"position": 0, "ids": b"", "labels": b"", "truncated": False}
        found.append({**nothing, "row": row, "error": _packed(error)})
    types = [pa.int64(), pa.int64(), pa.binary(), pa.binary(), pa.bool_(), pa.string()]
    names = ["position", "row", "ids", "labels", "truncated", "error"]
    return pa.Table.from_pylist(found, schema=pa.schema(list(zip(names, types, strict=True))))


def _packed(error: CalibrationError) -> str:
    return json.dumps([error.what, error.where, error.got, error.expected, error.hint])


def unpacked(packed: str) -> CalibrationError:
    """Returns the error in a task's ``error`` column."""
    what, where, got, expected, hint = json.loads(packed)
    return CalibrationError(what, where=where, got=got, expected=expected, hint=hint)

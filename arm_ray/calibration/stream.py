"""The calibration stream: read and tokenise through Ray Data, then serve mini-batches.

All tokenising happens once, in ``open_stream``, and the token ids stay with the caller. Ray
Data needs CPU slots for its tasks; once a run's actors hold every slot it would wait for ever.
So a stream is opened before actors are placed, and needs Ray no more after that. What one process
reads before Ray Data has started is read without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arm_ray.calibration.files import Chunk
from arm_ray.calibration.formats import Layout, choose_layout
from arm_ray.calibration.minibatch import MiniBatch, row_order, stream_positions
from arm_ray.calibration.sources import DatasetSource, FileSource, find_source, load_dataset
from arm_ray.calibration.tasks import Job, dataset_task, files_task, index_task, unpacked
from arm_ray.config import CalibrationConfig
from arm_ray.errors import CalibrationError, WorkerError
from arm_ray.lazy import ray_is_joined
from arm_ray.storage.urls import is_url

_logger = logging.getLogger(__name__)

_MAX_TASKS = 200
_DATASET_ROWS_PER_TASK = 256
# Files of so many bytes together are read in this process: Ray Data takes seconds to start.
SMALL_BYTES = 4_000_000


@dataclass(frozen=True, eq=False)
class CalibrationStream:
    """A fixed sequence of mini-batches of token ids.

    Attributes:
        num_rows: Rows of the data, used or not.
        num_used: Different rows that the batches use; only these were tokenised.
        num_truncated: Rows among these that were cut to the longest length.
        max_token_id: Highest token id among these; must be below the model's vocabulary size.
        layout: The format and columns in use.
        warnings: What the user should know, one sentence each.
        digest: SHA-256, in hex, over the token ids of all used rows in the order of the
            stream. Changed data, tokenizer, seed, length, or number of batches change it.
        num_held_back: Rows that no mini-batch uses; see `held_back`.
    """

    num_rows: int
    num_used: int
    num_truncated: int
    max_token_id: int
    layout: Layout
    warnings: list[str]
    digest: str
    num_held_back: int
    _batch_size: int
    _rows: NDArray[np.int64]
    _token_ids: NDArray[np.int32]
    _is_label: NDArray[np.bool_] | None
    _ends: NDArray[np.int64]

    @property
    def mean_tokens(self) -> int:
        """Tokens of a used row on average, rounded up."""
        return -(-int(self._ends[-1]) // self.num_used)

    def batch(self, iteration: int) -> MiniBatch:
        """Returns the mini-batch of an iteration. The same call gives the same batch.

        Args:
            iteration: Number of the iteration, from 1.

        Raises:
            ValueError: If ``iteration`` is below 1, or its rows were not asked for when the
                stream was opened.
        """
        served = self.num_rows - self.num_held_back
        positions = stream_positions(iteration, self._batch_size, served)
        if positions.max() >= self.num_used - self.num_held_back:
            raise ValueError(
                f"mini-batch {iteration} needs rows that were not tokenised: open the stream "
                f"with needed_batches={iteration} or more"
            )
        return self._at(positions.tolist(), iteration)

    def served(self) -> MiniBatch:
        """All rows that mini-batches use, as batch number 0."""
        return self._at(range(self.num_used - self.num_held_back), 0)

    def held_back(self) -> MiniBatch:
        """The rows that no mini-batch uses: the last ones of the order, as batch number 0."""
        return self._at(range(self.num_used - self.num_held_back, self.num_used), 0)

    def _at(self, positions: Sequence[int], number: int) -> MiniBatch:
        bounds = [slice(self._ends[p - 1] if p else 0, self._ends[p]) for p in positions]
        return MiniBatch(
            iteration=number,
            row_indices=[int(self._rows[position]) for position in positions],
            token_ids=[self._token_ids[bound] for bound in bounds],
            labels=[] if self._is_label is None else [self._is_label[bound] for bound in bounds],
        )


def mean_tokens(settings: CalibrationConfig, tokenizer_path: str | os.PathLike[str]) -> int | None:
    """Tokens of a sample of the first mini-batch on average.

    None where that is not seen at once: the data are missing, large, elsewhere or damaged.

    Args:
        settings: What to read and how.
        tokenizer_path: Directory with the tokenizer.
    """
    try:
        source = find_source(settings.path, settings.split)
        if not isinstance(source, FileSource) or not _is_small(source):
            return None
        stats = [os.stat(path) for path in source.paths]
        state = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return _mean_tokens(settings.model_dump_json(), os.fspath(tokenizer_path), state)
    except (CalibrationError, OSError):
        return None


@functools.lru_cache(maxsize=8)
def _mean_tokens(settings: str, tokenizer_path: str, _state: tuple[tuple[int, int], ...]) -> int:
    """The same, once for data in one state."""
    given = CalibrationConfig.model_validate_json(settings)
    return open_stream(given, tokenizer_path, needed_batches=1, here=True).mean_tokens


def open_stream(
    settings: CalibrationConfig,
    tokenizer_path: str | os.PathLike[str],
    *,
    needed_batches: int | None = None,
    held_back: Callable[[int], int] = lambda _rows: 0,
    has_labels: bool = False,
    here: bool = False,
) -> CalibrationStream:
    """Reads, checks and tokenises calibration data.

    Rows are counted and checked for damage first; only those that the needed mini-batches use
    are then tokenised and brought here, at 4 bytes a token. Ray Data needs a free CPU slot in Ray;
    without Ray, and for little data, all is done in this process.

    Args:
        settings: What to read and how.
        tokenizer_path: Directory with the tokenizer, seen by every node under this path.
        needed_batches: How many mini-batches will be asked for; None for every row.
        held_back: Of how many rows there are: how many at the end of the order no mini-batch uses.
            Without mini-batches it is no error if there are fewer.
        has_labels: Whether losses are wanted. Samples are then encoded as for training (prompt and
            completion apart), and say which of their tokens count.
        here: Whether all is done in this process, because other nodes may not see the data.

    Raises:
        CalibrationError: If the data are missing, empty or malformed, or do not fit the
            tokenizer; names the file and line.
        ValueError: If ``needed_batches`` is below 0.
        WorkerError: If Ray lost the tasks.
    """
    if needed_batches is not None and needed_batches < 0:
        raise ValueError(f"needed_batches must be 0 or more, got {needed_batches}")
    source = find_source(settings.path, settings.split)
    here = here or _is_small(source) or not ray_is_joined()
    with contextlib.nullcontext() if here else _quiet_ray_data():
        data = (
            _Files(source.paths, here)
            if isinstance(source, FileSource)
            else _Dataset(settings.path, load_dataset(source), here)
        )
        if data.num_rows == 0:
            raise CalibrationError(
                "The calibration data are empty.",
                where=settings.path,
                got="no rows",
                expected="at least one row",
                hint="Check the path, or the split.",
            )
        layout = choose_layout(settings, data.columns, settings.path)
        order = row_order(data.num_rows, shuffle=settings.shuffle, seed=settings.seed)
        held = held_back(data.num_rows)
        if needed_batches == 0 and held == 0:
            raise ValueError("needed_batches must be 1 or more where no row is held back, got 0")
        if needed_batches == 0:
            held = min(held, data.num_rows)
        elif held >= data.num_rows:
            raise CalibrationError(
                "The data have too few rows.",
                where=settings.path,
                got=f"{data.num_rows} rows",
                expected=f"{held} rows to compare models on, and rows to merge with",
                hint="Give more rows, or compare on fewer (select.samples).",
            )
        if needed_batches is not None:
            served = order[: data.num_rows - held][: needed_batches * settings.batch_size]
            order = np.concatenate([served, order[data.num_rows - held :]])
        job = Job(layout, os.path.abspath(tokenizer_path), settings.max_length, has_labels)
        found = data.tokenize(order, job)
        return _collect(settings, data.num_rows, order, layout, found, held, has_labels)


class _Files:
    """Rows in files."""

    def __init__(self, paths: tuple[str, ...], here: bool) -> None:
        self.num_rows, self._here = 0, here
        self.columns: dict[str, bool] = {}
        self._chunks: list[tuple[str, int, Chunk]] = []  # path, first row of the file, chunk
        items = [json.dumps({"number": n, "path": path}) for n, path in enumerate(paths)]
        results = sorted(_run(index_task, items, {}, here), key=lambda result: result["number"])
        _raise_first(results, "number")
        for path, result in zip(paths, results, strict=True):
            index = json.loads(result["index"])
            for name, filled in index["columns"].items():
                self.columns[name] = self.columns.get(name, False) or filled
            for chunk in index["chunks"]:
                self._chunks.append((path, self.num_rows, Chunk(**chunk)))
            self.num_rows += index["num_rows"]

    def tokenize(self, order: NDArray[np.int64], job: Job) -> Iterator[dict[str, Any]]:
        by_row = np.argsort(order)
        rows = order[by_row]
        items = []
        for path, file_row, chunk in self._chunks:
            start = file_row + chunk.first_row
            low, high = np.searchsorted(rows, [start, start + chunk.num_rows])
            if low < high:
                item = {
                    "path": path,
                    "file_row": file_row,
                    "chunk": asdict(chunk),
                    "rows": (rows[low:high] - file_row).tolist(),
                    "positions": by_row[low:high].tolist(),
                }
                items.append(json.dumps(item))
        return _run(files_task, items, {"job": job}, self._here)


class _Dataset:
    """Rows of a ``datasets.Dataset``, which this machine maps into memory."""

    def __init__(self, name: str, dataset: Any, here: bool) -> None:
        import pyarrow as pa

        self.num_rows = len(dataset)
        schema = dataset.features.arrow_schema
        self.columns = {column.name: not pa.types.is_null(column.type) for column in schema}
        self._name, self._here = name, here
        self._dataset = dataset

    def tokenize(self, order: NDArray[np.int64], job: Job) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        columns = [name for name in job.columns if name in self.columns]
        by_row = np.argsort(order)
        dataset = self._dataset.select_columns(columns).with_format("arrow")
        tables = []
        for start in range(0, len(order), _DATASET_ROWS_PER_TASK):
            positions = by_row[start : start + _DATASET_ROWS_PER_TASK]
            part = dataset.select(order[positions])[:]
            # The values as one column, so that their names cannot meet those of ours.
            values = pa.StructArray.from_arrays(
                [part.column(name).combine_chunks() for name in columns], names=columns
            )
            tables.append(
                pa.table({"position": positions, "row": order[positions], "values": values})
            )
        if self._here or len(tables) < 2:
            return (
                row
                for table in tables
                for row in dataset_task(table, name=self._name, job=job).to_pylist()
            )
        import ray.data

        work = ray.data.from_arrow(tables)
        task: Any = dataset_task  # Ray's annotation knows no further arguments
        return _results(
            work.map_batches(
                task,
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"name": self._name, "job": job},
            )
        )


def _is_small(source: FileSource | DatasetSource) -> bool:
    """Whether data are read sooner by this process than by tasks of Ray Data."""
    if not isinstance(source, FileSource) or any(is_url(path) for path in source.paths):
        return False
    return sum(os.path.getsize(path) for path in source.paths) <= SMALL_BYTES


def _run(
    task: Callable[..., Any], items: list[str], kwargs: dict[str, Any], here: bool
) -> Iterator[dict[str, Any]]:
    """Runs a task function over items, each a text of JSON, and yields the rows it returns."""
    import pyarrow as pa

    if here:
        tables = (pa.table({"item": [item]}) for item in items)
        return (row for table in tables for row in task(table, **kwargs).to_pylist())

    import ray.data

    # The items are JSON text because Ray Data would otherwise turn lists into tensors.
    work = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=min(len(items), _MAX_TASKS)
    )
    return _results(work.map_batches(task, batch_size=1, batch_format="pyarrow", fn_kwargs=kwargs))


def _results(work: Any) -> Iterator[dict[str, Any]]:
    from ray.exceptions import RayError

    try:
        for table in work.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.to_pylist()
    except RayError as error:
        raise WorkerError(
            "Reading the calibration data failed in Ray.",
            got=_cause(error),
            expected="tasks that finish",
            hint="See Ray's logs of the worker: often it ran out of memory, or a node was lost.",
        ) from error


def _cause(error: Exception) -> str:
    # Ray puts the worker's traceback in the message; the line that names the first error of it
    # is the one that tells something.
    lines = str(error).strip().splitlines()
    named = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return f"{type(error).__name__}: {(named or lines or ['no message'])[0]}"


def _raise_first(results: list[dict[str, Any]], key: str) -> None:
    bad = [result for result in results if result["error"] is not None]
    if bad:
        first = min(bad, key=lambda result: int(result[key]))
        raise unpacked(first["error"])


def _collect(
    settings: CalibrationConfig,
    num_rows: int,
    order: NDArray[np.int64],
    layout: Layout,
    results: Iterator[dict[str, Any]],
    held_back: int,
    has_labels: bool,
) -> CalibrationStream:
    """Puts the tokenised rows, which come in any order, into the order of the stream."""
    samples: list[bytes] = [b""] * len(order)
    labels: list[bytes] = [b""] * len(order)
    errors: list[dict[str, Any]] = []
    truncated = 0
    for result in results:
        if result["error"] is not None:
            errors.append(result)
            continue
        samples[result["position"]] = result["ids"]
        labels[result["position"]] = result["labels"]
        truncated += result["truncated"]
    _raise_first(errors, "row")
    # Frozen bytes: the arrays over them cannot be written, and batches can share them.
    token_ids = np.frombuffer(b"".join(samples), dtype="<i4").astype(np.int32, copy=False)
    ends = np.cumsum([len(sample) // 4 for sample in samples], dtype=np.int64)
    digest = hashlib.sha256(ends.astype("<i8").tobytes())
    digest.update(token_ids.astype("<i4", copy=False).tobytes())
    is_label = np.frombuffer(b"".join(labels), dtype=np.bool_)
    return CalibrationStream(
        num_rows=num_rows,
        num_used=len(order),
        num_truncated=truncated,
        max_token_id=int(token_ids.max()),
        layout=layout,
        warnings=_warnings(settings, num_rows - held_back, len(order), truncated),
        digest=digest.hexdigest(),
        num_held_back=held_back,
        _batch_size=settings.batch_size,
        _rows=order,
        _token_ids=token_ids,
        _is_label=is_label if has_labels else None,
        _ends=ends,
    )


def _warnings(
    settings: CalibrationConfig, num_rows: int, num_used: int, truncated: int
) -> list[str]:
    found = []
    if settings.batch_size > num_rows:
        found.append(
            f"A mini-batch takes {settings.batch_size} samples, but the calibration data have "
            f"only {num_rows} rows: samples repeat inside every mini-batch."
        )
    if truncated:
        found.append(
            f"{truncated} of {num_used} calibration rows are longer than {settings.max_length} "
            "tokens and lost their end."
        )
    return found


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Turns off Ray Data's progress bars and chatter for a while; its log file stays as it is."""
    import ray
    from ray.data import DataContext

    free: Any = ray.available_resources  # not annotated in Ray
    if free().get("CPU", 0) < 1:
        # Ray Data waits without a word. Not an error: a cluster may be growing.
        _logger.warning("no CPU slot is free in Ray: reading the calibration data waits for one")
    context = DataContext.get_current()
    bars = context.enable_progress_bars
    # Only handlers that write to the console have a stream.
    handlers = [h for h in logging.getLogger("ray.data").handlers if hasattr(h, "stream")]
    context.enable_progress_bars = False
    for handler in handlers:
        handler.addFilter(_worth_showing)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for handler in handlers:
            handler.removeFilter(_worth_showing)


def _worth_showing(record: logging.LogRecord) -> bool:
    # Ray warns that the bars are off and how to turn them on, which here is our doing.
    is_about_bars = record.getMessage().startswith("Progress bars disabled")
    return record.levelno >= logging.WARNING and not is_about_bars

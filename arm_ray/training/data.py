"""From rows to training samples: token ids, which of them carry loss, and in which order.

One module, because a sample's labels, its length and its place in a batch depend on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.files import FileIndex, index_file, read_rows
from arm_ray.calibration.formats import Layout, choose_layout, missing_column, plain_message
from arm_ray.calibration.labels import encode, label_mask
from arm_ray.calibration.sources import DatasetSource, find_source, load_dataset
from arm_ray.config import DataConfig
from arm_ray.errors import CalibrationError

IGNORED = -100
"""Label of a token that carries no loss."""

# Rows are sorted by length within so many batches: that saves a third of the tokens, which would
# be padding.
_WINDOW_BATCHES = 16
# Rows packed together: fewer leave more padding, more take longer.
_PACK_ROWS = 1024


class PlacedRow(NamedTuple):
    """A row of the data and its place, for errors."""

    where: str
    row: dict[str, Any]


@dataclass(frozen=True)
class EncodedRows:
    """All rows as token ids, end to end.

    Attributes:
        ids: Token ids, int32 ``[tokens]``.
        is_label: Which tokens carry loss, bool ``[tokens]``. Never the first one of a row.
        starts: Where rows start, int64 ``[rows + 1]``; the last is the number of tokens.
    """

    ids: NDArray[np.int32]
    is_label: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 ``[rows]``."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        kept: Rows that are trained on.
        too_long: Rows longer than allowed, dropped or cut.
        without_labels: Rows dropped because nothing in them, or in what was left of them after
            cutting, carries loss.
    """

    rows: int
    kept: int
    too_long: int
    without_labels: int


def read_data(data: DataConfig) -> tuple[list[PlacedRow], dict[str, bool]]:
    """Read all rows.

    Returns:
        The rows in file order, and every column that some row has, with whether some row holds
        more in it than nothing or empty text.

    Raises:
        CalibrationError: The data are missing, empty or malformed.
    """
    rows, columns = read_path(data.path, data.split)
    if not rows:
        raise CalibrationError(
            "the training data hold no rows",
            where=data.path,
            got="an empty file or split",
            expected="at least one row",
            hint="check the path and how the split was made",
        )
    return rows, columns


def read_path(path: str, split: str | None = None) -> tuple[list[PlacedRow], dict[str, bool]]:
    """Read all rows of whatever a calibration path may be; there may be none."""
    source = find_source(path, split)
    if isinstance(source, DatasetSource):
        dataset = load_dataset(source)
        rows = [PlacedRow(f"{path}, row {i + 1}", dict(row)) for i, row in enumerate(dataset)]
        columns: dict[str, bool] = {}
        for _, row in rows:
            for name, value in row.items():
                columns[name] = columns.get(name, False) or (value is not None and value != "")
        return rows, columns
    found: list[PlacedRow] = []
    columns = {}
    for name in source.paths:
        index = index_file(name)
        for column, filled in index.columns.items():
            columns[column] = columns.get(column, False) or filled
        found += _file_rows(name, index)
    return found, columns


def _file_rows(path: str, index: FileIndex) -> Iterator[PlacedRow]:
    names = [*index.columns]
    for chunk in index.chunks:
        wanted = range(chunk.first_row, chunk.first_row + chunk.num_rows)
        for _, where, row in read_rows(path, chunk, wanted, names):
            yield PlacedRow(where, row)


def layout_of(data: DataConfig, columns: Mapping[str, bool]) -> Layout:
    """Which columns make a sample.

    Raises:
        CalibrationError: A column asked for is missing, or none is known.
    """
    names = (data.prompt_column, data.completion_column)
    if data.format == "auto" and names != ("prompt", "completion"):
        # Who names columns wants those, and not whatever else the rows would do for.
        for name in names:
            if name not in columns:
                raise missing_column(name, columns, data.path, "data")
    return choose_layout(data, columns, data.path)


def question_of(row: Mapping[str, Any], layout: Layout) -> str:
    """The text that a row asks: its prompt, its first user message, or the text itself."""
    value = row.get(layout.columns[0])
    if isinstance(value, str):
        return value
    messages = [plain_message(each) for each in value or () if isinstance(each, dict)]
    users = [message.get("content") for message in messages if message.get("role") == "user"]
    return users[0] if users and isinstance(users[0], str) else ""


def encode_rows(
    tokenizer: Any,
    rows: Sequence[PlacedRow],
    layout: Layout,
    *,
    max_length: int,
    too_long: str,
    where: object,
) -> tuple[EncodedRows, EncodingReport]:
    """Encode all rows; see `encode`.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The rows.
        layout: Which columns make a sample.
        max_length: Tokens that a row may have.
        too_long: `error`, `drop` or `cut` what has more; cutting removes the end.
        where: The data, for errors.

    Raises:
        CalibrationError: A row cannot be encoded or is too long for `error`, or none is left.
    """
    ids: list[NDArray[np.int32]] = []
    labels: list[NDArray[np.bool_]] = []
    counts = {"too_long": 0, "without_labels": 0}
    for place, row in rows:
        example = encode(tokenizer, row, layout, place)
        if len(example.ids) > max_length:
            counts["too_long"] += 1
            if too_long == "error":
                raise CalibrationError(
                    "a row has more tokens than max_length",
                    where=place,
                    got=f"{len(example.ids)} tokens",
                    expected=f"at most {max_length}",
                    hint="raise max_length, or set too_long to drop or cut",
                )
            if too_long == "drop":
                continue
        mask = label_mask(example)[:max_length]
        if not mask.any():
            counts["without_labels"] += 1
            continue
        ids.append(np.asarray(example.ids[:max_length], dtype=np.int32))
        labels.append(mask)
    report = EncodingReport(len(rows), len(ids), **counts)
    if not ids:
        raise CalibrationError(
            "no row is left to train on",
            where=where,
            got=f"{report.rows} rows, {report.too_long} of more than max_length = {max_length} "
            f"tokens, {report.without_labels} without a token that carries loss",
            expected="at least one row with a completion within max_length",
            hint="raise max_length",
        )
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
    return EncodedRows(np.concatenate(ids), np.concatenate(labels), starts), report


def batches_by_length(
    lengths: NDArray[np.int64], batch_size: int, seed: int
) -> Iterator[list[int]]:
    """Batches of row numbers without end; in each epoch, every row comes once.

    Each epoch is shuffled anew by the seed. Within windows of 16 batches, rows are sorted by
    length and the batches shuffled. What is over at the end of an epoch starts the first batch of
    the next one.
    """
    generator = torch.Generator().manual_seed(seed)
    over: list[int] = []
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        if over:
            missing = batch_size - len(over)
            over, order = over + order[:missing], order[missing:]
            if len(over) < batch_size:
                continue
            yield over
        whole = len(order) // batch_size * batch_size
        order, over = order[:whole], order[whole:]
        for start in range(0, whole, _WINDOW_BATCHES * batch_size):
            window = order[start : start + _WINDOW_BATCHES * batch_size]
            by_length = sorted(window, key=lambda i: int(lengths[i]))
            batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]


def packed_epochs(lengths: NDArray[np.int64], size: int, seed: int) -> Iterator[list[list[int]]]:
    """For each epoch, bins of row numbers of at most `size` tokens together, in random order.

    Rows are shuffled, and 1024 at a time put into the first bin with room, the longest first.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        bins: list[list[int]] = []
        for start in range(0, len(order), _PACK_ROWS):
            opened: list[list[int]] = []
            room: list[int] = []
            for i in sorted(order[start : start + _PACK_ROWS], key=lambda i: -int(lengths[i])):
                length = int(lengths[i])
                place = next((k for k, free in enumerate(room) if free >= length), len(room))
                if place == len(room):
                    opened.append([])
                    room.append(size)
                opened[place].append(i)
                room[place] -= length
            bins += opened
        yield [bins[i] for i in torch.randperm(len(bins), generator=generator).tolist()]


@dataclass(frozen=True)
class SampleStream:
    """All samples of a run in the order in which they are trained on.

    Step s (from 1) takes samples (s - 1) * batch_size up to s * batch_size, whatever the number of
    workers.

    Attributes:
        rows: The rows.
        members: Row numbers, int64 ``[members]``.
        starts: Where samples start in `members`, int64 ``[samples + 1]``; a sample has one row,
            or several that are packed.
    """

    rows: EncodedRows
    members: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Ids and labels of each of a sample's rows."""
        rows = self.rows
        sample = []
        for i in self.members[self.starts[index] : self.starts[index + 1]]:
            part = slice(rows.starts[i], rows.starts[i + 1])
            sample.append((rows.ids[part], rows.is_label[part]))
        return sample


def make_stream(
    rows: EncodedRows,
    *,
    batch_size: int,
    seed: int,
    steps: int | None,
    epochs: float | None,
    pack_to: int | None = None,
) -> SampleStream:
    """Lay out all samples of a run.

    Args:
        rows: The rows.
        batch_size: Samples of a step.
        seed: Of the order.
        steps: Steps of the run; None takes as many as `epochs` fill, the last one filled up.
        epochs: Passes over the rows, if `steps` is None.
        pack_to: Tokens of a bin; None: no packing.
    """
    lengths = rows.lengths
    if pack_to is None:
        if steps is None:
            steps = _up(len(rows) * (epochs or 1.0) / batch_size)
        found = itertools.islice(batches_by_length(lengths, batch_size, seed), steps)
        samples = [[i] for batch in found for i in batch]
    else:
        samples = []
        wanted = None if steps is None else steps * batch_size
        for epoch, bins in enumerate(packed_epochs(lengths, pack_to, seed), start=1):
            if wanted is None and epoch >= (epochs or 1.0):
                last = len(bins) * ((epochs or 1.0) - (epoch - 1))
                wanted = _up((len(samples) + last) / batch_size) * batch_size
            samples += bins
            if wanted is not None and len(samples) >= wanted:
                break
        samples = samples[:wanted]
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])])
    members = np.fromiter(itertools.chain.from_iterable(samples), dtype=np.int64)
    return SampleStream(rows, members, starts.astype(np.int64))


def _up(value: float) -> int:
    # 3 epochs of 0.1 are 0.30000000000000004, and no step more than 0.3.
    return max(1, int(np.ceil(value - 1e-9)))


class StreamDataset(torch.utils.data.Dataset[Any]):
    """A `SampleStream` as torch wants it."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, index: int) -> Any:
        return self._stream[index]


def make_collator(pad_id: int, packed: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """What makes a micro-batch of samples: padded on the right, or one packed sample.

    A padded batch has ``input_ids``, ``attention_mask`` and ``labels``, all int64 ``[B, T]``. A
    packed one has ``input_ids``, ``labels`` and ``position_ids``, ``[1, T]``, where positions start
    again with each row, from which transformers knows that rows must not attend to each other.
    """

    def padded(samples: Sequence[Any]) -> dict[str, Tensor]:
        rows = [row for sample in samples for row in sample]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids = torch.full(shape, pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, (ids, is_label) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            attention_mask[i, : len(ids)] = 1
            labels[i, : len(ids)][torch.tensor(is_label)] = torch.tensor(ids[is_label]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def one_packed(samples: Sequence[Any]) -> dict[str, Tensor]:
        (rows,) = samples
        ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
        is_label = np.concatenate([is_label for _, is_label in rows])
        positions = np.concatenate([np.arange(len(ids)) for ids, _ in rows])
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(np.where(is_label, ids, IGNORED))[None],
            "position_ids": torch.from_numpy(positions)[None],
        }

    return one_packed if packed else padded

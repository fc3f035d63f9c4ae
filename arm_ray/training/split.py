"""Parts of a dataset that share no text: for training, calibration, validation.

A text's part is decided by its hash, so that equal texts are in one part by construction, whatever
their order, number and file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.config import DataConfig
from arm_ray.errors import CalibrationError, ConfigError
from arm_ray.training.data import PlacedRow, layout_of, question_of, read_data, read_path

_NO_WORD = re.compile(r"[\W_]+")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Shorter texts (labels, names, numbers) are equal by chance.
_MIN_WORDS = 5
_EXAMPLES = 3


def normalised(text: str) -> str:
    """The text in NFKC and case-folded, with runs of all but letters and digits as one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", folded)).strip()


def part_of(text: str, seed: int, shares: Mapping[str, float]) -> str:
    """The part that a text belongs to, by the SHA-256 of the seed and the normalised text.

    Args:
        text: The text.
        seed: Another seed gives other parts.
        shares: Part -> its share, positive; they count relative to their sum.

    Raises:
        ConfigError: There are no shares, or one is not positive.
    """
    total = _total(shares)
    digest = hashlib.sha256(f"{seed}\n{normalised(text)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2.0**64 * total
    end = 0.0
    for name, share in shares.items():
        end += share
        if place < end:
            return name
    return list(shares)[-1]


def _total(shares: Mapping[str, float]) -> float:
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise ConfigError(
            "the shares of a split are wrong",
            got=dict(shares),
            expected="a positive number for each part, for example train: 0.8, validation: 0.2",
        )
    return sum(shares.values())


def split_file(
    data: DataConfig, directory: Path, shares: Mapping[str, float], seed: int = 0
) -> dict[str, int]:
    """Write PART.jsonl for each part, rows in the order of the data, each file whole or not at all.

    Rows whose questions (prompt, first user message, or text) are equal once normalised are in one
    part.

    Args:
        data: The rows, and which column holds the question.
        directory: Where to; made if it is not there.
        shares: Part -> its share.
        seed: Of the split.

    Returns:
        Part -> its rows.

    Raises:
        ConfigError: A share or a part's name is wrong.
        CalibrationError: The data cannot be used, or a part would be empty; nothing is written.
    """
    _total(shares)
    wrong = [name for name in shares if not _NAME.fullmatch(name)]
    if wrong:
        raise ConfigError(
            "a part's name is used for a file", got=wrong[0], expected="letters, digits and -"
        )
    rows, columns = read_data(data)
    layout = layout_of(data, columns)
    parts = [part_of(question_of(row, layout), seed, shares) for _, row in rows]
    counts = {name: parts.count(name) for name in shares}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise CalibrationError(
            "a part of the split would be empty",
            where=data.path,
            got=", ".join(f"{name}: {count} rows" for name, count in counts.items()),
            expected="at least one row in each",
            hint="give it a larger share, take another seed, or split more data",
        )
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_file(directory / f"{name}.jsonl"))
                 for name in shares}  # fmt: skip
        for name, (_, row) in zip(parts, rows, strict=True):
            files[name].write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
    return counts


@dataclass(frozen=True)
class Overlap:
    """How many texts of one set are in another.

    Attributes:
        indices: Numbers of the texts of the first set that are, ascending.
        examples: The first few of them, as they stand there.
    """

    indices: tuple[int, ...]
    examples: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many."""
        return len(self.indices)


def overlaps(texts_a: Iterable[str], texts_b: Iterable[str]) -> Overlap:
    """Which texts of `a` are in `b`, both normalised; empty texts are in nothing."""
    known = {normalised(text) for text in texts_b} - {""}
    found = [(i, text) for i, text in enumerate(texts_a) if normalised(text) in known]
    return Overlap(tuple(i for i, _ in found), tuple(text for _, text in found[:_EXAMPLES]))


def texts_in(path: str) -> Iterator[str]:
    """Every text of five words or more in the rows of a file, messages and lists included.

    Raises:
        CalibrationError: The file cannot be read.
    """
    rows, _ = read_path(path)
    for _, row in rows:
        for text in _texts(row):
            if len(normalised(text).split()) >= _MIN_WORDS:
                yield text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for child in value:
            yield from _texts(child)


def keep_apart(
    rows: list[PlacedRow],
    questions: list[str],
    paths: Iterable[str],
    on_overlap: str,
) -> tuple[list[PlacedRow], list[str]]:
    """Look for training questions in data that must not be trained on.

    Args:
        rows: The training rows.
        questions: The question of each.
        paths: The other data.
        on_overlap: `error`; `drop` the rows; or `warn` and keep them.

    Returns:
        The rows to train on, and a sentence for each file that has some of them.

    Raises:
        CalibrationError: A question is there, with `error`; or all rows are dropped.
    """
    told, dropped = [], set[int]()
    for path in paths:
        found = overlaps(questions, texts_in(path))
        if not found.count:
            continue
        first = found.indices[0]
        excerpt = found.examples[0] if len(found.examples[0]) <= 100 else (
            found.examples[0][:97] + "..."
        )  # fmt: skip
        if on_overlap == "error":
            raise CalibrationError(
                f"{found.count} training rows are also in data that must not be trained on",
                where=path,
                got=f"{rows[first].where}: {excerpt!r}",
                expected="no question in both",
                hint="split the data again, remove the rows, or set on_overlap to drop",
            )
        what = "dropped" if on_overlap == "drop" else "kept"
        told.append(
            f"{found.count} training rows are also in {path}: {what}; the first is "
            f"{rows[first].where}: {excerpt!r}"
        )
        if on_overlap == "drop":
            dropped |= set(found.indices)
    left = [row for i, row in enumerate(rows) if i not in dropped]
    if rows and not left:
        raise CalibrationError(
            "all training rows are also in data that must not be trained on",
            where=", ".join(paths),
            got=f"{len(rows)} rows, all dropped",
            hint="apart_from names the training data itself?",
        )
    return left, told

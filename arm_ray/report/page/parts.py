"""What a page is made of: sections with figures, tables and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arm_ray.report.page.answers import ChangedAnswers
from arm_ray.report.page.charts import Chart
from arm_ray.report.run_facts import number
from arm_ray.report.words import bytes_text, duration

# Rows of a table at most; what is left out is told.
_MOST_ROWS = 400


@dataclass(frozen=True)
class Table:
    """A table: its cells are texts; columns of numbers are aligned to the right.

    Attributes:
        columns: Titles.
        rows: Cells.
        numeric: Which columns hold numbers.
        marked: Rows that are pointed out.
        left_out: Rows that are not shown.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    left_out: int = 0


@dataclass(frozen=True)
class Figure:
    """A plot with the table behind it, or a table alone.

    Attributes:
        chart: The plot; None: there is none.
        table: The numbers.
        caption: Of a table alone.
    """

    chart: Chart | None = None
    table: Table | None = None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: For links to it.
        title: Of the section.
        figures: What is in it.
        note: Of what is missing, or how it is to be read.
        answers: Changed answers.
        texts: Titles and texts that are shown as they are: commands, configurations.
    """

    id: str
    title: str
    figures: Sequence[Figure] = ()
    note: str = ""
    answers: Sequence[ChangedAnswers] = ()
    texts: Sequence[tuple[str, str]] = ()


def table_of(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Table:
    """A table of at most so many rows that a page stays small."""
    left = max(0, len(rows) - _MOST_ROWS)
    return Table(columns, rows[:_MOST_ROWS], frozenset(numeric), frozenset(marked), left)


def plain_text(value: Any) -> str:
    """A number with six digits at most; a dash for anything else."""
    found = number(value)
    return "–" if found is None else f"{found:.6g}"


def seconds_text(value: Any) -> str:
    """Seconds in words; a dash for anything else."""
    found = number(value)
    return "–" if found is None else duration(found)


def size_text(value: Any) -> str:
    """Bytes in words; a dash for anything else."""
    found = number(value)
    return "–" if found is None else bytes_text(found)

"""What a user sees while a merge runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from arm_ray.report.words import duration as duration
from arm_ray.runtime.session.reporter import print_line

# Most seconds without a line, where there is no bar.
LINE_INTERVAL_S = 8.0


class MergeProgress:
    """Progress over iterations and, within one, over units of work.

    Args:
        console: Where to.
        first: First iteration of this session, 1-based.
        last: The last one that may come.
        units: Units of work in one iteration: forward calls and merged groups.
    """

    def __init__(self, console: Console, first: int, last: int, units: int) -> None:
        self._console = console
        self._first, self._last, self._units = first, last, max(1, units)
        self._started = time.monotonic()
        self._last_line = self._started
        self._cosines = "cos - / -"
        self._done = 0
        self._bar: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[MergeProgress]:
        """Show the bar meanwhile."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[cosines]}"),
        )
        with Progress(*columns, console=self._console) as self._bar:
            total = (self._last - self._first + 1) * self._units
            self._bar.add_task("merging", total=total, cosines=self._cosines)
            yield self
        self._bar = None

    def advance(self, iteration: int, layer: int, num_layers: int) -> None:
        """Count one finished unit of `iteration`; `layer` layers of it are merged."""
        self._done += 1
        where = f"iteration {iteration}/{self._last}  layer {layer}/{num_layers}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._done,
                description=where,
                cosines=self._cosines,
            )
        elif time.monotonic() - self._last_line > LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print_line(self._console, f"{where}  ETA {duration(self._eta())}")

    def finish_iteration(
        self, iteration: int, regime: str, weights: float | None, task: float | None, seconds: float
    ) -> None:
        """Print the line of a finished iteration, with both cosines."""
        self._done = (iteration - self._first + 1) * self._units
        self._cosines = f"cos weights {cosine_text(weights)}, task vectors {cosine_text(task)}"
        self._last_line = time.monotonic()
        eta = f"  ETA at most {duration(self._eta())}" if iteration < self._last else ""
        print_line(
            self._console,
            f"iteration {iteration}/{self._last}  {regime.replace('_', ' ')}  {self._cosines}  "
            f"{duration(seconds)}{eta}",
        )

    def _eta(self) -> float:
        total = (self._last - self._first + 1) * self._units
        elapsed = time.monotonic() - self._started
        return elapsed / max(1, self._done) * (total - self._done)


def cosine_text(value: float | None) -> str:
    """A cosine with enough digits to see a small angle."""
    return "-" if value is None else f"{value:.7f}"


def print_summary(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a closing summary of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)

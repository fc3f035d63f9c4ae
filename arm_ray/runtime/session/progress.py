"""What a user sees while a merge runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from arm_ray.report.words import duration as duration
from arm_ray.runtime.session.reporter import print_line

# Most seconds without a line, where there is no bar.
LINE_INTERVAL_S = 8.0


class MergeProgress:
    """Progress over iterations and, within one, over layer groups that are merged.

    Args:
        console: Where to.
        first: First iteration of this session, 1-based.
        last: The last one that may come.
        groups: Layer groups of the model.
    """

    def __init__(self, console: Console, first: int, last: int, groups: int) -> None:
        self._console = console
        self._first, self._last, self._groups = first, last, max(1, groups)
        self._started = time.monotonic()
        self._last_line = self._started
        self._cosines = "cos - / -"
        self._merged = 0
        # When the iteration before was finished, and when this one's first group was merged.
        self._finished, self._first_merged = self._started, self._started
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
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[cosines]}"),
        )
        with Progress(*columns, console=self._console) as self._bar:
            total = (self._last - self._first + 1) * self._groups
            self._bar.add_task("merging", total=total, cosines=self._cosines, eta="")
            yield self
        self._bar = None

    def advance(self, iteration: int, layer: int, num_layers: int) -> None:
        """Count one merged group of `iteration`; `layer` layers of it are merged."""
        self._merged += 1
        if self._merged == 1:
            self._first_merged = time.monotonic()
        where = f"iteration {iteration}/{self._last}  layer {layer}/{num_layers}"
        left = self._eta(iteration)
        eta = "" if left is None else f"  ETA {duration(left)}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=(iteration - self._first) * self._groups + self._merged,
                description=where,
                cosines=self._cosines,
                eta=eta,
            )
        elif time.monotonic() - self._last_line > LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print_line(self._console, f"{where}{eta}")

    def finish_iteration(
        self, iteration: int, regime: str, weights: float | None, task: float | None, seconds: float
    ) -> None:
        """Print the line of a finished iteration, with both cosines."""
        self._merged = 0
        self._finished = time.monotonic()
        self._cosines = f"cos weights {cosine_text(weights)}, task vectors {cosine_text(task)}"
        self._last_line = time.monotonic()
        left = self._eta(iteration + 1)
        eta = f"  ETA at most {duration(left)}" if left and iteration < self._last else ""
        print_line(
            self._console,
            f"iteration {iteration}/{self._last}  {regime.replace('_', ' ')}  {self._cosines}  "
            f"{duration(seconds)}{eta}",
        )

    def _eta(self, iteration: int) -> float | None:
        """Seconds until the last iteration is finished; this is the one that is being made.

        It takes as long as the mean of the finished ones. Before there is one, or where it takes
        longer, its remaining groups take as long each as those that were merged after the first,
        before which its states were run. None while that is not known.
        """
        now, finished = time.monotonic(), iteration - self._first
        each = (now - self._first_merged) / (self._merged - 1) if self._merged > 1 else 0.0
        if finished:
            whole = (self._finished - self._started) / finished
        elif self._merged > 1:
            whole = self._first_merged - self._started + each * (self._groups - 1)
        else:
            return None
        rest = max(whole - (now - self._finished), each * (self._groups - self._merged))
        return rest + whole * (self._last - iteration)


def cosine_text(value: float | None) -> str:
    """A cosine with enough digits to see a small angle."""
    return "-" if value is None else f"{value:.7f}"


def print_summary(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a closing summary of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)

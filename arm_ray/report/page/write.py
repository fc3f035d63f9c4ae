"""Writes the page of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arm_ray.errors import RunDirectoryError
from arm_ray.report.page.render import render
from arm_ray.report.page.view import view_of
from arm_ray.report.run_record import open_record
from arm_ray.storage.atomic import write_text

REPORT_NAME = "report.html"


def page_of(runs: Sequence[Path], *, is_live: bool = False) -> str:
    """The page of runs, as far as they go. The same files make the same page.

    Raises:
        RunDirectoryError: One of them is not there.
    """
    records = [open_record(path) for path in runs]
    many = len(records) > 1
    views = [
        view_of(record, f"run-{number}" if many else "run")
        for number, record in enumerate(records, start=1)
    ]
    return render(views, is_live=is_live)


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of runs, whole or not at all.

    Args:
        runs: Their directories.
        output: The file; None: `report.html` in the directory of the first.

    Returns:
        The file.

    Raises:
        RunDirectoryError: A run is not there, or the file cannot be written.
    """
    text = page_of(runs)
    file = output or runs[0].expanduser() / REPORT_NAME
    file = file.expanduser().absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text, may_race=True)
    except OSError as error:
        raise RunDirectoryError(
            "the report cannot be written",
            where=file,
            got=error,
            hint="name another file (--output)",
        ) from None
    return file

"""Checks what tables and figures ask for, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from arm_ray.study.columns import COSTS
from arm_ray.study.config import FigureConfig, ShownConfig, TableConfig
from arm_ray.study.grid import CALIBRATION_SEED, SEED, TASK, Cell, Grid, matches


def check_shown(
    grid: Grid, cells: Sequence[Cell], where: str, name: str, shown: ShownConfig
) -> None:
    """Note what a table or figure asks for and cannot have.

    Args:
        grid: Of the study; it keeps the problems.
        cells: All of them.
        where: The key of the table or figure.
        name: Its own, which is that of a file.
        shown: What it asks for.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        grid.problems.append(f"{where}: expected a name of letters and digits, for a file")
    used = axes_of(shown)
    known = [*grid.labels, TASK]
    for axis in used:
        if axis not in known:
            grid.note(f"{where}: there is no axis {axis!r}", axis, known)
    grid.check(shown.where, f"{where}.where")
    if isinstance(shown.against, dict):
        grid.check(shown.against, f"{where}.against")
    for axis in shown.over:
        if axis not in (*grid.labels, SEED, CALIBRATION_SEED):
            grid.note(f"{where}.over: there is no axis {axis!r}", axis, grid.labels)
    if shown.task is not None and shown.task not in grid.tasks:
        grid.note(f"{where}.task: there is no {shown.task!r}", shown.task, grid.tasks)
    values = ("mean", "difference", *COSTS)
    if shown.value not in values:
        grid.note(f"{where}.value: got {shown.value!r}", shown.value, values)
    elif shown.value in COSTS and TASK in used:
        grid.problems.append(f"{where}: {shown.value} is the same for all tasks; drop task")
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if matches(shown.where, cell.labels):
            key = tuple(str(cell.labels.get(axis)) for axis in used)
            groups.setdefault(key, []).append(cell.labels)
    for axis in grid.labels:
        varies = any(len({str(labels[axis]) for labels in group}) > 1 for group in groups.values())
        if varies and axis not in (*used, *shown.over):
            grid.problems.append(
                f"{where}: does not say what becomes of the axis {axis!r}; name it in rows, "
                "columns, x, lines or over, or one label of it in where"
            )


def axes_of(shown: ShownConfig) -> list[str]:
    """The axes that a table or figure spreads out."""
    if isinstance(shown, TableConfig):
        return [*shown.rows, shown.columns]
    assert isinstance(shown, FigureConfig)
    return [shown.x, *([shown.lines] if shown.lines is not None else [])]

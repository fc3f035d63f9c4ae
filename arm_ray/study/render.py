"""A study's tables as Markdown, and its figures with matplotlib."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.errors import ConfigError
from arm_ray.study.columns import COSTS
from arm_ray.study.config import FigureConfig, StudyConfig
from arm_ray.study.grid import TASK
from arm_ray.study.plan import Study
from arm_ray.study.results import Pairs, Row, best_of
from arm_ray.study.sheets import AVERAGE, Sheet, SheetMaker, SheetRow, Value

_SIZE = (6.4, 4.0)


def render(study: Study, results: Sequence[Row]) -> list[Path]:
    """Write all tables and figures; the same results give the same files.

    Returns:
        The files.

    Raises:
        ConfigError: There are figures, and no matplotlib.
        RunDirectoryError: Records of a model are not there.
    """
    maker = SheetMaker(study.config, study.axes, results, Pairs(study.scores))
    written = []
    for name, table in study.config.tables.items():
        sheet = maker.sheet(table, table.rows, table.columns)
        path = study.output / "tables" / f"{name}.md"
        _write(path, as_markdown(sheet, name).encode())
        written.append(path)
    for name, figure in study.config.figures.items():
        rows = [] if figure.lines is None else [figure.lines]
        sheet = maker.sheet(figure, rows, figure.x)
        path = study.output / "figures" / f"{name}.{study.config.figure_format}"
        _write(path, draw(sheet, figure, study.config.figure_format))
        written.append(path)
    return written


def check_renders(config: StudyConfig) -> None:
    """Refuse figures where there is no matplotlib, before anything runs.

    Raises:
        ConfigError: Says how to install it.
    """
    if config.figures:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ConfigError(
                "figures need matplotlib, which is not installed",
                where="figures",
                got=", ".join(config.figures),
                hint="pip install 'arm-ray[study]', or remove the figures",
            ) from None


def as_markdown(sheet: Sheet, name: str) -> str:
    """A table in GitHub's Markdown, with what its numbers are below it."""
    is_difference = sheet.shown.value == "difference"
    best = _best_rows(sheet) if sheet.shown.value == "mean" else {}
    lines = [f"# {sheet.shown.title or name}", ""]
    lines.append("| " + " | ".join(map(_escaped, [*sheet.head, *sheet.columns])) + " |")
    lines.append("|" + "---|" * len(sheet.head) + "---:|" * len(sheet.columns))
    for row in sheet.rows:
        cells = [*map(_escaped, row.labels)]
        for column in sheet.columns:
            value = row.values.get(column)
            text = "-" if value is None else value_text(value, is_difference=is_difference)
            cells.append(f"**{text}**" if best.get(column) is row else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(sheet)]) + "\n"


def value_text(value: Value, *, is_difference: bool = False) -> str:
    """A value with its interval: `54.2 ± 1.1` in per cent, `1.9120 ± 0.0100` of a loss.

    A difference has its sign, both ends of its interval and the p-value.
    """
    if not math.isfinite(value.mean):
        return "not finite"
    if value.metric in COSTS:
        return f"{value.mean:.4g}"
    factor, digits = (1.0, 4) if value.metric == "loss" else (100.0, 1)
    mean, low, high = (factor * v for v in (value.mean, value.low, value.high))
    if value.p_value is not None:
        sure = "p < 0.001" if value.p_value < 0.001 else f"p = {value.p_value:.3f}"
        return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {sure}"
    if not math.isfinite(low):
        return f"{mean:{'+' if is_difference else ''}.{digits}f}"
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def draw(sheet: Sheet, figure: FigureConfig, kind: str) -> bytes:
    """A figure's file."""
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("agg")
    from matplotlib import pyplot

    stream = io.BytesIO()
    # Names within the file are drawn by chance without a salt.
    with matplotlib.rc_context({"svg.hashsalt": "arm_ray", "svg.fonttype": "path"}):
        picture, panel = pyplot.subplots(figsize=_SIZE)
        merged = [row for row in sheet.rows if row.kind == "merged"]
        labels = [c for c in sheet.columns if c != AVERAGE]
        places = _places(labels, figure.kind)
        for index, row in enumerate(merged):
            _draw_row(panel, row, labels, places, figure, index, len(merged))
        for index, row in enumerate(r for r in sheet.rows if r.kind != "merged"):
            level = next(iter(row.values.values()))
            shown = _scale(level) * level.mean
            style = ("--", ":", "-.")[index % 3]
            panel.axhline(shown, color="0.5", linestyle=style, label=" ".join(row.labels))
        panel.set_xticks(places, labels)
        panel.set_xlabel(figure.x)
        panel.set_ylabel(_quantity(sheet))
        if figure.title:
            panel.set_title(figure.title)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(title=figure.lines)
        picture.tight_layout()
        # A date would make another file of the same data.
        extra = {"Date": None} if kind == "svg" else {"Software": None}
        picture.savefig(stream, format=kind, metadata=extra, dpi=150)
        pyplot.close(picture)
    matplotlib.use(before)
    return stream.getvalue()


def _draw_row(
    panel: Any,
    row: SheetRow,
    labels: Sequence[str],
    places: Sequence[float],
    figure: FigureConfig,
    index: int,
    count: int,
) -> None:
    there = [i for i, label in enumerate(labels) if label in row.values]
    values = [row.values[labels[i]] for i in there]
    means = [_scale(v) * v.mean for v in values]
    errors = [
        [_scale(v) * max(0.0, v.mean - v.low) if math.isfinite(v.low) else 0.0 for v in values],
        [_scale(v) * max(0.0, v.high - v.mean) if math.isfinite(v.high) else 0.0 for v in values],
    ]
    name = " ".join(row.labels) or None
    if figure.kind == "line":
        at = [places[i] for i in there]
        panel.errorbar(at, means, yerr=errors, marker="o", capsize=3, label=name)
        return
    width = 0.8 / max(1, count)
    at = [places[i] + (index - (count - 1) / 2) * width for i in there]
    panel.bar(at, means, width, yerr=errors, capsize=3, label=name)


def _places(labels: Sequence[str], kind: str) -> list[float]:
    """Where labels lie on an axis: of lines, numbers at their value; else one after the other."""
    if kind == "line":
        with contextlib.suppress(ValueError):
            return [float(label) for label in labels]
    return [float(index) for index in range(len(labels))]


def _scale(value: Value) -> float:
    return 1.0 if value.metric == "loss" or value.metric in COSTS else 100.0


def _quantity(sheet: Sheet) -> str:
    """What the values are, in words."""
    shown = sheet.shown
    metrics = {value.metric for row in sheet.rows for value in row.values.values()}
    metrics.discard(AVERAGE)
    metric = next(iter(metrics)) if len(metrics) == 1 else "score"
    if shown.value in COSTS:
        return {"iterations": "iterations"}.get(shown.value, f"{shown.value.replace('_', ' ')} (s)")
    spread = TASK in (*sheet.head, getattr(shown, "columns", ""), getattr(shown, "x", ""))
    what = metric if spread or shown.task is None else f"{shown.task} {metric}"
    if metric == "score" and "loss" in metrics:
        what = "losses (nats per token) and scores (%)"
    else:
        what += " (nats per token)" if metric == "loss" else " (%)"
    if shown.value == "mean":
        return what
    against = shown.against
    named = (
        against.replace("_", " ")
        if isinstance(against, str)
        else ", ".join(f"{axis} {label}" for axis, label in against.items())
    )
    return f"{what}, difference from {named}"


def _best_rows(sheet: Sheet) -> dict[str, SheetRow]:
    """Column -> the row with the best mean."""
    found = {}
    for column in sheet.columns:
        rows = {str(i): row for i, row in enumerate(sheet.rows) if column in row.values}
        if len(rows) > 1:
            metric = next(iter(rows.values())).values[column].metric
            best = best_of({key: row.values[column].mean for key, row in rows.items()}, metric)
            if best is not None:
                found[column] = rows[best]
    return found


def _notes(sheet: Sheet) -> list[str]:
    shown = sheet.shown
    values = [value for row in sheet.rows for value in row.values.values()]
    parts = [f"{_quantity(sheet)[0].upper()}{_quantity(sheet)[1:]}."]
    problems = sorted({value.problems for value in values} - {0})
    runs = max((value.runs for value in values), default=1)
    confidence = f"{100 * sheet.confidence:g} %"
    if shown.value == "mean":
        over = "problems and runs" if runs > 1 else "problems"
        parts.append(f"± is half of the {confidence} interval of a bootstrap over {over}.")
    elif shown.value == "difference":
        over = "problems and runs" if runs > 1 else "problems"
        parts.append(
            f"In brackets the {confidence} interval of a paired bootstrap over {over}; p is "
            "two-sided, of a permutation test over problems."
        )
    if problems:
        parts.append(f"{' or '.join(map(str, problems))} problems.")
    if runs > 1:
        parts.append(f"Up to {runs} runs are averaged ({', '.join(sheet.over)}).")
    if sheet.failed:
        parts.append(f"{sheet.failed} cells failed and are left out.")
    return [" ".join(parts)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)

"""What a table or figure shows: values by row and column, pooled over what it averages over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Comparison, Estimate
from arm_ray.study.columns import COSTS
from arm_ray.study.config import ShownConfig, StudyConfig
from arm_ray.study.grid import SEED, SERIES, TASK, matches
from arm_ray.study.pooling import Values, aligned, pooled_comparison, pooled_estimate
from arm_ray.study.results import Pairs, Row

AVERAGE = "average"


@dataclass(frozen=True)
class Value:
    """A number of a sheet.

    Attributes:
        mean: The number.
        low: Lower end of its interval; NaN: it has none.
        high: Upper end.
        p_value: Of a difference; None of other values.
        metric: What it is; of a cost, its name.
        problems: That it is a mean over; 0 where it is none.
        runs: Models that it is a mean over.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    p_value: float | None = None
    metric: str = ""
    problems: int = 0
    runs: int = 1


@dataclass(frozen=True)
class SheetRow:
    """A row of a sheet.

    Attributes:
        labels: One for each axis of the rows.
        kind: `base`, `checkpoint` or `merged`.
        values: Column -> value, where there is one.
    """

    labels: tuple[str, ...]
    kind: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Sheet:
    """The values of a table or figure.

    Attributes:
        shown: What was asked for.
        head: The axes of the rows.
        columns: Labels of the columns.
        rows: Without those that are empty.
        over: Axes that are averaged over.
        confidence: Of the intervals.
        failed: Cells that belong here and failed.
    """

    shown: ShownConfig
    head: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[SheetRow, ...]
    over: tuple[str, ...]
    confidence: float
    failed: int = 0


@dataclass
class SheetMaker:
    """Makes sheets of a study's results.

    Attributes:
        config: The study.
        axes: Axis -> its labels.
        results: The rows of `results.parquet`.
        pairs: Reads models' records.
    """

    config: StudyConfig
    axes: Mapping[str, Sequence[Any]]
    results: Sequence[Row]
    pairs: Pairs
    _tasks: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._tasks = [task.name for task in self.config.evaluation.task_settings]

    def sheet(self, shown: ShownConfig, rows: Sequence[str], column: str | None) -> Sheet:
        """The sheet of some axes.

        Args:
            shown: What is asked for.
            rows: Axes of the rows.
            column: The axis of the columns; None: there is one column.

        Raises:
            RunDirectoryError: Records of a model are not there.
        """
        found = [row for row in self.results if self._is_asked(shown, row, [*rows, column])]
        merged = [r for r in found if r["kind"] == "merged" and matches(shown.where, r)]
        scored = [row for row in merged if row["state"] == "scored"]
        columns = self._labels(column, scored)
        made = [*self._shown_models(shown, found, rows, column, columns)]
        for labels in _combinations([self._labels(axis, scored) for axis in rows]):
            mine = [r for r in scored if all(map(_is, rows, labels, [r] * len(rows)))]
            values = self._values(shown, mine, column, columns)
            if values:
                made.append(SheetRow(labels, "merged", values))
        failed = {row["model"] for row in merged if row["state"] == "failed"}
        if column == TASK and shown.value not in COSTS:
            columns, made = _with_average(columns, made)
        over = tuple(axis for axis in shown.over if axis in self.axes)
        confidence = self._settings.confidence
        return Sheet(shown, (*rows,), (*columns,), (*made,), over, confidence, len(failed))

    @property
    def _settings(self) -> EvaluationSettings:
        return self.config.evaluation

    def _is_asked(self, shown: ShownConfig, row: Row, axes: Sequence[str | None]) -> bool:
        """Whether a row of the results has the task and metric that are shown."""
        if row["state"] != "scored":
            return bool(row["state"] == "failed")
        task, spread = row[TASK], TASK in axes
        first = shown.task or self._tasks[0]
        if task not in self._tasks or (not spread and task != first):
            return False
        return bool(row["metric"] == (shown.metric or self._main(task)))

    def _main(self, task: str) -> str | None:
        """The metric of a task that stands first."""
        return next((row["metric"] for row in self.results if row.get(TASK) == task), None)

    def _labels(self, axis: str | None, rows: Sequence[Row]) -> list[str]:
        """The labels of an axis that occur, in their order."""
        if axis is None:
            return [""]
        known = self._tasks if axis == TASK else [str(label) for label in self.axes[axis]]
        there = {str(row[axis]) for row in rows}
        return [label for label in known if label in there]

    def _values(
        self, shown: ShownConfig, rows: Sequence[Row], column: str | None, columns: Sequence[str]
    ) -> dict[str, Value]:
        values = {}
        for label in columns:
            mine = [row for row in rows if column is None or _is(column, label, row)]
            value = self._value(shown, mine) if mine else None
            if value is not None:
                values[label] = value
        return values

    def _value(self, shown: ShownConfig, rows: Sequence[Row]) -> Value | None:
        if shown.value in COSTS:
            costs = {row["model"]: row[shown.value] for row in rows}
            known = [float(cost) for cost in costs.values() if cost is not None]
            if not known:
                return None
            return Value(math.fsum(known) / len(known), metric=shown.value, runs=len(known))
        if shown.value == "difference":
            return self._difference(shown, rows)
        return self._mean(rows)

    def _mean(self, rows: Sequence[Row]) -> Value:
        task, metric = rows[0][TASK], rows[0]["metric"]
        models = list(dict.fromkeys(row["model"] for row in rows))
        if len(models) == 1:
            row = rows[0]
            mean, low, high = (_number(row[name]) for name in ("mean", "low", "high"))
            return Value(mean, low, high, None, metric, row["n"])
        # A model paired with itself has all of its problems.
        first, _, weights, problems = self._tables([(m, m) for m in models], task, metric)
        found: Estimate = pooled_estimate(first, weights, **self._options)
        return Value(found.mean, found.low, found.high, None, metric, problems, len(models))

    def _difference(self, shown: ShownConfig, rows: Sequence[Row]) -> Value | None:
        task, metric = rows[0][TASK], rows[0]["metric"]
        given = ((row["model"], self._reference(shown, row)) for row in rows)
        pairs = list(dict.fromkeys((ours, theirs) for ours, theirs in given if theirs is not None))
        if not pairs:
            return None
        first, second, weights, problems = self._tables(pairs, task, metric)
        if not problems:
            return None
        found: Comparison = pooled_comparison(first, second, weights, **self._options)
        return Value(
            found.difference, found.low, found.high, found.p_value, metric, problems, len(pairs)
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {"confidence": self._settings.confidence, "resamples": self._settings.resamples}

    def _tables(
        self, pairs: Sequence[tuple[str, str]], task: str, metric: str
    ) -> tuple[Values, Values, Values | None, int]:
        """Of pairs of models: `[pairs, problems]` of both, and the weights."""
        found = [self.pairs.pair(*pair, task, metric) for pair in pairs]
        keys = [pair.problems for pair in found]
        problems, first = aligned(keys, [pair.first for pair in found])
        _, second = aligned(keys, [pair.second for pair in found])
        if any(pair.weights is None for pair in found):
            return first, second, None, len(problems)
        given = [np.asarray(pair.weights) for pair in found]
        return first, second, aligned(keys, given)[1], len(problems)

    def _reference(self, shown: ShownConfig, row: Row) -> str | None:
        """Name of the model that a cell is compared with."""
        if isinstance(shown.against, str):
            name: str | None = row[shown.against]
            return name
        # The same cell but for what the selector says.
        same = {a: row[a] for a in self.axes if a not in shown.against}
        for other in self.results:
            if (
                other["kind"] == "merged"
                and other["state"] == "scored"
                and (other[TASK], other["metric"]) == (row[TASK], row["metric"])
                and all(str(other[axis]) == str(label) for axis, label in same.items())
                and matches(shown.against, other)
            ):
                return str(other["model"])
        return None

    def _shown_models(
        self,
        shown: ShownConfig,
        found: Sequence[Row],
        rows: Sequence[str],
        column: str | None,
        columns: Sequence[str],
    ) -> Iterable[SheetRow]:
        """Rows of bases and checkpoints; axes of merges do not tell them apart."""
        if shown.value != "mean":
            return
        asked = {a: labels for a, labels in shown.where.items() if a in (SERIES, SEED)}
        for kind in ("base", "checkpoint"):
            if kind not in [name.removesuffix("s") for name in shown.show]:
                continue
            mine = [
                row
                for row in found
                if row["kind"] == kind
                and row["state"] == "scored"
                # The base of several seeds has none.
                and matches({a: v for a, v in asked.items() if row[a] is not None}, row)
            ]
            groups: dict[tuple[str, ...], list[Row]] = {}
            for row in mine:
                name = "base" if kind == "base" else f"checkpoint {row['checkpoint']}"
                parts = [_shared_label(a, row) for a in rows]
                parts = [*parts[:-1], _joined(parts[-1], name)] if parts else [name]
                groups.setdefault(tuple(parts), []).append(row)
            for labels, members in groups.items():
                known = column if column in (SERIES, SEED, TASK) else None
                if known is not None and all(row[known] is None for row in members):
                    known = None
                values = self._values(shown, members, known, columns if known else [""])
                if known is None and "" in values:
                    # It is the same in all columns.
                    values = dict.fromkeys(columns, values[""])
                if values:
                    yield SheetRow(labels, kind, values)


def _shared_label(axis: str, row: Row) -> str:
    """The label that a base or checkpoint has on an axis; of most it has none."""
    is_shared = axis in (SERIES, SEED, TASK) and row[axis] is not None
    return str(row[axis]) if is_shared else ""


def _joined(label: str, name: str) -> str:
    return f"{label}, {name}" if label else name


def _is(axis: str, label: str, row: Row) -> bool:
    return str(row[axis]) == label


def _combinations(labels: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for axis in labels:
        found = [(*before, label) for before in found for label in axis]
    return found


def _with_average(
    columns: Sequence[str], rows: Sequence[SheetRow]
) -> tuple[list[str], list[SheetRow]]:
    """A column with the mean over the tasks, losses left out, where there are several."""
    used = [
        column
        for column in columns
        if any(column in row.values and row.values[column].metric != "loss" for row in rows)
    ]
    if len(used) < 2:
        return [*columns], [*rows]
    made = []
    for row in rows:
        values = [row.values[column].mean for column in used if column in row.values]
        # Of a model that lacks one of them it would be a mean of other tasks.
        extra = {AVERAGE: Value(math.fsum(values) / len(values), metric=AVERAGE)}
        more = extra if len(values) == len(used) else {}
        made.append(SheetRow(row.labels, row.kind, {**row.values, **more}))
    return [*columns, AVERAGE], made


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

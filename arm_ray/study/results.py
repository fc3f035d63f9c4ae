"""All numbers of a study in one tidy table: one row for each model, task and metric."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.errors import RunDirectoryError
from arm_ray.evaluation.records import (
    PairedScores,
    Record,
    TaskScores,
    finite,
    paired_scores,
    read_records,
)
from arm_ray.evaluation.statistics import Comparison, compare
from arm_ray.storage.regular import open_regular
from arm_ray.study.columns import COLUMNS, REFERENCES, Kind
from arm_ray.study.grid import CANDIDATES, SEED, SERIES, Cell
from arm_ray.study.parts import Run
from arm_ray.study.plan import Study
from arm_ray.study.records import CellRecord, ModelRecord

PARQUET_NAME, LINES_NAME = "results.parquet", "results.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What there is of a study.

    Attributes:
        cells: Merge -> what became of it; without those that were not begun.
        scores: Model -> task -> numbers.
        models: Model -> when and with what it was scored.
        failures: Base or checkpoint -> why it is not scored.
    """

    cells: Mapping[str, CellRecord]
    scores: Mapping[str, Mapping[str, TaskScores]]
    models: Mapping[str, ModelRecord]
    failures: Mapping[str, str]


class Pairs:
    """Reads models' records, and compares two models problem by problem; each once.

    Args:
        directory: Where the records are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[tuple[str, str], list[Record]] = {}
        self._pairs: dict[tuple[str, str, str, str], PairedScores] = {}

    def records(self, model: str, task: str) -> list[Record]:
        """The records of a model's task.

        Raises:
            RunDirectoryError: They are not there.
        """
        if (model, task) not in self._records:
            try:
                self._records[model, task] = read_records(self._directory / model, task)
            except OSError as error:
                raise RunDirectoryError(
                    f"the records of {model} are not there",
                    where=self._directory / model,
                    got=error,
                    expected=f"{task}.parquet",
                    hint="run the study again: what is missing is scored again",
                ) from None
        return self._records[model, task]

    def pair(self, model: str, reference: str, task: str, metric: str) -> PairedScores:
        """Two models on the problems that both were scored on."""
        key = (model, reference, task, metric)
        if key not in self._pairs:
            self._pairs[key] = paired_scores(
                self.records(model, task), self.records(reference, task), metric
            )
        return self._pairs[key]


def result_rows(study: Study, outcome: Outcome) -> list[Row]:
    """The rows: bases, then checkpoints, then cells, each in the order of the study."""
    rows: list[Row] = []
    maker = _Rows(study, outcome)
    told: set[str] = set()
    for run in study.runs:
        # The base of several seeds is one model.
        if run.start is None and run.base_model not in told:
            told.add(run.base_model)
            rows += maker.of_model(run.base_model, "base", {SERIES: run.series})
        elif run.start is not None:
            rows += maker.of_model(run.base_model, "base", _labels_of(run))
    for run in study.runs:
        for step, model in run.models.items():
            labels = {**_labels_of(run), "checkpoint": step}
            rows += maker.of_model(model, "checkpoint", labels)
    for cell in study.cells:
        rows += maker.of_cell(cell)
    return rows


class _Rows:
    def __init__(self, study: Study, outcome: Outcome) -> None:
        self._study, self._outcome = study, outcome
        self._settings = study.config.evaluation
        self._pairs = Pairs(study.scores)
        self._compared: dict[tuple[str, str, str, str], Comparison] = {}

    def of_model(self, model: str, kind: str, labels: Mapping[str, Any]) -> list[Row]:
        head = {**labels, "kind": kind, "model": model}
        if model in self._outcome.failures:
            return [{**head, "state": "failed", "error": self._outcome.failures[model]}]
        return [{**head, "state": "scored", **row} for row in self._scores(model)]

    def of_cell(self, cell: Cell) -> list[Row]:
        name, run = self._study.merge_of(cell).name, self._study.run_of(cell)
        record = self._outcome.cells.get(name)
        if record is None:
            return []
        cost = dict(record.cost)
        for key in ("work", "step_coefficients"):
            value = cost.pop(key, None)
            cost[key] = json.dumps(value) if value else None
        head = {**_labels_of(run), **cell.labels}
        head |= {"kind": "merged", "model": name, "state": record.state}
        head |= {"digest": record.digest, **cost}
        if record.state == "failed":
            return [{**head, "error": record.error}]
        last = run.models[cell.steps[-1]]
        rows = []
        for row in self._scores(name):
            task, metric = row["task"], row["metric"]
            references = (run.base_model, last, self._best(run, task, metric))
            for column, reference in zip(REFERENCES, references, strict=True):
                row |= self._against(name, column, reference, task, metric)
            rows.append({**head, **row})
        return rows

    def _scores(self, model: str) -> list[Row]:
        known = self._outcome.models.get(model)
        scored = {} if known is None else {"date": known.date, **known.environment}
        return [
            {
                "task": task,
                "metric": metric,
                "mean": value.mean,
                "low": value.low,
                "high": value.high,
                "n": scores.num_problems,
                "repeats": scores.repeats,
                **scored,
            }
            for task, scores in self._outcome.scores.get(model, {}).items()
            for metric, value in scores.metrics.items()
        ]

    def _best(self, run: Run, task: str, metric: str) -> str | None:
        """The run's checkpoint with the best mean."""
        means = {
            model: self._outcome.scores[model][task].metrics[metric].mean
            for model in run.models.values()
            if task in self._outcome.scores.get(model, {})
        }
        return best_of(means, metric)

    def _against(
        self, model: str, column: str, reference: str | None, task: str, metric: str
    ) -> Row:
        if reference is None or task not in self._outcome.scores.get(reference, {}):
            return {column: reference}
        key = (model, reference, task, metric)
        if key not in self._compared:
            pair = self._pairs.pair(*key)
            if not pair.problems:
                return {column: reference}
            self._compared[key] = compare(
                pair.first,
                pair.second,
                pair.weights,
                confidence=self._settings.confidence,
                resamples=self._settings.resamples,
            )
        found = self._compared[key]
        return {
            column: reference,
            f"{column}_difference": found.difference,
            f"{column}_low": found.low,
            f"{column}_high": found.high,
            f"{column}_p": found.p_value,
        }


def best_of(means: Mapping[str, float], metric: str) -> str | None:
    """The name with the best mean: of a loss the smallest; None where no mean is finite."""
    known = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not known:
        return None
    return (min if metric == "loss" else max)(known, key=lambda name: known[name])


def write_results(study: Study, rows: Sequence[Row]) -> None:
    """Write the rows as Parquet and as JSON lines; what is not finite is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    axes: dict[str, Kind] = dict.fromkeys(study.axes, "text")
    seeds: dict[str, Kind] = {axis: "integer" for axis in axes if axis.endswith(SEED)}
    # The seed is a column also where it is no axis.
    columns = {SERIES: "text", SEED: "integer", CANDIDATES: "text", **axes, **seeds, **COLUMNS}
    types = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    full = [finite({name: row.get(name) for name in columns}) for row in rows]
    study.output.mkdir(parents=True, exist_ok=True)
    with atomic_file(study.output / PARQUET_NAME) as file:
        pq.write_table(pa.Table.from_pylist(full, schema=schema), file)
    with atomic_file(study.output / LINES_NAME) as file:
        file.write("".join(json.dumps(row) + "\n" for row in full).encode())


def read_results(directory: Path) -> list[Row]:
    """The rows that `write_results` wrote.

    Raises:
        RunDirectoryError: There are none.
    """
    import pyarrow.parquet as pq

    path = directory / PARQUET_NAME
    try:
        with open_regular(path) as file:
            rows: list[Row] = pq.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            "the study has no results yet",
            where=path,
            got=error,
            hint="run the study: arm-ray study STUDY.yaml",
        ) from None
    return rows


def _labels_of(run: Run) -> dict[str, Any]:
    training = run.training.seed if run.training is not None else None
    return {SERIES: run.series, SEED: run.seed if run.seed is not None else training}

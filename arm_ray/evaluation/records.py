"""What is kept of an evaluation: one row for each completion, and a summary of each task.

::

    evaluation/<model>/<task>.parquet   every completion with its verdict
    evaluation/<model>/<task>.json      the numbers; written last, so that it means complete
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arm_ray.evaluation.code.pass_at_k import pass_at_k
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Estimate, estimate
from arm_ray.storage.atomic import atomic_file, write_json
from arm_ray.storage.regular import json_in, open_regular


@dataclass(frozen=True)
class Record:
    """One completion, or one held-out sample.

    Attributes:
        problem: Key of the problem.
        repeat: Which of its completions, from 0.
        seed: It was drawn with.
        prompt_hash: SHA-256 of the prompt's token ids, 16 hex digits.
        prompt_tokens: Length of the prompt.
        completion: The text.
        num_tokens: Drawn tokens; for a loss the tokens that count.
        finish: `stop`, `length` or `too_long`.
        version: Of the weights.
        answer: What was taken for the answer; None where nothing was.
        note: How the answer was found, or how the program ended.
        scores: Metric -> verdict from 0 to 1; for a loss the sum in nats.
    """

    problem: str
    repeat: int
    seed: int
    prompt_hash: str
    prompt_tokens: int
    completion: str
    num_tokens: int
    finish: str
    version: str
    answer: str | None
    note: str
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScores:
    """A task's numbers for one model.

    Attributes:
        task: Name.
        kind: `math`, `code`, `questions` or `loss`.
        digest: Of the task, the engine's settings and the weights.
        metrics: Metric -> mean and interval; the task's main metric first.
        num_problems: Problems.
        repeats: Completions of each.
        counts: How many completions were `truncated`, `too_long`, had `no_answer` or `timed_out`.
        mean_tokens: Of a completion.
        seconds: From the first request to the last verdict.
        version: Of the weights.
    """

    task: str
    kind: str
    digest: str
    metrics: Mapping[str, Estimate]
    num_problems: int
    repeats: int
    counts: Mapping[str, int]
    mean_tokens: float
    seconds: float
    version: str


def per_problem(records: Sequence[Record], metric: str) -> dict[str, float]:
    """Problem -> its score: the mean over its completions, or pass@k of them.

    A loss is per token; what has no token that counts is left out.
    """
    by_problem: dict[str, list[Record]] = {}
    for record in records:
        by_problem.setdefault(record.problem, []).append(record)
    if metric.startswith("pass@"):
        k = int(metric.removeprefix("pass@"))
        # Of several ways to cut the program out of a completion the best one is reported, for the
        # benchmark as a whole (CodeEval-Pro).
        ways = sorted({name for record in records for name in record.scores}) or ["passed"]
        tables = [
            {
                problem: pass_at_k(len(rows), sum(r.scores.get(way, 0.0) >= 1.0 for r in rows), k)
                for problem, rows in by_problem.items()
            }
            for way in ways
        ]
        return max(tables, key=lambda table: math.fsum(table.values()))
    if metric == "loss":
        return {
            problem: sum(r.scores["loss"] for r in rows) / sum(r.num_tokens for r in rows)
            for problem, rows in by_problem.items()
            if any(r.num_tokens for r in rows)
        }
    return {
        problem: math.fsum(r.scores[metric] for r in rows) / len(rows)
        for problem, rows in by_problem.items()
    }


def summarise(
    records: Sequence[Record],
    settings: EvaluationSettings,
    *,
    task: str,
    kind: str,
    metrics: Sequence[str],
    digest: str,
    seconds: float,
) -> TaskScores:
    """The numbers of one task for one model, from all its records."""
    return TaskScores(
        task,
        kind,
        digest,
        {name: _estimate(records, name, settings) for name in metrics},
        len({record.problem for record in records}),
        1 + max(record.repeat for record in records),
        {
            "truncated": sum(r.finish == "length" for r in records),
            "too_long": sum(r.finish == "too_long" for r in records),
            "no_answer": 0 if kind == "loss" else sum(r.answer is None for r in records),
            "timed_out": sum("timeout" in r.note for r in records),
        },
        float(np.mean([r.num_tokens for r in records])),
        round(seconds, 3),
        records[0].version,
    )


def _estimate(records: Sequence[Record], metric: str, settings: EvaluationSettings) -> Estimate:
    options: dict[str, Any] = {
        "confidence": settings.confidence,
        "resamples": settings.resamples,
    }
    if metric != "loss":
        return estimate(np.array(list(per_problem(records, metric).values())), **options)
    # Tokens of one sample are not independent, samples are: a ratio of two sums over samples.
    counted = [r for r in records if r.num_tokens]
    if not counted:
        return Estimate(math.nan, math.nan, math.nan)
    sums = np.array([r.scores["loss"] for r in counted])
    tokens = np.array([float(r.num_tokens) for r in counted])
    return estimate(sums, tokens, **options)


def write_records(directory: Path, records: Sequence[Record], scores: TaskScores) -> None:
    """Write both files of a task, the summary last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for record in records:
        row = dataclasses.asdict(record)
        rows.append({**row, "scores": json.dumps(finite(row["scores"]), sort_keys=True)})
    with atomic_file(directory / f"{scores.task}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), file)
    write_json(directory / f"{scores.task}.json", finite(dataclasses.asdict(scores)))


def read_records(directory: Path, task: str) -> list[Record]:
    """The records of a task."""
    import pyarrow.parquet as pq

    with open_regular(directory / f"{task}.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    return [Record(**{**row, "scores": _numbers(json.loads(row["scores"]))}) for row in rows]


def read_scores(directory: Path, task: str) -> TaskScores | None:
    """The summary of a task, or None where it is not complete."""
    try:
        content = json_in(directory / f"{task}.json")
        metrics = {
            name: Estimate(**_numbers(value)) for name, value in content.pop("metrics").items()
        }
        return TaskScores(**content, metrics=metrics)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def scores_of(records: Sequence[Record], metric: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """Scores of these problems, in this order, `[n]` float64. For losses: `losses_of`."""
    found = per_problem(records, metric)
    return np.array([found[key] for key in keys])


def losses_of(
    first: Sequence[Record], second: Sequence[Record]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Summed losses of two models, sample by sample, and the tokens that they are sums over.

    Samples of which one model has no token that counts are left out. Divided by the sum of the
    tokens, the difference of the two sums is that of the models' losses per token.

    Returns:
        The first model's sums, the second's, and the first's tokens: `[n]` each.
    """
    by_problem = {record.problem: record for record in second if record.num_tokens}
    ours = [r for r in first if r.num_tokens and r.problem in by_problem]
    theirs = [by_problem[record.problem] for record in ours]
    sums, other_sums = (np.array([r.scores["loss"] for r in rows]) for rows in (ours, theirs))
    tokens, other = (np.array([float(r.num_tokens) for r in rows]) for rows in (ours, theirs))
    # Under another tokenizer a sample has another number of tokens: put on the first's scale.
    scale = tokens.sum() / other.sum() if ours else 1.0
    return sums, other_sums * scale, tokens


@dataclass(frozen=True)
class PairedScores:
    """The scores of two models on the problems that both were scored on.

    Attributes:
        problems: Keys of the problems, `n` of them.
        first: `[n]`, one model's scores; for a loss, sums over tokens.
        second: `[n]`, the other's.
        weights: `[n]`, the tokens that a loss is summed over; None for other scores.
    """

    problems: tuple[str, ...]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    weights: NDArray[np.float64] | None


def paired_scores(first: Sequence[Record], second: Sequence[Record], metric: str) -> PairedScores:
    """Two models problem by problem, as `statistics.compare` takes them. See `losses_of`."""
    if metric == "loss":
        counted = {record.problem for record in second if record.num_tokens}
        keys = tuple(r.problem for r in first if r.num_tokens and r.problem in counted)
        return PairedScores(keys, *losses_of(first, second))
    keys = tuple(dict.fromkeys(record.problem for record in second))
    ours, theirs = (scores_of(rows, metric, keys) for rows in (first, second))
    return PairedScores(keys, ours, theirs, None)


def finite(content: Any) -> Any:
    """The same content for JSON, which knows no NaN and no infinity: they become null."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _numbers(content: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in content.items()}


def _schema() -> Any:
    import pyarrow as pa

    text, integer = pa.string(), pa.int64()
    return pa.schema(
        [
            ("problem", text),
            ("repeat", integer),
            ("seed", integer),
            ("prompt_hash", text),
            ("prompt_tokens", integer),
            ("completion", text),
            ("num_tokens", integer),
            ("finish", text),
            ("version", text),
            ("answer", text),
            ("note", text),
            ("scores", text),
        ]
    )

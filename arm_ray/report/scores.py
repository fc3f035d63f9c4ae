"""Scores of several models as a table like the paper's, and their paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arm_ray.evaluation.records import TaskScores, finite, paired_scores, read_records
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Comparison, compare

Scores = Mapping[str, Mapping[str, TaskScores]]


@dataclass(frozen=True)
class PairedResult:
    """One model against the reference in one metric of one task."""

    model: str
    reference: str
    task: str
    metric: str
    comparison: Comparison


def main_metric(scores: TaskScores) -> str:
    """The metric that stands first."""
    return next(iter(scores.metrics))


def average(tasks: Mapping[str, TaskScores]) -> float | None:
    """Mean of the main metrics over the tasks, losses left out; None where nothing is left."""
    values = [s.metrics[main_metric(s)].mean for s in tasks.values() if main_metric(s) != "loss"]
    return math.fsum(values) / len(values) if values else None


def paired_results(
    scores: Scores, directory: Path, reference: str, settings: EvaluationSettings
) -> list[PairedResult]:
    """Every other model against the reference, in the main metric of every task.

    There is none where no problem has a score of both.

    Args:
        scores: Model -> task -> numbers.
        directory: Where the models' records are.
        reference: Name of the model that the others are compared with.
        settings: Confidence and number of resamples.
    """
    found = []
    for task, of_reference in scores[reference].items():
        metric = main_metric(of_reference)
        theirs = read_records(directory / reference, task)
        for model in scores:
            if model == reference or task not in scores[model]:
                continue
            pair = paired_scores(read_records(directory / model, task), theirs, metric)
            if not pair.problems:
                continue
            result = compare(
                pair.first,
                pair.second,
                pair.weights,
                confidence=settings.confidence,
                resamples=settings.resamples,
            )
            found.append(PairedResult(model, reference, task, metric, result))
    return found


def scores_as_json(scores: Scores, paired: Sequence[PairedResult]) -> dict[str, Any]:
    """Everything that the tables show, and more, for programs; what is not finite is null."""
    content: dict[str, Any] = {
        "models": {
            model: {
                "average": average(tasks),
                "tasks": {
                    name: {**asdict(value), **_perplexity(value)} for name, value in tasks.items()
                },
            }
            for model, tasks in scores.items()
        },
        "paired": [asdict(result) for result in paired],
    }
    without_nan: dict[str, Any] = finite(content)
    return without_nan


def print_scores(
    console: Console,
    scores: Scores,
    paired: Sequence[PairedResult],
    *,
    title: str = "scores",
    marked: str | None = None,
) -> None:
    """Print the table of scores, and one of the paired comparisons.

    Args:
        console: Where to.
        scores: Model -> task -> numbers.
        paired: Comparisons to show below.
        title: Of the table.
        marked: A model to point out: the one that was selected.
    """
    names = list(dict.fromkeys(task for tasks in scores.values() for task in tasks))
    first = {name: next(t[name] for t in scores.values() if name in t) for name in names}
    has_average = sum(main_metric(s) != "loss" for s in first.values()) > 1
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for name in names:
        given = first[name]
        heads = " | ".join(given.metrics)
        size = f"n = {given.num_problems}" + (f" x {given.repeats}" if given.repeats > 1 else "")
        table.add_column(f"{name}\n{heads}\n{size}", justify="right")
    if has_average:
        table.add_column("average", justify="right")
    for model, tasks in scores.items():
        cells = [f"{model} *" if model == marked else model]
        cells += [_cell(tasks[name]) if name in tasks else "-" for name in names]
        if has_average:
            mean = average(tasks)
            cells.append("-" if mean is None else f"{100 * mean:.1f}")
        table.add_row(*cells)
    console.print(table)
    if marked is not None:
        console.print("* selected", highlight=False)
    _print_notes(console, scores)
    _print_paired(console, paired)


def scores_as_markdown(scores: Scores, marked: str) -> str:
    """The table of scores for a model card; the selected model is marked."""
    names = list(dict.fromkeys(task for tasks in scores.values() for task in tasks))
    first = {name: next(t[name] for t in scores.values() if name in t) for name in names}
    heads = [f"{name} ({', '.join(first[name].metrics)})" for name in names]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(names) + 1) + "|"]
    for model, tasks in scores.items():
        # The bar that parts two metrics in a terminal would part two cells here.
        cells = [
            _cell(tasks[name]).replace(" | ", ", ") if name in tasks else "-" for name in names
        ]
        shown = f"**{model}**" if model == marked else model
        lines.append("| " + " | ".join([shown, *cells]) + " |")
    return "\n".join(lines)


def _cell(scores: TaskScores) -> str:
    parts = []
    for name, value in scores.metrics.items():
        half = (value.high - value.low) / 2
        if name == "loss":
            perplexity = _perplexity(scores)["perplexity"]
            parts.append(f"{value.mean:.4f} ± {half:.4f} (ppl {perplexity:.4g})")
        elif parts:
            parts.append(f"{100 * value.mean:.1f}")
        else:
            parts.append(f"{100 * value.mean:.1f} ± {100 * half:.1f}")
    return " | ".join(parts)


def _perplexity(scores: TaskScores) -> dict[str, float]:
    """exp(loss) of a held-out loss in nats per token; nothing for other tasks."""
    if "loss" not in scores.metrics:
        return {}
    # A model that is lost entirely may be beyond the largest float.
    return {"perplexity": math.exp(min(scores.metrics["loss"].mean, 700.0))}


def _print_notes(console: Console, scores: Scores) -> None:
    """Say what happened to completions that did not end as they should."""
    words = {
        "too_long": "prompts did not fit into the context (counted as wrong)",
        "truncated": "completions were cut at max_tokens",
        "timed_out": "verdicts ran out of time (counted as wrong)",
    }
    for key, text in words.items():
        found = [
            f"{model}/{task} {value.counts.get(key, 0)}"
            for model, tasks in scores.items()
            for task, value in tasks.items()
            if value.counts.get(key)
        ]
        if found:
            shown = ", ".join(found[:8]) + (" …" if len(found) > 8 else "")
            console.print(f"{text}: {shown}", highlight=False, soft_wrap=True, markup=False)


def _print_paired(console: Console, paired: Sequence[PairedResult]) -> None:
    if not paired:
        return
    tasks = list(dict.fromkeys(result.task for result in paired))
    by_place = {(r.model, r.task): r for r in paired}
    table = Table(
        title=f"compared with {paired[0].reference}, problem by problem (p, two-sided)",
        title_justify="left",
    )
    table.add_column("model")
    for task in tasks:
        table.add_column(task, justify="right")
    for model in dict.fromkeys(result.model for result in paired):
        cells = []
        for task in tasks:
            result = by_place.get((model, task))
            cells.append("-" if result is None else _paired_cell(result))
        table.add_row(model, *cells)
    console.print(table)


def _paired_cell(result: PairedResult) -> str:
    found = result.comparison
    if math.isnan(found.p_value):
        return "-"
    sure = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    if result.metric == "loss":
        return f"{found.difference:+.4f} ({sure})"
    return f"{100 * found.difference:+.1f} ({sure})"

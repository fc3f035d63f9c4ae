"""What scoring a model gave, for people and for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.evaluation.engine import LoadReport
from arm_ray.evaluation.records import TaskScores
from arm_ray.events import ModelScored
from arm_ray.runtime.scoring.subject import Subject


@dataclass(frozen=True)
class ScoringWork:
    """What was done to score a model, beside what was known from before.

    Attributes:
        report: How its weights were loaded; None where all of it was known.
        seconds: From the begin to the last verdict.
        samples: Completions, or held-out samples.
        tokens: Those drawn, or of held-out samples those that count.
    """

    report: LoadReport | None
    seconds: float
    samples: int = 0
    tokens: int = 0


def scored_event(
    subject: Subject, scores: Mapping[str, TaskScores], work: ScoringWork
) -> ModelScored:
    """The event of a scored model."""
    report = work.report
    return ModelScored(
        subject.name,
        subject.source.given,
        {
            task: {
                name: round(value.mean, 6) if math.isfinite(value.mean) else None
                for name, value in given.metrics.items()
            }
            for task, given in scores.items()
        },
        round(work.seconds, 3),
        None if report is None else round(report.seconds, 3),
        () if report is None else report.canary.token_ids,
        work.samples,
        work.tokens,
        0 if report is None else report.fetched_bytes,
    )


def scored_line(name: str, scores: Mapping[str, TaskScores], seconds: float) -> str:
    """A scored model in a line."""
    parts = []
    for task, given in scores.items():
        metric, value = next(iter(given.metrics.items()))
        shown = f"{value.mean:.4f}" if metric == "loss" else f"{100 * value.mean:.1f} %"
        parts.append(f"{task} {metric} {shown}")
    return f"scored {name}: {', '.join(parts)}  {seconds:.1f} s"


def flat_means(tasks: Mapping[str, TaskScores]) -> dict[tuple[str, str], float]:
    """Task and metric -> mean, as criteria take them."""
    return {
        (task, metric): value.mean
        for task, given in tasks.items()
        for metric, value in given.metrics.items()
    }


def write_table(directory: Path, table: Mapping[str, Any]) -> None:
    """Write `scores.json`, the numbers of all models together."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "scores.json", table)

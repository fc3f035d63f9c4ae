"""The sentence at the end: which model is best, by how much, and how sure that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arm_ray.evaluation.records import Record, TaskScores, summarise, write_records
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.report.verdict import verdict

SETTINGS = EvaluationSettings(("held",), resamples=500)
COUNT = 40


def scored(root: Path, model: str, task: str, metric: str, values: list[float]) -> TaskScores:
    """Scores of a model on a task, with records of one problem each."""
    rows = [
        Record(str(i), 0, 0, "", 1, "", 1, "stop", model, None, "", {metric: value})
        for i, value in enumerate(values)
    ]
    found = summarise(
        rows, SETTINGS, task=task, kind="loss" if metric == "loss" else "questions",
        metrics=(metric,), digest="", seconds=1.0,
    )  # fmt: skip
    write_records(root / model, rows, found)
    return found


def losses(root: Path, **means: float) -> dict[str, dict[str, TaskScores]]:
    """Model -> the task `held`: losses around a mean, with the same difficulty of each problem."""
    hard = np.random.default_rng(0).normal(0.0, 0.2, COUNT)
    noise = np.random.default_rng(1)
    return {
        name: {
            "held": scored(
                root, name, "held", "loss", list(mean + hard + noise.normal(0.0, 0.01, COUNT))
            )
        }
        for name, mean in means.items()
    }


@pytest.mark.parametrize(
    ("means", "text"),
    [
        (
            {"base": 3.0, "c1": 2.0, "c2": 1.9, "ARM": 1.5, "TA": 1.6},
            "ARM is the best model: better than c2, the best that was not merged (held loss 1.4",
        ),
        (
            {"base": 3.0, "c1": 1.2, "ARM": 1.5, "TA": 1.4},
            "No merge is better than c1, which is the best model; the best merge is TA (held loss",
        ),
        (
            {"base": 3.0, "c1": 1.5, "ARM": 1.5},
            "ARM and c1, the best that was not merged, are equal within the error (held loss",
        ),
    ],
)
def test_it_says_what_the_interval_says(tmp_path: Path, means: dict[str, float], text: str) -> None:
    said = verdict(losses(tmp_path, **means), tmp_path, {"ARM", "TA"}, SETTINGS)
    assert said.startswith(text)
    assert said.endswith(f"{COUNT} problems).")
    assert "95 % interval " in said


def test_without_a_loss_the_first_task_counts_in_percent(tmp_path: Path) -> None:
    scores = {
        "base": {"exam": scored(tmp_path, "base", "exam", "score", [0.0] * 30 + [1.0] * 10)},
        "ARM": {"exam": scored(tmp_path, "ARM", "exam", "score", [0.0] * 10 + [1.0] * 30)},
    }
    said = verdict(scores, tmp_path, {"ARM"}, SETTINGS)
    assert "(exam score 75.0 % against 25.0 %, difference +50.0 %, 95 % interval +" in said


def test_nothing_to_compare_with_is_said(tmp_path: Path) -> None:
    nan = {"base": float("nan"), "ARM": 1.0}
    for means in ({"ARM": 1.0}, nan):
        said = verdict(losses(tmp_path, **means), tmp_path, {"ARM"}, SETTINGS)
        assert said == "There is no merged model and another one to compare it with."

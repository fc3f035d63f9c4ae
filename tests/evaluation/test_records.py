"""What is kept of an evaluation, and read again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NoReturn

import pyarrow.parquet as pq
import pytest

from arm_ray.evaluation.records import (
    Record,
    losses_of,
    per_problem,
    read_records,
    read_scores,
    summarise,
    write_records,
)
from arm_ray.evaluation.settings import EvaluationSettings


def sample(problem: str, loss: float, tokens: int) -> Record:
    return Record(problem, 0, 0, "", 9, "", tokens, "stop", "v", None, "", {"loss": loss})


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def test_what_is_not_finite_is_null_in_the_files_and_nan_again_when_read(tmp_path: Path) -> None:
    rows = [sample("a", math.nan, 3), sample("b", 2.0, 4)]
    settings = EvaluationSettings(("dev",), resamples=100)
    scores = summarise(
        rows, settings, task="dev", kind="loss", metrics=["loss"], digest="d", seconds=1.0
    )
    write_records(tmp_path, rows, scores)
    content = json.loads((tmp_path / "dev.json").read_text(), parse_constant=refuse)
    assert content["metrics"]["loss"] == {"mean": None, "low": None, "high": None}
    column = pq.read_table(tmp_path / "dev.parquet")["scores"].to_pylist()
    assert column == ['{"loss": null}', '{"loss": 2.0}']
    found = read_scores(tmp_path, "dev")
    assert found is not None
    assert math.isnan(found.metrics["loss"].mean)
    first, second = read_records(tmp_path, "dev")
    assert math.isnan(first.scores["loss"])
    assert second == rows[1]


def test_records_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "quiz.parquet")
    with pytest.raises(OSError, match="a pipe"):
        read_records(tmp_path, "quiz")


def test_a_sample_without_tokens_has_no_loss() -> None:
    assert per_problem([sample("a", 0.0, 0), sample("b", 2.0, 4)], "loss") == {"b": 0.5}


def test_losses_are_paired_by_problem() -> None:
    ours = [sample("a", 1.0, 2), sample("b", 3.0, 4), sample("c", 0.0, 0)]
    theirs = [sample("b", 5.0, 4), sample("a", 0.5, 2), sample("c", 9.0, 3)]
    first, second, tokens = losses_of(ours, theirs)
    assert [list(first), list(second), list(tokens)] == [[1.0, 3.0], [0.5, 5.0], [2.0, 4.0]]
    assert [len(part) for part in losses_of(ours, [])] == [0, 0, 0]

"""Tables of scores: what is printed, written for programs, and put into a model card."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.evaluation.records import Record, TaskScores, summarise, write_records
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Estimate
from arm_ray.report.scores import (
    PairedResult,
    average,
    paired_results,
    print_scores,
    scores_as_json,
    scores_as_markdown,
)


def task(name: str, kind: str = "math", **metrics: tuple[float, float, float]) -> TaskScores:
    return TaskScores(
        task=name,
        kind=kind,
        digest="0",
        metrics={key: Estimate(*value) for key, value in metrics.items()},
        num_problems=8,
        repeats=5,
        counts={"too_long": 0, "truncated": 2 if name == "gsm8k" else 0},
        mean_tokens=10.0,
        seconds=1.0,
        version="v",
    )


SCORES = {
    "base": {
        "gsm8k": task("gsm8k", strict=(0.5, 0.4, 0.6), qwen_compat=(0.55, 0.4, 0.6)),
        "math500": task("math500", strict=(0.1, 0.0, 0.2), qwen_compat=(0.1, 0.0, 0.2)),
        "dev": task("dev", "loss", loss=(math.log(4.0), 1.3, 1.5)),
    },
    "state-0001": {
        "gsm8k": task("gsm8k", strict=(0.7, 0.6, 0.8), qwen_compat=(0.75, 0.6, 0.8)),
        "math500": task("math500", strict=(0.3, 0.2, 0.4), qwen_compat=(0.4, 0.2, 0.4)),
        "dev": task("dev", "loss", loss=(1000.0, 1.3, 1.5)),
    },
}


def printed() -> str:
    stream = io.StringIO()
    print_scores(Console(file=stream, width=160), SCORES, [], marked="state-0001")
    return stream.getvalue()


def test_the_average_is_over_the_main_metrics_without_losses() -> None:
    assert average(SCORES["state-0001"]) == 0.5
    assert average({"dev": SCORES["base"]["dev"]}) is None


def test_the_table_has_both_modes_the_average_the_perplexity_and_the_selected_model() -> None:
    lines = [line for line in printed().splitlines() if "state-0001" in line or "base" in line]
    assert "50.0 ± 10.0 | 55.0" in lines[0]
    assert "30.0" in lines[0].split("│")[-2]
    assert "1.3863 ± 0.1000 (ppl 4)" in lines[0]
    assert lines[1].split("│")[1].strip() == "state-0001 *"


def test_cut_completions_are_told_and_what_did_not_happen_is_not() -> None:
    assert "completions were cut at max_tokens: base/gsm8k 2, state-0001/gsm8k 2" in printed()
    assert "context" not in printed()


def test_json_holds_every_number_and_stays_json_for_a_lost_model() -> None:
    content = json.loads(json.dumps(scores_as_json(SCORES, []), allow_nan=False))
    assert content["models"]["base"]["tasks"]["dev"]["perplexity"] == math.exp(math.log(4.0))
    assert content["models"]["base"]["average"] == 0.3
    assert "perplexity" not in content["models"]["base"]["tasks"]["gsm8k"]
    assert content["models"]["state-0001"]["tasks"]["math500"]["metrics"]["qwen_compat"] == {
        "mean": 0.4,
        "low": 0.2,
        "high": 0.4,
    }


def test_markdown_marks_the_selected_model() -> None:
    rows = scores_as_markdown(SCORES, "state-0001").splitlines()
    assert rows[0].startswith("| model | gsm8k (strict, qwen_compat) |")
    assert rows[-1].startswith("| **state-0001** | 70.0 ± 10.0, 75.0 |")


SETTINGS = EvaluationSettings(("dev",), resamples=200)


def held_out(directory: Path, model: str, samples: list[tuple[float, int]]) -> TaskScores:
    """Write what a model's losses leave: loss per token and tokens of each sample."""
    rows = [
        Record(str(i), 0, 0, "", n, "", n, "stop", "v", None, "", {"loss": mean * n})
        for i, (mean, n) in enumerate(samples)
    ]
    scores = summarise(
        rows, SETTINGS, task="dev", kind="loss", metrics=["loss"], digest="", seconds=0.0
    )
    write_records(directory / model, rows, scores)
    return scores


def compared(
    directory: Path, ours: list[tuple[float, int]], theirs: list[tuple[float, int]]
) -> tuple[dict[str, dict[str, TaskScores]], list[PairedResult]]:
    scores = {
        "base": {"dev": held_out(directory, "base", theirs)},
        "merged": {"dev": held_out(directory, "merged", ours)},
    }
    return scores, paired_results(scores, directory, "base", SETTINGS)


def test_losses_are_compared_as_the_table_has_them(tmp_path: Path) -> None:
    # By samples the first model is better, by tokens the second; the last one did not fit.
    ours, theirs = [(1.0, 10), (2.0, 1000), (0.0, 0)], [(1.4, 10), (1.9, 1000), (0.0, 0)]
    scores, [paired] = compared(tmp_path, ours, theirs)
    table = [scores[model]["dev"].metrics["loss"].mean for model in ("merged", "base")]
    assert paired.comparison.difference == pytest.approx(table[0] - table[1], abs=1e-12)
    assert paired.comparison.difference > 0
    assert paired.comparison.num_problems == 2


def test_samples_that_one_model_could_not_take_are_not_compared(tmp_path: Path) -> None:
    _, [paired] = compared(tmp_path, [(1.0, 10), (0.0, 0)], [(1.5, 10), (9.0, 10)])
    assert paired.comparison.difference == pytest.approx(-0.5)
    assert paired.comparison.num_problems == 1
    # With another tokenizer it is still the difference of nats per token.
    _, [paired] = compared(tmp_path, [(1.0, 10)], [(1.5, 20)])
    assert paired.comparison.difference == pytest.approx(-0.5)
    _, none = compared(tmp_path, [(0.0, 0)], [(1.5, 10)])
    assert none == []


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    scores, paired = compared(tmp_path, [(1.0, 10), (math.nan, 5)], [(1.5, 10), (2.0, 5)])
    content = json.loads(json.dumps(scores_as_json(scores, paired), allow_nan=False))
    loss = content["models"]["merged"]["tasks"]["dev"]["metrics"]["loss"]
    assert loss == {"mean": None, "low": None, "high": None}
    assert content["models"]["merged"]["tasks"]["dev"]["perplexity"] is None
    assert content["paired"][0]["comparison"]["p_value"] is None
    stream = io.StringIO()
    print_scores(Console(file=stream, width=160), scores, paired)
    assert "p <" not in stream.getvalue()

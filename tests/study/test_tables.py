"""Results, tables and figures of records that are written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm_ray import cli
from arm_ray.config import validate
from arm_ray.errors import ConfigError, RunDirectoryError
from arm_ray.evaluation.records import Record, TaskScores, summarise, write_records
from arm_ray.evaluation.statistics import compare
from arm_ray.study.config import StudyConfig
from arm_ray.study.plan import Study
from arm_ray.study.pooling import pooled_comparison
from arm_ray.study.records import CellRecord, MergeCost, ModelRecord, cost_of
from arm_ray.study.render import check_renders, render
from arm_ray.study.results import Outcome, read_results, result_rows, write_results

PROBLEMS = 20


def content(tmp_path: Path, **others: Any) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "out"),
        "base": "/models/base",
        "series": {"run": {"checkpoints": {10: "/x{seed}/10", 20: "/x{seed}/20"}}},
        "merge": {"method": {"operator": "task_arithmetic"}},
        "axes": {
            "seed": [0, 1],
            "candidates": [[10, 20]],
            "scale": {"0.5": {"method.coefficient": 0.5}, "1": {"method.coefficient": 1.0}},
        },
        "evaluation": {
            "tasks": [
                {"name": "held", "type": "loss", "path": "h.jsonl"},
                {"name": "quiz", "type": "questions", "path": "q.jsonl"},
                {"name": "exam", "type": "questions", "path": "e.jsonl"},
            ],
            "resamples": 300,
        },
        **others,
    }


def record(problem: int, scores: dict[str, float], tokens: int) -> Record:
    return Record(f"p{problem}", 0, 0, "", 1, "", tokens, "stop", "", "", "", scores)


class Made:
    """A study whose models are scored by chance, the later ones better."""

    def __init__(self, tmp_path: Path, **others: Any) -> None:
        self.study = Study(validate(StudyConfig, content(tmp_path, **others), source="test"), "t")
        self.losses: dict[str, np.ndarray] = {}
        self.tokens = np.random.default_rng(0).integers(5, 30, PROBLEMS).astype(float)
        scores, models = {}, {}
        for number, name in enumerate([*self.study.models, *self.study.merges]):
            scores[name] = self._scored(name, number)
            models[name] = ModelRecord(name, "/t", "2026-01-01T00:00:00Z", {"arm_ray": "1"})
        cost = MergeCost(2.0, 1.5, 0.5, 3.0, 4, "converged", work={"sent_bytes": 7})
        cells = {
            name: CellRecord("scored", merge.digest, None, asdict(cost))
            for name, merge in self.study.merges.items()
        }
        self.outcome = Outcome(cells, scores, models, {})

    def _scored(self, name: str, number: int) -> dict[str, TaskScores]:
        generator = np.random.default_rng(number)
        found = {}
        self.losses[name] = (3.0 - 0.1 * number + generator.normal(0, 0.2, PROBLEMS)) * self.tokens
        for task, kind, metric in (
            ("held", "loss", "loss"), ("quiz", "math", "strict"), ("exam", "math", "strict"),
        ):  # fmt: skip
            verdicts = (generator.random(PROBLEMS) < 0.3 + 0.05 * number).astype(float)
            rows = [
                record(i, {metric: float(values[i])}, int(self.tokens[i]))
                for values in [self.losses[name] if kind == "loss" else verdicts]
                for i in range(PROBLEMS)
            ]
            summary = summarise(
                rows, self.study.config.evaluation, task=task, kind=kind, metrics=[metric],
                digest="d", seconds=1.0,
            )  # fmt: skip
            write_records(self.study.scores / name, rows, summary)
            found[task] = summary
        return found

    def written(self) -> list[dict[str, Any]]:
        write_results(self.study, result_rows(self.study, self.outcome))
        return read_results(self.study.output)

    def table(self, name: str = "t") -> list[list[str]]:
        """A table's cells, its head first."""
        render(self.study, self.written())
        lines = (self.study.output / f"tables/{name}.md").read_text().splitlines()
        rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
        return [[cell.strip() for cell in row] for row in rows if "---" not in row[0]]

    def model(self, seed: int, scale: str) -> str:
        [cell] = [
            c for c in self.study.cells if (c.labels["seed"], c.labels["scale"]) == (seed, scale)
        ]
        return self.study.merge_of(cell).name


def test_rows_have_axes_numbers_and_differences(tmp_path: Path) -> None:
    made = Made(tmp_path)
    rows = made.written()
    # One base, two checkpoints and two merges for each seed, three tasks.
    assert len(rows) == (1 + 4 + 4) * 3
    [row] = [
        r for r in rows if r["kind"] == "merged" and (r["seed"], r["scale"], r["task"])
        == (1, "0.5", "held")
    ]  # fmt: skip
    name = made.model(1, "0.5")
    assert (row["model"], row["series"], row["candidates"]) == (name, "run", "10+20")
    total = made.tokens.sum()
    assert row["mean"] == pytest.approx(made.losses[name].sum() / total)
    for column, model in (
        ("base", "base"),
        ("last_candidate", "run-seed1-20"),
        ("best_checkpoint", min(
            ("run-seed1-10", "run-seed1-20"), key=lambda m: made.losses[m].sum())),
    ):  # fmt: skip
        expected = compare(made.losses[name], made.losses[model], made.tokens, resamples=300)
        assert row[column] == model
        assert row[f"{column}_difference"] == pytest.approx(expected.difference)
        assert row[f"{column}_low"] == pytest.approx(expected.low)
        assert row[f"{column}_p"] == expected.p_value
    assert (row["seconds"], row["forward_seconds"], row["iterations"]) == (2.0, 1.5, 4)
    assert json.loads(row["work"]) == {"sent_bytes": 7}
    assert (row["n"], row["date"], row["arm_ray"]) == (PROBLEMS, "2026-01-01T00:00:00Z", "1")


def test_a_table_pools_over_seeds(tmp_path: Path) -> None:
    shown = {"rows": ["scale"], "columns": "task", "value": "difference", "against": "base"}
    made = Made(tmp_path, tables={"t": shown})
    head, *rows = made.table()
    assert head == ["scale", "held", "quiz", "exam", "average"]
    assert [row[0] for row in rows] == ["0.5", "1"]
    ours = np.array([made.losses[made.model(seed, "1")] for seed in (0, 1)])
    base = np.tile(made.losses["base"], (2, 1))
    expected = pooled_comparison(ours, base, np.tile(made.tokens, (2, 1)), resamples=300)
    text = f"{expected.difference:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]"
    assert rows[1][1].startswith(text)
    # The losses are in no average.
    parts = [float(cell.split()[0]) for cell in rows[1][2:4]]
    assert float(rows[1][4]) == pytest.approx(sum(parts) / 2, abs=0.06)


def test_a_table_of_means_has_other_models_above_and_marks_the_best(tmp_path: Path) -> None:
    shown = {
        "rows": ["series", "scale"], "columns": "seed", "task": "held",
        "show": ["base", "checkpoints"], "title": "Losses",
    }  # fmt: skip
    made = Made(tmp_path, tables={"t": shown})
    head, *rows = made.table()
    assert head == ["series", "scale", "0", "1"]
    assert [row[1] for row in rows] == ["base", "checkpoint 10", "checkpoint 20", "0.5", "1"]
    mean = made.losses["run-seed1-10"].sum() / made.tokens.sum()
    assert rows[1][3].startswith(f"{mean:.4f} ± ")
    for column in (2, 3):
        best = min(rows, key=lambda row: float(row[column].strip("*").split()[0]))
        assert [row for row in rows if row[column].startswith("**")] == [best]
    text = (made.study.output / "tables/t.md").read_text()
    assert text.startswith("# Losses\n")
    assert "Held loss (nats per token)." in text


def test_a_cell_may_be_compared_with_another(tmp_path: Path) -> None:
    shown = {"rows": ["scale"], "columns": "seed", "task": "held", "value": "difference",
             "against": {"scale": "0.5"}, "where": {"scale": 1}}  # fmt: skip
    made = Made(tmp_path, tables={"t": shown})
    _, [label, first, second] = made.table()
    assert label == "1"
    for seed, cell in enumerate((first, second)):
        ours, theirs = (made.losses[made.model(seed, scale)] for scale in ("1", "0.5"))
        difference = (ours - theirs).sum() / made.tokens.sum()
        assert cell.startswith(f"{difference:+.4f} [")


def test_a_table_of_costs_and_what_failed(tmp_path: Path) -> None:
    shown = {"rows": ["scale"], "columns": "seed", "value": "seconds"}
    made = Made(tmp_path, tables={"t": shown})
    failed = made.model(0, "1")
    cells = {**made.outcome.cells, failed: CellRecord("failed", "d", "too bad")}
    made.outcome = Outcome(cells, made.outcome.scores, made.outcome.models, {"run-seed0-10": "no"})
    assert made.table()[1:] == [["0.5", "2", "2"], ["1", "-", "2"]]
    rows = made.written()
    assert [r["error"] for r in rows if r["state"] == "failed"] == ["no", "too bad"]
    assert "1 cells failed and are left out" in (made.study.output / "tables/t.md").read_text()


@pytest.mark.parametrize("kind", ["line", "bars"])
@pytest.mark.parametrize("format_", ["svg", "png"])
def test_the_same_results_give_the_same_files(tmp_path: Path, kind: str, format_: str) -> None:
    figure = {"kind": kind, "x": "scale", "lines": "seed", "task": "quiz", "show": ["base"]}
    made = Made(tmp_path, figures={"f": figure}, tables={"t": {"rows": ["scale"]}},
                figure_format=format_)  # fmt: skip
    results = made.written()
    files = {path: path.read_bytes() for path in render(made.study, results)}
    assert [path.name for path in files] == ["t.md", f"f.{format_}"]
    assert all(len(given) > 100 for given in files.values())
    assert {path: path.read_bytes() for path in render(made.study, results)} == files


def test_figures_without_matplotlib_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    given = content(tmp_path, figures={"f": {"x": "scale", "task": "held"}})
    with pytest.raises(ConfigError, match=r"pip install 'arm-ray\[study\]'"):
        check_renders(validate(StudyConfig, given, source="test"))


def test_there_is_nothing_to_render_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no results yet"):
        read_results(tmp_path)


def test_what_a_merge_took_is_read_of_its_events() -> None:
    step = {"event": "step_chosen", "iteration": 1, "coefficients": [0.5, 1.0], "samples": 8}
    iteration = {"event": "iteration_finished", "iteration": 1, "seconds": 2.0, "sent_bytes": 3,
                 "forward_seconds": 1.0, "merge_seconds": 0.5, "busy_seconds": [1.0],
                 "weight_cosine": 0.9}  # fmt: skip
    events = [
        {"event": "run_started", "device": "cpu", "compute_dtype": "float32"},
        {**iteration, "seconds": 50.0},
        step,
        # Done again after a kill.
        iteration,
        {**iteration, "iteration": 2},
        {"event": "run_finished", "reason": "converged", "seconds": 9.0},
    ]
    found = cost_of(events)
    assert (found.seconds, found.forward_seconds, found.merge_seconds) == (4.0, 2.0, 1.0)
    assert (found.wall_seconds, found.iterations, found.ended) == (9.0, 2, "converged")
    assert found.work == {"sent_bytes": 6, "step_chosen_samples": 8}
    assert found.step_coefficients == [[0.5, 1.0]]


DRY = """
output: {root}/out
series:
  large: {{base: examples/plans/smollm2-135m, checkpoints: {{10: /no/10, 20: /no/20}}}}
  further:
    train: {{learning_rate: 1e-3, steps: 4, save_steps: 2, data: {{path: /no/rows.jsonl}}}}
    start_from: {{series: large, operator: arm, calibration_seed: 0}}
merge: {{calibration: {{path: /no/c.jsonl}}}}
axes:
  candidates: {{large: [[10, 20]], further: [[2, 4]]}}
  calibration_seed: [0, 1]
  operator: {{ta: {{preset: paper/task-arithmetic}}, arm: {{preset: paper/arm}}}}
evaluation: {{tasks: [gsm8k]}}
"""


def test_a_dry_run_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(DRY.format(root=tmp_path))
    assert cli.main(["study", str(path), "--dry-run", "--gpus", "2", "parallel=2"]) == 0
    text = capsys.readouterr().out
    assert "8 cells of 2 series x 2 calibration_seed x 2 candidates x 2 operator" in text
    assert "1 trainings: further to step 4" in text
    assert "6 different merges, 2 at once" in text
    assert "11 models scored on gsm8k: 6 merged, 5 others" in text
    assert "s on 2 shard(s) of h100-80gb" in text
    assert "no weights at smollm2-135m; taken to be stored in bfloat16" in text
    assert not (tmp_path / "out").exists()
    assert cli.main(["study", str(path), "--dry-run", "series.large.base=/no/base"]) == 1
    assert "cannot be planned: base: there is no such directory" in capsys.readouterr().out


def test_a_wrong_study_is_told_by_the_command(tmp_path: Path, capsys) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(DRY.format(root=tmp_path) + "table: 1")
    assert cli.main(["study", str(path), "--dry-run"]) == 1
    assert "did you mean 'tables'?" in capsys.readouterr().err

"""The table of metrics: events in, numbers out; docs and dashboard say what it says."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest

from arm_ray.events import Event, IterationFinished, ModelScored, RunFinished, Warned
from arm_ray.following.events import (
    ArrivalFailed,
    ArrivalPublished,
    CheckpointsSkipped,
    CheckpointTaken,
)
from arm_ray.report.scalars import BY_NAME, METRICS, Marks, Point, Record, last_points, points
from scripts import dashboard as dashboards
from tests.builders.paths import ROOT

ITERATION = IterationFinished(
    iteration=3,
    regime="window",
    reference="state-0002",
    contributors=("state-0001", "state-0002"),
    weight_cosine=0.99,
    task_vector_cosine=None,
    rotated=210,
    rank_deficient=("a", "b"),
    seconds=10.0,
    forward_seconds=12.0,
    merge_seconds=3.0,
    bytes_written=1000,
    busy_seconds=(9.0, 6.0),
    sent_bytes=500,
    network_bytes=200,
    fetched_bytes=0,
)
SCORED = ModelScored(
    "state-0003", "/x", {"gsm8k": {"accuracy": 0.5, "pass@1": None}}, 20.0, 2.0, (1,), 40, 8000
)
PUBLISHED = ArrivalPublished(120, ("a",), "/p", True, 0.5, 0.4, 30.0, 45.0, 0.9, 0.8)


def record(event: Event, time: float = 1.0) -> dict[str, Any]:
    """As it is read back from a file."""
    content = {"time": time, "event": event.name, **dataclasses.asdict(event)}
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read


def values(given: Record) -> dict[str, tuple[float, int]]:
    """Name and labels -> value and step."""
    return {"/".join((p.metric.name, *p.labels)): (p.value, p.step) for p in points(given)}


def test_an_iteration() -> None:
    assert values(record(ITERATION)) == {
        "iteration": (3, 3),
        "iterations_total": (1, 3),
        "iteration_seconds": (10.0, 3),
        "forward_seconds": (12.0, 3),
        "merge_seconds": (3.0, 3),
        "weight_cosine": (0.99, 3),
        "written_bytes_total": (1000, 3),
        "sent_bytes_total": (500, 3),
        "network_bytes_total": (200, 3),
        "fetched_bytes_total": (0, 3),
        "rank_deficient_tensors": (2, 3),
        "stage_utilisation_ratio/0": (0.9, 3),
        "stage_utilisation_ratio/1": (0.6, 3),
    }


def test_an_iteration_that_an_older_version_wrote_down() -> None:
    old = record(ITERATION)
    for name in ("busy_seconds", "sent_bytes", "network_bytes", "fetched_bytes"):
        del old[name]
    found = values(old)
    assert found["iteration_seconds"] == (10.0, 3)
    assert not any(name.startswith(("stage", "sent", "network", "fetched")) for name in found)


def test_a_linear_merge_has_no_stages() -> None:
    linear = dataclasses.replace(ITERATION, forward_seconds=0.0)
    assert not any(name.startswith("stage") for name in values(record(linear)))


def test_a_scored_state_and_its_throughput() -> None:
    assert values(record(SCORED)) == {
        "score/state/gsm8k/accuracy": (0.5, 3),
        "evaluation_seconds/state": (20.0, 3),
        "evaluation_reload_seconds/state": (2.0, 3),
        "evaluation_samples_per_second/state": (2.0, 3),
        "evaluation_tokens_per_second/state": (400.0, 3),
        "evaluation_samples_total": (40, 3),
        "evaluation_tokens_total": (8000, 3),
    }


def test_what_was_known_from_before_has_no_throughput() -> None:
    known = dataclasses.replace(SCORED, reload_seconds=None, canary=(), samples=0, tokens=0)
    assert set(values(record(known))) == {"score/state/gsm8k/accuracy"}


@pytest.mark.parametrize(
    ("model", "label", "step"),
    [
        ("base", "base", 0),
        ("candidate-1", "candidate-1", 0),
        ("state-0012", "state", 12),
        ("checkpoint-0003-step-000120", "checkpoint", 120),
        ("merged-0003-step-000120", "merged", 120),
        ("state-of-the-art", "state-of-the-art", 0),
    ],
)
def test_there_are_few_labels_however_many_models(model: str, label: str, step: int) -> None:
    [point, *_] = points(record(dataclasses.replace(SCORED, model=model)))
    assert (point.labels[0], point.step) == (label, step)


def test_what_attach_writes_down() -> None:
    assert values(record(CheckpointTaken(120, "/c", True, 7))) == {
        "checkpoint_step": (120, 120),
        "checkpoints_taken_total": (1, 120),
    }
    assert values(record(CheckpointsSkipped((80, 100), 120))) == {
        "checkpoints_skipped_total": (2, 120)
    }
    assert values(record(ArrivalFailed(120, "why"))) == {"arrivals_failed_total": (1, 120)}
    assert values(record(PUBLISHED)) == {
        "arrivals_published_total": (1, 120),
        "published_step": (120, 120),
        "best_step": (120, 120),
        "publication_seconds": (30.0, 120),
        "publication_lag_seconds": (45.0, 120),
        "published_value": (0.5, 120),
        "checkpoint_value": (0.4, 120),
        "weight_cosine": (0.9, 120),
        "task_vector_cosine": (0.8, 120),
    }


def test_the_end_a_warning_and_a_training_step() -> None:
    finished = RunFinished("max_iterations", 3, 60.0, (100, 200))
    assert values(record(finished)) == {
        "shard_peak_bytes/0": (100, 3),
        "shard_peak_bytes/1": (200, 3),
    }
    assert values(record(Warned("x"))) == {"warnings_total": (1, 0)}
    entry = {"step": 7, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": None, "reward": 0.25}
    assert values({"event": "training_step", **entry}) == {
        "training_step": (7, 7),
        "training_loss": (0.5, 7),
        "training_learning_rate": (1e-4, 7),
        "training_reward": (0.25, 7),
    }


def test_what_is_no_number_is_left_out() -> None:
    assert points({"event": "run_started", "first_iteration": 1}) == []
    nan = {**record(ITERATION), "weight_cosine": float("nan")}
    assert "weight_cosine" not in values(nan)


def test_a_run_that_was_taken_back_has_no_point_twice() -> None:
    def iteration(number: int, seconds: float, at: float) -> dict[str, Any]:
        return record(dataclasses.replace(ITERATION, iteration=number, seconds=seconds), at)

    history = [
        {"event": "run_started", "first_iteration": 1},
        *(iteration(t, 1.0 * t, t) for t in (1, 2, 3, 4)),
        {"event": "run_started", "first_iteration": 3},
        iteration(3, 30.0, 13),
    ]
    found = [(at, p.step, p.value) for at, p in last_points(history)
             if p.metric.name == "iteration_seconds"]  # fmt: skip
    assert found == [(1, 1, 1.0), (2, 2, 2.0), (13, 3, 30.0)]


def test_curves_go_on_where_they_ended() -> None:
    marks, curve = Marks(), BY_NAME["weight_cosine"]
    given = [Point(curve, 0.5, step) for step in (1, 2, 2, 1)]
    assert [point.step for point in marks.new(given)] == [1, 2]
    again = Marks(json.loads(json.dumps(marks.steps)))
    assert again.new(given) == []
    assert [point.step for point in again.new([Point(curve, 0.5, 3)])] == [3]


def test_names_are_as_prometheus_wants_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    tags = [metric.tag for metric in METRICS if metric.tag]
    assert len(set(tags)) == len(tags)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        # Names that are taken: Prometheus's own, and Ray's.
        taken = {"run", "job", "instance", "le", "Component", "WorkerId", "SessionName", "Version"}
        assert not taken & set(metric.labels)
        unit = {"s": "_seconds", "bytes": "_bytes"}.get(metric.unit)
        assert unit is None or metric.name.removesuffix("_total").endswith(unit), metric.name
        if metric.tag:
            assert set(re.findall(r"{(\w+)}", metric.tag)) == set(metric.labels), metric.tag


def test_tags_hold_nothing_that_a_tracker_refuses() -> None:
    point = Point(BY_NAME["score"], 0.5, 1, ("my model", "humaneval", "pass@1"))
    assert point.tag == "scores/humaneval/pass_1/my model"


def problems(board: dict[str, Any]) -> list[str]:
    """What is wrong with a dashboard: unknown metrics or labels, and metrics without a panel."""
    by_name = {metric.prometheus_name: metric for metric in METRICS}
    found, shown = [], set()
    targets = [t for panel in board["panels"] for t in panel.get("targets", [])]
    for target in targets:
        expr = target["expr"]
        names = re.findall(r"\b(ray_\w+)", expr)
        shown |= set(names)
        if len(names) != 1 or names[0] not in by_name:
            found.append(f"metrics {names} of {expr}")
            continue
        known = {"run", *by_name[names[0]].labels}
        by = re.findall(r"by \(([^)]*)\)", expr)
        used = {label.strip() for group in by for label in group.split(",")}
        used |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr))
        used |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        if used != known:
            found.append(f"labels {sorted(used ^ known)} of {expr}")
        if target["datasource"]["uid"] != "${datasource}" or '=~"$run"' not in expr:
            found.append(f"variables of {expr}")
    found += [f"no panel for {name}" for name in by_name if name not in shown]
    return found


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "cluster/grafana/arm_ray.json").read_text())
    return read


def test_the_dashboard_shows_every_metric_and_no_other(board: dict[str, Any]) -> None:
    assert problems(board) == []
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "run"}
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("ray_arm_ray_weight_cosine", "ray_arm_ray_weights_cosine", "metrics"),
        ("ray_arm_ray_weight_cosine", "arm_ray_weight_cosine", "metrics"),
        ("by (run, shard) (ray_arm_ray_stage", "by (run, stage) (ray_arm_ray_stage", "labels"),
        ('score{run=~\\"$run\\"}', 'score{name=~\\"$run\\"}', "labels"),
        ('score{run=~\\"$run\\"}', 'score{run=~\\"a\\"}', "variables"),
    ],
)
def test_a_broken_dashboard_is_found(
    board: dict[str, Any], old: str, new: str, problem: str
) -> None:
    text = json.dumps(copy.deepcopy(board))
    assert old in text
    found = problems(json.loads(text.replace(old, new)))
    assert any(line.startswith(problem) for line in found), found


def test_dashboard_and_docs_are_made_of_the_table(board: dict[str, Any]) -> None:
    assert board == dashboards.dashboard(), "python -m scripts.dashboard"
    docs = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert dashboards.table() in docs, "python -m scripts.dashboard table"

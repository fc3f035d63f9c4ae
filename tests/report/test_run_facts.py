"""What is taken from the events of a run: the right numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arm_ray.report.run_facts import (
    SELECTION,
    Work,
    chosen_of,
    iterations_of,
    main_session,
    main_task,
    scores_of,
    stages_of,
    work_of,
)
from arm_ray.report.run_record import open_record
from tests.builders.runs import RIGHT, events_of, keep_events, merge_run


def test_scores_have_means_and_intervals_of_the_records(tmp_path: Path) -> None:
    scores = scores_of(open_record(merge_run(tmp_path)))
    assert [(s.model, s.title, s.role) for s in scores] == [
        ("base", "base", "base"),
        ("candidate-1", "checkpoint-10", "checkpoint"),
        ("candidate-2", "checkpoint-20", "checkpoint"),
        ("state-0001", "state-0001", "merged"),
        ("state-0002", "state-0002", "merged"),
    ]
    for score in scores:
        assert score.mean == sum(RIGHT[score.model]) / 8
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.mean <= score.high
        assert (score.task, score.metric, score.count) == ("quiz", "score", 8)


def test_without_records_the_events_have_the_means(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    shutil.rmtree(run / "evaluation")
    scores = scores_of(open_record(run))
    assert [(s.model, s.mean, s.low) for s in scores] == [
        (model, sum(right) / 8, None) for model, right in RIGHT.items()
    ]


def test_the_loss_that_chose_the_model_counts_as_a_score(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    selected = {
        "event": "model_selected",
        "model": "candidate-2",
        "verdict": "no state is better",
        "compared": [
            {"state": "state-0002", "loss": 0.5, "low": 0.4, "high": 0.6},
            {"state": "candidate-2", "loss": 0.45, "low": 0.4, "high": 0.5},
        ],
        "final": [],
        "samples": 48,
        "final_samples": 0,
    }
    keep_events(run, lambda e: selected if e["event"] == "model_written" else e)
    record = open_record(run)
    scores = scores_of(record)
    losses = [(s.title, s.mean, s.low, s.high, s.count) for s in scores if s.task == SELECTION]
    assert losses == [
        ("checkpoint-20", 0.45, 0.4, 0.5, 48),
        ("state-0002", 0.5, 0.4, 0.6, 48),
    ]
    assert chosen_of(record, scores) == "candidate-2"
    assert main_task(scores) == "quiz"


def test_iterations_count_once_and_have_angles(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    keep_events(run, lambda e: {**e, "iteration": 1} if e.get("iteration") == 1 else e)
    again = next(e for e in events_of(run) if e["event"] == "iteration_finished")
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        # A run that was gone on with does an iteration again.
        file.write(json.dumps({**again, "weight_cosine": 0.0}) + "\n")
    first, second = iterations_of(open_record(run))
    assert first.angle("weight_cosine") == pytest.approx(90.0)
    assert first.angle("task_vector_cosine") is None
    assert second.angle("weight_cosine") == 0.0
    assert second.angle("task_vector_cosine") == pytest.approx(90.0)
    assert len(first.modules) == 5
    assert first.modules[1]["angle"] == 10.0


def test_who_worked_when(tmp_path: Path) -> None:
    record = open_record(merge_run(tmp_path))
    work = work_of(record)
    shards = [w for w in work if w.actor.startswith("shard")]
    [first, *_] = next(record.of("iteration_finished"))["spans"][0]
    assert shards[0] == Work("shard 1", "forward", first[1], 1.0, "iteration 1")
    assert sum(w.seconds for w in shards) == 2 * 5.0
    scored = [w for w in work if w.kind == "score"]
    assert [w.what for w in scored] == [f"scored {model}" for model in RIGHT]
    assert all(w.seconds == 2.0 for w in scored)


def test_of_an_older_version_iterations_stand_for_the_shards(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    keep_events(run, lambda e: {k: v for k, v in e.items() if k not in ("spans", "modules")})
    record = open_record(run)
    merging = [w for w in work_of(record) if w.kind == "merge"]
    assert [(w.actor, w.what, w.seconds) for w in merging] == [
        ("shards", "iteration 1", 4.0),
        ("shards", "iteration 2", 4.0),
    ]
    assert [t.modules for t in iterations_of(record)] == [[], []]


def test_the_session_in_which_most_was_done_is_shown() -> None:
    early, first = Work("a", "merge", 0.0, 15.0, ""), Work("a", "merge", 5000.0, 10.0, "")
    second = Work("a", "merge", 5020.0, 10.0, "")
    assert main_session([second, early, first]) == [first, second]
    assert main_session([first, early]) == [early]
    assert main_session([]) == []


def test_a_stage_that_is_done_already_counts_as_it_did_at_first(tmp_path: Path) -> None:
    rows = [("training", 100.0), ("ARM", 5.0), ("training", 0.5), ("ARM", 7.0)]
    lines = [
        json.dumps({"event": "stage_finished", "stage": stage, "seconds": seconds}) + "\n"
        for stage, seconds in rows
    ]
    (tmp_path / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    assert stages_of(open_record(tmp_path)) == {"training": 100.0, "ARM": 7.0}

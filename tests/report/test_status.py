"""How a run stands, told from its directory."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arm_ray import cli
from arm_ray.errors import RunDirectoryError
from arm_ray.report.status import lines_of, status_of, worker_of
from tests.builders.paths import ROOT
from tests.builders.runs import events_of, keep_events, merge_run


def cut_after(run: Path, name: str, number: int = 1) -> float:
    """Keep a run's events up to the so-manieth of a name; returns when that one was."""
    events, seen, kept = events_of(run), 0, []
    for event in events:
        kept.append(event)
        seen += event["event"] == name
        if seen == number:
            break
    text = "".join(json.dumps(event) + "\n" for event in kept)
    (run / "events.jsonl").write_text(text, encoding="utf-8")
    return float(kept[-1]["time"])


def test_a_finished_run(tmp_path: Path) -> None:
    status = status_of(merge_run(tmp_path))
    assert (status.state, status.told, status.stage) == (
        "finished",
        "finished",
        "ended: max iterations",
    )
    assert (status.iteration, status.iterations, status.eta_s) == (2, 2, None)
    assert status.busy == [0.75, 0.5]
    assert [(s.title, s.mean) for s in status.scores][:2] == [
        ("base", 0.125),
        ("checkpoint-10", 0.375),
    ]
    assert status.warnings[0].startswith("a warning with")
    assert status.missing == []
    assert "  shards busy 75 %, 50 %" in list(lines_of(status))
    assert "              checkpoint-10: quiz score 37.5 % (12.5 to 62.5)" in list(lines_of(status))


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    when = cut_after(run, "iteration_finished")
    status = status_of(run, now=when + 7200.0)
    assert status.state == "stopped"
    assert "it was killed or interrupted, or runs on another machine" in status.told
    assert "its last event is 2 h 00 min old" in status.told
    assert status.stage == "after iteration 1"
    assert (status.age_s, status.eta_s, status.pid) == (7200.0, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/locks is Linux's")
def test_a_run_that_runs_is_known_by_its_lock(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    when = cut_after(run, "iteration_finished")
    assert worker_of(run) is None
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        import os

        status = status_of(run, now=when + 1.0)
        assert (status.state, status.pid) == ("running", os.getpid())
        assert status.told.startswith(f"running: process {os.getpid()} of this machine")
        # One iteration of 4 s is left, and 1 s of it is over.
        assert status.eta_s == 3.0
    assert status_of(run).state == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/locks is Linux's")
def test_before_the_first_iteration_the_plan_says_how_long(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    when = cut_after(run, "run_planned")
    started = next(e["time"] for e in events_of(run) if e["event"] == "run_started")
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status = status_of(run, now=started + 2.0)
    assert status.eta_s == pytest.approx(3.0, abs=0.11)
    assert status.stage == "placing the layer shards"
    assert (status.iteration, status.iterations) == (None, 2)
    assert when >= started


def test_a_run_that_failed_says_with_what(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    failed = {"event": "run_failed", "error": "ShardLostError", "message": "a shard was lost"}
    keep_events(run, lambda e: failed if e["event"] == "run_finished" else e)
    status = status_of(run)
    assert (status.state, status.told) == ("failed", "failed: a shard was lost")


def test_a_run_that_was_halted_is_not_finished(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    keep_events(run, lambda e: {**e, "reason": "stop_after"} if e["event"] == "run_finished" else e)
    assert status_of(run).state == "halted"


def test_foreign_and_missing_directories(tmp_path: Path) -> None:
    assert status_of(tmp_path).state == "foreign"
    assert list(lines_of(status_of(tmp_path)))[1] == "  this directory holds no run of arm_ray"
    with pytest.raises(RunDirectoryError, match="there is no such run"):
        status_of(tmp_path / "nothing")


def test_an_evaluation_is_finished_once_all_its_models_are_scored(tmp_path: Path) -> None:
    text = "models: {a: /m/a, b: /m/b}\noutput: out\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    event: dict[str, Any] = {"time": 1.0, "event": "model_scored", "scores": {}}
    lines = [json.dumps({**event, "model": name}) + "\n" for name in ("a", "b")]
    (tmp_path / "events.jsonl").write_text(lines[0], encoding="utf-8")
    assert status_of(tmp_path).state == "stopped"
    (tmp_path / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    assert status_of(tmp_path).state == "finished"


def test_a_pipeline_tells_of_its_parts(tmp_path: Path) -> None:
    merge_run(tmp_path / "merges", "arm")
    event = {"time": 1.0, "event": "stage_finished", "stage": "arm", "seconds": 2.0}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    status = status_of(tmp_path)
    assert (status.state, status.stage) == ("stopped", "after arm")
    assert [part.state for part in status.parts] == ["finished"]
    done = {**event, "stage": "scores"}
    (tmp_path / "events.jsonl").write_text(json.dumps(done) + "\n", encoding="utf-8")
    assert status_of(tmp_path).state == "finished"


def test_the_command_prints_it_for_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = merge_run(tmp_path)
    assert cli.main(["status", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  finished"
    assert cli.main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["iteration"], told["busy"]) == ("finished", 2, [0.75, 0.5])
    assert told["scores"][0]["model"] == "base"
    assert cli.main(["status", str(tmp_path / "nothing")]) == 1
    assert cli.main(["status"]) == 1
    assert cli.main(["status", str(run), "--address", "x"]) == 1
    assert "expected: RUN_DIR or --address" in " ".join(capsys.readouterr().err.split())


def test_watching_says_it_again_until_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rounds = merge_run(tmp_path), []

    def next_round(_seconds: float) -> None:
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", next_round)
    assert cli.main(["status", str(run), "--watch", "--json"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["finished"] * 3


def test_it_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom arm_ray.cli import main\nmain(['status', sys.argv[1]])\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "arm_ray" in loaded
    assert not loaded & {"torch", "transformers", "ray", "numpy", "pyarrow", "vl_convert"}


def test_ten_thousand_events_are_read_line_by_line(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    shutil.rmtree(run / "evaluation")
    again = [e for e in events_of(run) if e["event"] == "iteration_finished"][-1]
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        for number in range(3, 10_003):
            file.write(json.dumps({**again, "iteration": number}) + "\n")
    assert status_of(run).iteration == 10_002

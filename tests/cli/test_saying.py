"""How much a command says, and to whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from arm_ray import noise
from arm_ray.cli import main
from arm_ray.errors import CheckpointError
from arm_ray.events import EventLog, Warned, listened
from tests.builders.merge_case import MergeCase
from tests.builders.paths import ROOT


@pytest.fixture
def file(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a merge that needs no Ray and no data."""
    monkeypatch.setattr("arm_ray.runtime.merge.run.is_up_or_named", lambda _address: False)
    case.make()
    content = {
        "base": str(case.root / "base"),
        "candidates": [str(path) for path in case.candidates],
        "output": str(case.root / "run"),
        "method": {"operator": "task_arithmetic"},
        "schedule": {"max_iterations": 1},
    }
    path = case.root / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_quiet_says_where_the_model_is(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(file), "--quiet"]) == 0
    assert capfd.readouterr() == (f"{file.parent / 'run' / 'model'}\n", "")


def test_quiet_says_errors(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(file), "base=/nowhere", "--quiet"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: base: a checkpoint directory does not exist")


def test_json_is_the_event_log(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(file), "--json"]) == 0
    out, err = capfd.readouterr()
    assert out == (file.parent / "run" / "events.jsonl").read_text()
    assert {json.loads(line)["event"] for line in out.splitlines()} >= {
        "run_started", "iteration_finished", "model_written", "run_finished",
    }  # fmt: skip
    assert err == ""


def test_events_of_parts_say_where_they_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(*_: Any, **__: Any) -> None:
        own, part = (EventLog(tmp_path / name) for name in ("events.jsonl", "part.jsonl"))
        own.write(Warned("own"))
        part.path = tmp_path / "merges" / "events.jsonl"
        part.path.parent.mkdir()
        part.write(Warned("part"))
        print("not an event")

    monkeypatch.setattr("arm_ray.runtime.pipeline.run_pipeline", job)
    monkeypatch.setattr(
        "arm_ray.training.pipeline.load_pipeline_config", lambda *_: _Config(str(tmp_path))
    )
    assert main(["pipeline", "p.yaml", "--json"]) == 0
    out, err = capfd.readouterr()
    own, part = map(json.loads, out.splitlines())
    assert ("run" in own, own["message"]) == (False, "own")
    assert (part["run"], part["message"]) == (str(tmp_path / "merges"), "part")
    assert err == "not an event\n"


class _Config:
    def __init__(self, output: str) -> None:
        self.output = output


def test_nobody_listens_afterwards(tmp_path: Path) -> None:
    heard: list[str] = []
    log = EventLog(tmp_path / "events.jsonl")
    with listened(lambda path, record: heard.append(f"{path.name} {record['message']}")):
        log.write(Warned("one"))
    log.write(Warned("two"))
    assert heard == ["events.jsonl one"]


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_traceback_of_our_own_errors_is_asked_for(
    is_asked: bool, file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("it is broken")

    monkeypatch.setattr("arm_ray.runtime.merge.run.merge", fail)
    assert main(["merge", str(file), *(["--debug"] if is_asked else [])]) == 1
    told = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in told) == is_asked
    assert told.endswith("error: it is broken\n")


@pytest.mark.parametrize("arguments", [["config", "--markdown"], ["--help"], ["--version"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "arm_ray.cli", *arguments],
            cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.stderr == ""
    # What argparse prints by itself, it lets go of without a word.
    assert done.returncode in ({141} if arguments[0] == "config" else {0, 141})


def test_another_broken_pipe_is_not_hidden(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("a socket's")

    monkeypatch.setattr("arm_ray.runtime.merge.run.merge", fail)
    with pytest.raises(BrokenPipeError, match="socket"):
        main(["merge", str(file)])


NOISE = """
import logging, os, sys
import arm_ray.cli.entry as entry
from arm_ray.errors import ArmRayError
def job(*_): raise ArmRayError("ended")
import arm_ray.config
arm_ray.config.load_merge_config = job
sys.argv[1:] = ["merge", "c.yaml", *sys.argv[1:]]
entry.main()
from transformers.utils import logging as told
logger = logging.getLogger("DeepSpeed")
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("Setting accelerator to CPU")
logger.error("out of memory")
told.get_logger("transformers.x").error("weights are missing")
told.get_logger("transformers.x").warning("`torch_dtype` is deprecated")
print(told.is_progress_bar_enabled(), os.environ.get("VLLM_LOGGING_LEVEL"))
"""


@pytest.mark.parametrize("flags", [[], ["--verbose"]], ids=["usual", "verbose"])
def test_what_libraries_say(flags: list[str]) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in noise.quiet_environment() and name != noise.VERBOSE
    }
    done = subprocess.run(
        [sys.executable, "-c", NOISE, *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "out of memory" in said
    assert "weights are missing" in said
    is_verbose = bool(flags)
    assert ("Setting accelerator" in said) == is_verbose
    assert ("torch_dtype" in said) == is_verbose
    assert done.stdout.splitlines()[-1] == ("True None" if is_verbose else "False ERROR")


def test_what_somebody_has_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_LOGGERS", ())
    for name in noise.quiet_environment():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    noise.silence()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_actors_are_told_that_they_may_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise.quiet_environment()["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert noise.verbose_environment() == {}
    monkeypatch.setenv(noise.VERBOSE, "1")
    assert noise.quiet_environment() == {}
    assert noise.verbose_environment() == {noise.VERBOSE: "1"}

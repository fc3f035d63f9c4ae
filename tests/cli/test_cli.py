"""The command line: exit codes, messages on standard error, and how soon they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import arm_ray
from arm_ray import cli
from arm_ray.cli.entry import parse
from arm_ray.cli.evaluating import evaluate_config
from arm_ray.config import EvaluateConfig, MergeConfig
from arm_ray.errors import CheckpointError
from arm_ray.runtime.merge.run import MergeOutcome
from tests.builders.paths import ROOT


@pytest.fixture(autouse=True)
def _keep_the_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = {
        "base": str(tmp_path / "base"),
        "candidates": [str(tmp_path / "one")],
        "output": str(tmp_path / "run"),
        "method": {"operator": "task_arithmetic"},
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MergeConfig, dict[str, Any]]]:
    """What the library was asked for, in place of doing it."""
    asked: list[tuple[MergeConfig, dict[str, Any]]] = []

    def merge(config: MergeConfig, **options: Any) -> MergeOutcome:
        asked.append((config, options))
        return MergeOutcome(Path(config.output), Path(config.output) / "model", 1, "no_gain")

    monkeypatch.setattr("arm_ray.runtime.merge.run.merge", merge)
    return asked


def failing(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    monkeypatch.setattr("arm_ray.runtime.merge.run.merge", lambda *_args, **_options: action())


def test_it_hands_over_the_configuration_and_options(config: Path, merges) -> None:
    overrides = ["schedule.max_iterations=4", "method.coefficient=1e-1"]
    options = ["--stop-after", "2", "--address", "ray://head:10001"]
    code = cli.main(["merge", str(config), *overrides, *options])
    assert code == 0
    [(given, passed)] = merges
    assert (given.schedule.max_iterations, given.method.coefficient) == (4, 0.1)
    assert passed == {"address": "ray://head:10001", "stop_after": 2, "console": None}


def test_without_options_there_are_none(config: Path, merges) -> None:
    assert cli.main(["merge", str(config)]) == 0
    assert merges[0][1] == {"address": None, "stop_after": None, "console": None}


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == arm_ray.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"]])
def test_help_names_what_can_be_given(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert ("merge" if len(arguments) == 1 else "section.key=value") in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["mege"], ["merge"], ["merge", "c.yaml", "--stop", "x"], ["merge", "c.yaml", "--what"]],
)
def test_a_wrong_command_line_is_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: arm-ray")


def test_a_missing_configuration_is_1(tmp_path: Path, capsys) -> None:
    assert cli.main(["merge", str(tmp_path / "missing.yaml")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: the configuration file cannot be read\n  where:")
    assert str(tmp_path / "missing.yaml") in captured.err


def test_a_wrong_override_is_1(config: Path, merges, capsys) -> None:
    assert cli.main(["merge", str(config), "schedule.max_iteration=3"]) == 1
    assert "did you mean 'max_iterations'?" in capsys.readouterr().err
    assert merges == []


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("evaluation: {tasks: [gsm8k]}", [], "models"),
        ("models: {a: b}\nevaluation:", [], "nothing to score the models on"),
        ("models: {a: b}\nevaluation: [gsm8k]", [], "does not hold keys and values"),
        ("models: {a: b}\nevaluation: {tasks: gsm8k}", ["--limit", "3"], "the tasks are no list"),
        ("models: {a: b}\nevaluation: {tasks: [3]}", ["--limit", "3"], "evaluation.tasks"),
        ("models: {a: b}\nevaluation: {tasks: [gsm8k], confidence: 95}", [], "less than 1"),
    ],
)
def test_what_cannot_be_evaluated_is_1(
    tmp_path: Path, text: str, arguments: list[str], words: str, capsys
) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(text)
    assert cli.main(["evaluate", str(path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def evaluation(*arguments: str) -> EvaluateConfig:
    return evaluate_config(parse(["evaluate", *arguments]))


def test_an_empty_section_is_filled_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("models: {a: b}\nevaluation:\n")
    config = evaluation(str(path), "--tasks", "gsm8k")
    assert config.evaluation.tasks == ("gsm8k",)
    assert config.output.startswith("runs/evaluate-")


def test_a_path_with_an_equals_sign_is_no_name() -> None:
    given = ["runs/lr=1e-5/checkpoint-100", "best=runs/lr=1e-5/checkpoint-200"]
    assert evaluation(*given, "--tasks", "gsm8k").models == {
        "checkpoint-100": "runs/lr=1e-5/checkpoint-100",
        "best": "runs/lr=1e-5/checkpoint-200",
    }


def test_an_error_of_the_merge_is_1_with_its_text(config: Path, monkeypatch, capsys) -> None:
    def action() -> None:
        raise CheckpointError("it is broken", where="here", hint="mend it")

    failing(monkeypatch, action)
    assert cli.main(["merge", str(config), "--quiet"]) == 1
    assert capsys.readouterr() == (
        "",
        "error: it is broken\n  where:    here\n  to do:    mend it\n",
    )


def test_a_missing_checkpoint_is_1_before_ray_starts(config: Path, capsys) -> None:
    assert cli.main(["merge", str(config)]) == 1
    error = capsys.readouterr().err
    assert "\nerror: base: a checkpoint directory does not exist\n" in error
    assert not (config.parent / "run").exists()


def test_an_interruption_is_130(config: Path, monkeypatch, capsys) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    failing(monkeypatch, action)
    assert cli.main(["merge", str(config)]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_being_told_to_end_is_an_interruption(config: Path, monkeypatch, capsys) -> None:
    left = []

    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            left.append("clean-up")

    failing(monkeypatch, action)
    assert cli.main(["merge", str(config)]) == 130
    assert left == ["clean-up"]


def test_a_bug_is_not_hidden(config: Path, monkeypatch) -> None:
    def action() -> None:
        raise ZeroDivisionError("ours")

    failing(monkeypatch, action)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["merge", str(config)])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_wrong_configuration_is_reported_without_importing_anything_heavy(
    config: Path,
) -> None:
    program = (
        "import sys\n"
        "from arm_ray.cli import main\n"
        f"code = main(['merge', {str(config)!r}, 'metod.operator=arm'])\n"
        "print(*sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    done = command("-c", program)
    assert (done.returncode, done.stdout.strip()) == (1, "")
    assert "metod: unknown key; did you mean 'method'?" in done.stderr


@pytest.mark.parametrize(
    "start",
    [("-m", "arm_ray.cli", "merge"), ("-m", "arm_ray.jobs.merge"), ("-m", "jobs.merge")],
    ids=["command", "job", "checkout"],
)
def test_as_a_program(start: tuple[str, ...], tmp_path: Path) -> None:
    done = command(*start, str(tmp_path / "missing.yaml"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the configuration file cannot be read")
    assert "Traceback" not in done.stderr


# What makes the difference between an answer at once and one after a second.
HEAVY = {"pydantic", "yaml", "rich", "numpy", "torch", "ray", "transformers", "vllm"}
LOADED = (
    "import sys\n"
    "from arm_ray.cli import main\n"
    "try:\n"
    "    code = main(sys.argv[1:])\n"
    "except SystemExit as error:\n"
    "    code = error.code\n"
    "print(code, *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
)


@pytest.mark.parametrize(
    ("arguments", "code", "allowed"),
    [
        (["--help"], 0, set()),
        (["--version"], 0, set()),
        (["merge", "--help"], 0, set()),
        (["merge"], 2, set()),
        (["merge", "/nowhere.yaml"], 1, {"pydantic", "yaml"}),
        (["merge", "WRONG"], 1, {"pydantic", "yaml"}),
    ],
)
def test_help_and_errors_load_nothing_heavy(
    tmp_path: Path, arguments: list[str], code: int, allowed: set[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("base: a\ncandidates: [b]\noutput: c\nschedule: {max_iteration: 3}\n")
    given = [str(wrong) if text == "WRONG" else text for text in arguments]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ended, *loaded = done.stderr.splitlines()[-1].split()
    assert int(ended) == code, done.stderr
    assert HEAVY & set(loaded) <= allowed

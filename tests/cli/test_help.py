"""Help, its examples, and completion in shells."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from arm_ray.cli import main
from arm_ray.cli.entry import parse
from arm_ray.cli.parser import make_parser


def commands() -> dict[str, argparse.ArgumentParser]:
    [found] = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


COMMANDS = commands()


def examples(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"^  (arm-ray .*)$", str(parser.epilog), re.MULTILINE)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_examples_of_the_help_can_be_parsed(name: str | None) -> None:
    parser = make_parser() if name is None else COMMANDS[name]
    given = examples(parser)
    assert 2 <= len(given) <= 3
    for line in given:
        _, *arguments = shlex.split(line.split(" > ")[0])
        options = parse(arguments)
        assert callable(options.run)
        assert name in (None, arguments[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert str(COMMANDS[name].description).splitlines()[0] in text
    assert "--debug" in text
    assert max(map(len, str(COMMANDS[name].description).splitlines())) <= 100


@pytest.mark.parametrize("name", ["merge", "evaluate", "pipeline", "study", "attach"])
def test_jobs_say_as_much_as_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--quiet", "--json", "--verbose"):
        assert getattr(parse([name, "c.yaml", flag]), flag[2:]) is True
    with pytest.raises(SystemExit):
        parse([name, "c.yaml", "--quiet", "--json"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    assert "stop-after" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes(tmp_path) -> None:
    (tmp_path / "merge.yaml").write_text("")
    script = subprocess.run(
        [sys.executable, "-m", "arm_ray.cli", "completion", "bash"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    def completed(*words: str) -> list[str]:
        given = " ".join(map(shlex.quote, words))
        program = (
            f"{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
            "_shtab_arm_ray; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
        )
        done = subprocess.run(
            ["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert "merge" in completed("arm-ray", "me")
    assert "--stop-after" in completed("arm-ray", "merge", "--st")
    assert "merge.yaml" in completed("arm-ray", "merge", "mer")

"""The command `init`: six questions, or flags, and a configuration for the checkpoints at hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from arm_ray.cli.options import Commands, add_command, positive
from arm_ray.errors import ConfigError

if TYPE_CHECKING:
    from arm_ray.drafting.choices import Answers
    from arm_ray.drafting.findings import RunFindings

_EXAMPLES = (
    "arm-ray init /runs/sft",
    "arm-ray init /runs/sft --data heldout.jsonl --yes --output sft.yaml",
    "arm-ray init /models/base /runs/a/checkpoint-100 /runs/b/checkpoint-100 --method arm",
)


def add_to(commands: Commands) -> None:
    """Add the command."""
    init = add_command(
        commands, "init", _init, "write a configuration for checkpoints at hand", _EXAMPLES
    )
    init.add_argument(
        "paths",
        nargs="*",
        metavar="DIR",
        help="the directory of a run; or the base (unless --base names it) and then its "
        "checkpoints; default: this one",
    )
    init.add_argument("--output", metavar="FILE", default="merge.yaml", help="default: merge.yaml")
    init.add_argument("--force", action="store_true", help="write over a file that is there")
    init.add_argument(
        "--yes", action="store_true", help="ask nothing: take flags, and what is sensible"
    )
    init.add_argument("--base", metavar="MODEL", help="the model that the run began with")
    init.add_argument(
        "--last", type=positive, metavar="N", help="merge the last N complete checkpoints"
    )
    init.add_argument("--data", metavar="DATA", help="calibration rows: a file, or a data set's id")
    init.add_argument(
        "--no-data", action="store_true", help="no calibration rows, also where the run names some"
    )
    init.add_argument("--method", metavar="OPERATOR", help="arm, task_arithmetic, ties, …")
    init.add_argument("--run-dir", metavar="DIR", help="where the merge's results go")
    init.add_argument("--tasks", metavar="A,B", help="benchmarks to score on")


def _init(options: argparse.Namespace) -> int:
    """Write a commented configuration for the checkpoints of a run.

    Base, steps and data are taken from the run's directory, where its files say them. In a terminal
    it asks what is left open.
    """
    output = Path(options.output)
    if output.exists() and not options.force:
        raise ConfigError(
            "the file is there already",
            where=output,
            expected="the name of a new file",
            hint="--output names another one; --force writes over it",
        )
    if options.data and options.no_data:
        raise ConfigError(
            "calibration rows are named and refused", where="command line", got="--data, --no-data"
        )
    paths = [Path(path) for path in options.paths or ["."]]
    from arm_ray.drafting.findings import look_at_checkpoints, look_at_run

    if len(paths) == 1:
        found = look_at_run(paths[0])
    elif options.last is not None:
        raise ConfigError(
            "the checkpoints are named, and their number too",
            where="command line",
            got=f"{len(paths)} directories, --last {options.last}",
            expected="the directory of a run with --last, or the checkpoints alone",
        )
    elif options.base:
        found = look_at_checkpoints(paths)
    else:
        found = look_at_checkpoints(paths[1:])
        options.base = _base(options.paths[0])
    answers = _given(options)
    if not options.yes and sys.stdin.isatty() and sys.stdout.isatty():
        answers = _asked(found, answers)
    _write(found, answers, output)
    print(
        f"wrote {output}; arm-ray plan {output} says what it takes, arm-ray merge {output} runs it"
    )
    return 0


def _base(given: str) -> str:
    path = Path(given).expanduser()
    return str(path.absolute()) if path.exists() else given


def _given(options: argparse.Namespace) -> Answers:
    from arm_ray.drafting.choices import Answers

    return Answers(
        base=options.base,
        candidates=options.last,
        data="" if options.no_data else options.data,
        method=options.method,
        run_dir=options.run_dir,
        tasks=_names(options.tasks or ""),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _asked(found: RunFindings, given: Answers) -> Answers:
    """The answers to six questions, of which those that flags answer are not asked."""
    from dataclasses import replace

    from arm_ray.drafting.choices import Answers, choose, usual_count
    from arm_ray.drafting.findings import Told

    answers = given
    if answers.base is None:
        told = found.base.value if found.base else None
        answers = replace(answers, base=_ask("The model that the training began with", told))
    if answers.candidates is None and found.path is not None:
        steps = ", ".join(map(str, sorted(found.complete)))
        count = min(usual_count(found)[0], len(found.complete))
        text = _ask(f"How many of the last checkpoints (steps {steps})", str(count), _is_count)
        answers = replace(answers, candidates=int(text))
    if answers.data is None:
        told = found.data.value if found.data else "none"
        text = _ask("Calibration rows: a file, a data set's id, or none", told)
        answers = replace(answers, data="" if text == "none" else text)
    base = Told(answers.base or "", "you")
    usual = choose(replace(found, base=base), Answers(data=answers.data))
    if answers.method is None:
        answers = replace(answers, method=_ask("Operator", usual.method, _is_operator))
    if answers.run_dir is None:
        answers = replace(answers, run_dir=_ask("Where results go", usual.output))
    if not answers.tasks:
        text = _ask("Benchmarks to score on (gsm8k,math500), or none", "none")
        answers = replace(answers, tasks=() if text == "none" else _names(text))
    return answers


def _ask(
    question: str, default: str | None, problem: Callable[[str], str] = lambda _text: ""
) -> str:
    """Ask until there is an answer."""
    while True:
        try:
            text = input(f"{question} [{default}]: " if default else f"{question}: ").strip()
        except EOFError:
            raise KeyboardInterrupt from None
        text = text or default or ""
        wrong = problem(text) if text else "an answer is needed"
        if not wrong:
            return text
        print(f"  {wrong}")


def _is_count(text: str) -> str:
    return "" if text.isdigit() and int(text) > 0 else "a number of 1 or more is needed"


def _is_operator(text: str) -> str:
    from arm_ray.merging.settings import OPERATOR_NAMES

    # One of another package is known where the configuration is checked.
    known = text in OPERATOR_NAMES or "_" in text
    return "" if known else f"known are {', '.join(OPERATOR_NAMES)}"


def _write(found: RunFindings, answers: Answers, output: Path) -> None:
    import yaml

    from arm_ray.config import parse_merge_config
    from arm_ray.drafting.choices import choose
    from arm_ray.drafting.text import configuration
    from arm_ray.storage.atomic import atomic_file

    if answers.base is None and found.base is None:
        raise ConfigError(
            "nothing says which model the training began with",
            where=found.path or "command line",
            expected="base_model_name_or_path of an adapter, _name_or_path of config.json, or "
            "base_model of a README.md",
            hint="name it with --base",
        )
    text = configuration(choose(found, answers), str(output))
    # What is wrong with an answer is told before there is a file.
    parse_merge_config(yaml.safe_load(text), source="the answers")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file:
        file.write(text.encode())

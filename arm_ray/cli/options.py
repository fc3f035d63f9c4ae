"""What several commands have in common: their options, and how their help is laid out."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[argparse.Namespace], int]
Commands = Any  # argparse does not name the class


def add_command(
    commands: Commands, name: str, run: Run, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command.

    Args:
        commands: Where to add it.
        name: What it is called.
        run: What it does; its docstring is the description.
        text: What it does, in the list of commands.
        examples: Command lines, for the end of its help.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=inspect.cleandoc(run.__doc__ or ""),
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--debug", action="store_true", help="show where an error of ours was raised, too"
    )
    command.set_defaults(run=run)
    return command


def add_configured(
    commands: Commands, name: str, run: Run, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command of a configuration file and its overrides."""
    command = add_command(commands, name, run, text, examples)
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="take precedence over the file"
    )
    return command


def add_job(
    commands: Commands, name: str, run: Run, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command of a configuration file that works on Ray."""
    command = add_configured(commands, name, run, text, examples)
    add_running(command)
    return command


def add_running(command: argparse.ArgumentParser) -> None:
    """Where a job runs, and what it says meanwhile."""
    command.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, else local")
    said = command.add_mutually_exclusive_group()
    said.add_argument(
        "--quiet", action="store_true", help="say errors, and where the result is; no more"
    )
    said.add_argument(
        "--json", action="store_true", help="print events as JSON lines, and no progress"
    )
    said.add_argument(
        "--verbose", action="store_true", help="let Ray, vLLM and transformers speak as well"
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    """What is planned for, instead of this machine's CPUs."""
    command.add_argument("--gpus", type=positive, metavar="N", help="GPUs in all; default: enough")
    command.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one GPU; default: the device's"
    )
    command.add_argument("--nodes", type=positive, default=1, metavar="M", help="default: 1")
    command.add_argument(
        "--device",
        metavar="NAME",
        help="h100-80gb, a100-80gb, h200, cpu, or this-cpu (measured); "
        "default: h100-80gb with --gpus, else cpu",
    )
    command.add_argument(
        "--tokens-per-sample",
        type=positive,
        metavar="N",
        help="default: the mean of a mini-batch, or calibration.max_length without data at hand",
    )


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 or more")
    return value

"""The processes of a cluster by what they are."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from tests.builders.processes import Process, started_with

# Marks all processes of one bed, in their environment.
MARK = "ARM_RAY_CHAOS"


def processes_of(mark: str) -> list[Process]:
    """The live processes with this mark; what has ended has no command line any more."""
    return [process for process in started_with(f"{MARK}={mark}") if process.command]


def kill(process: Process) -> None:
    """SIGKILL; one that is gone already is none the worse for it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _titled(*names: str) -> Callable[[str], bool]:
    """Whether a worker of Ray's is an actor of these classes."""
    titles = tuple(f"ray::{name}" for name in names)
    return lambda command: command.startswith(titles)


def _is_raylet(command: str) -> bool:
    return "/raylet/raylet " in command and " --head" not in command


# What is told from its command line; `Bed` knows its driver and the cluster.
KINDS: dict[str, Callable[[str], bool]] = {
    "layer shard": _titled("LayerShard"),
    "evaluator": _titled("PlainEngineActor"),
    "grader": _titled("Grader"),
    "files of a node": _titled("NodeFiles", "ModelCopies"),
    "raylet": _is_raylet,
    "control store": lambda command: "/gcs/gcs_server " in command,
    "training worker": _titled("RayTrainWorker"),
}

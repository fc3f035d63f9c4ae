"""The processes of a cluster by what they are."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Marks all processes of one bed, in their environment.
MARK = "ARM_RAY_CHAOS"


@dataclass(frozen=True)
class Process:
    """A process of this machine.

    Attributes:
        pid: Its number.
        command: Its command line, which Ray's workers replace by what they do.
    """

    pid: int
    command: str

    def kill(self) -> None:
        """SIGKILL; one that is gone already is none the worse for it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def processes_of(mark: str) -> Iterator[Process]:
    """The live processes with this mark, but for this one."""
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if wanted not in (directory / "environ").read_bytes().split(b"\0"):
                continue
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        # A zombie has no command line.
        if command and int(directory.name) != os.getpid():
            yield Process(int(directory.name), command)


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

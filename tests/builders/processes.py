"""The processes of this machine, as Linux tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        pid: Its number.
        command: Its command line, which Ray's workers replace by what they do.
        environment: What it was started with, `NAME=value` each.
    """

    pid: int
    command: str
    environment: frozenset[bytes]


def processes() -> Iterator[Process]:
    """Those that can be read."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line, environ = [(directory / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        command = line.replace(b"\0", b" ").decode(errors="replace").strip()
        yield Process(int(directory.name), command, frozenset(environ.split(b"\0")))


def started_with(variable: str) -> list[Process]:
    """Those that were started with a variable in their environment: `NAME=value`."""
    return [process for process in processes() if variable.encode() in process.environment]

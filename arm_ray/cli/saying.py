"""What a job says: lines for people, events for machines, or nothing but its result."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Said:
    """Where a job's lines go.

    Attributes:
        console: Of the job; None: its own choice, standard error.
        is_quiet: Whether only the result is told.
    """

    console: Console | None
    is_quiet: bool

    def result(self, path: Path | str | None) -> None:
        """Tell where the result is, where nothing else does; None: there is none yet."""
        if self.is_quiet and path is not None:
            print(path)


@contextlib.contextmanager
def said(options: argparse.Namespace, console: Console | None = None) -> Iterator[Said]:
    """Have a job say what its command line asks for.

    Args:
        options: With `quiet` and `json`.
        console: Where lines go otherwise.
    """
    if not options.quiet and not options.json:
        yield Said(console, is_quiet=False)
        return
    from rich.console import Console

    nowhere = Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    with contextlib.closing(nowhere.file), contextlib.ExitStack() as stack:
        if options.json:
            stack.enter_context(_events_to(sys.stdout))
            # What anything else prints would be no JSON.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield Said(nowhere, is_quiet=options.quiet)


@contextlib.contextmanager
def _events_to(stream: Any) -> Iterator[None]:
    """Have the lines of all event logs of this process written to a stream, as they are there.

    A job may have parts with logs of their own: of those, `run` says in which directory.
    """
    from arm_ray.events import listened

    own: list[Path] = []
    lock = threading.Lock()

    def write(path: Path, record: Mapping[str, Any]) -> None:
        with lock:
            if not own:
                own.append(path)
            part = {} if path == own[0] else {"run": str(path.parent)}
            print(json.dumps({**record, **part}), file=stream, flush=True)

    with listened(write):
        yield

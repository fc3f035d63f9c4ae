"""From a command line to an exit code; see the package."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from arm_ray.cli.parser import make_parser
from arm_ray.errors import ArmRayError
from arm_ray.model import imports
from arm_ray.noise import VERBOSE, silence
from arm_ray.secrets import hidden
from arm_ray.storage.disk import file_error
from arm_ray.storage.urls import plain_path

# 128 and the number of SIGPIPE, as shells report a program that it has ended.
_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None, *, is_own_process: bool | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: Without the program's name; None: those of this process.
        is_own_process: Whether this process is there for the command alone, so that its environment
            and how its libraries log may be set; None: where `arguments` is None.
    """
    is_own = arguments is None if is_own_process is None else is_own_process
    try:
        try:
            return _run(arguments, is_own)
        finally:
            if is_own:
                _end_unused_ray()
                # Python would look through all that was imported for garbage before it ends, which
                # takes a second after torch and transformers.
                gc.freeze()
            # Here, where a reader that has gone is not told by a traceback at the end.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout) and not _is_unread(sys.stderr):
            raise
        _discard_output()
        return _BROKEN_PIPE


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line asks for.

    Raises:
        SystemExit: It is wrong (2), or asks for help or the version (0).
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides before an option only; take those after it as well.
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown or not hasattr(options, "overrides"):
        parser.parse_args(arguments)
    options.overrides = [*getattr(options, "overrides", ()), *rest]
    return options


def _run(arguments: Sequence[str] | None, is_own_process: bool) -> int:
    options = parse(arguments)
    if is_own_process:
        imports.set_own_process()
        if getattr(options, "verbose", False):
            os.environ[VERBOSE] = "1"
        silence()
    # `ray job stop` and schedulers send SIGTERM: leave through the same clean-up as Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if "config" in options:
            options.config = plain_path(options.config)
        return int(options.run(options))
    except ArmRayError as error:
        return _told(error, options)
    except RuntimeError as error:
        # What Python before 3.13 says of a link that leads to itself.
        if not str(error).startswith("Symlink loop"):
            raise
        told = ArmRayError(
            "a path leads to itself",
            where=str(error).partition(" from ")[2],
            expected="a link to something else",
        )
        return _told(told, options)
    except OSError as error:
        # Of the machine, and no fault of ours: a disk, a name, a permission.
        if isinstance(error, BrokenPipeError):
            raise
        where = error.filename or "unknown: --debug shows where it was met"
        of_file = file_error(error, where)
        return _told(of_file or ArmRayError(f"{error.strerror or error}", where=where), options)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _told(error: ArmRayError, options: argparse.Namespace) -> int:
    """Say what went wrong, without secrets that a library has repeated; returns the exit code."""
    if options.debug:
        import traceback

        print(hidden(traceback.format_exc()), file=sys.stderr, end="")
    print(f"error: {hidden(str(error))}", file=sys.stderr)
    return 1


def _end_unused_ray() -> None:
    """After an error has been told: a Ray that was started early may not be up yet."""
    joining = sys.modules.get("arm_ray.runtime.cluster.joining")
    if joining is not None:
        joining.end_unused_ray()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _is_unread(stream: Any) -> bool:
    """Whether a stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(found & select.POLLERR for _, found in poll.poll(0))
    except (OSError, ValueError):
        return False


def _discard_output() -> None:
    """Have what is still to be written go nowhere, in place of failing once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if _is_unread(stream):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

"""A training as a job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arm_ray.errors import ArmRayError
from arm_ray.noise import silence
from arm_ray.secrets import hidden


def run_job(
    name: str, run: Callable[[Path, Sequence[str]], Any], arguments: Sequence[str] | None
) -> int:
    """Parse a job's command line, run it, and turn errors into exit codes.

    Args:
        name: The job's module.
        run: Called with the configuration's path and the overrides.
        arguments: The command line; None: this process's.

    Returns:
        0 success, 1 an error that the message explains, 2 a wrong command line, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        silence()
    if not given or given[0] in {"-h", "--help"}:
        print(f"usage: python -m {name} CONFIG.yaml [key=value ...]")
        return 0 if given else 2
    wrong = [text for text in given[1:] if text.startswith("-") or "=" not in text]
    if wrong:
        print(f"error: not understood: {wrong[0]!r}; expected key=value", file=sys.stderr)
        return 2
    previous = _interrupt_on_sigterm()
    try:
        run(Path(given[0]), given[1:])
    except ArmRayError as error:
        print(f"error: {hidden(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        previous()
    return 0


def _interrupt_on_sigterm() -> Callable[[], object]:
    """`ray job stop` sends SIGTERM: leave as by Ctrl-C. Returns what undoes it."""
    import signal

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    return lambda: signal.signal(signal.SIGTERM, before)

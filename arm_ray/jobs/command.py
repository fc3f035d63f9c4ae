"""A command of the command line as a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from arm_ray import cli


def run_command(name: str, arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit code.

    Args:
        name: Of the command.
        arguments: What follows it; None: those of this process, which is there for it alone.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return cli.main([name, *given], is_own_process=arguments is None)

"""`ray job submit … -- python -m arm_ray.jobs.attach CONFIG.yaml [section.key=value …]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from arm_ray.jobs.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    return run_command("attach", arguments)


if __name__ == "__main__":
    sys.exit(main())

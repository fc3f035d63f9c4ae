"""The command `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.naming import FORMATS, FormatOrAuto, split_source
from arm_ray.cli.options import Commands, add_command
from arm_ray.storage.urls import is_url, plain_path

_EXAMPLES = (
    "arm-ray inspect /runs/sft",
    "arm-ray inspect /runs/sft/checkpoint-100 --json",
    "arm-ray inspect fsdp:/runs/rl/global_step_20/actor",
)


def add_to(commands: Commands) -> None:
    """Add the command."""
    inspect = add_command(
        commands, "inspect", _inspect, "what a checkpoint is, and if it is whole", _EXAMPLES
    )
    inspect.add_argument("path", metavar="PATH", help="a directory, a URL, or FORMAT:PATH")
    inspect.add_argument("--format", choices=FORMATS, help="read it as that; default: as it looks")
    inspect.add_argument("--json", action="store_true", help="print JSON")


def _inspect(options: argparse.Namespace) -> int:
    """Say what a directory is: a checkpoint, of which format, step and size; or a run with some.

    The exit code is 1 where it is not complete.
    """
    named, text = split_source(plain_path(options.path))
    if is_url(text):
        return _inspect_url(text, options.format or named, options.json)
    path = Path(text).expanduser().absolute()
    import json

    from rich.console import Console

    from arm_ray.checkpoints.inspect import inspect_checkpoint
    from arm_ray.drafting.findings import checkpoints_of
    from arm_ray.report.inspection import print_inspection, print_run

    found = inspect_checkpoint(path, options.format or named)
    layout, seen = checkpoints_of(path, found.found_by)
    rows: list[dict[str, Any]] = [
        {"step": f.step, "path": str(f.path), "complete": f.complete, "reason": f.reason}
        for f in seen
    ]
    is_checkpoint = bool(found.found_by) or not rows
    if options.json:
        content: dict[str, Any] = found.to_dict() if is_checkpoint else {"path": str(path)}
        content |= {"layout": layout, "checkpoints": rows} if rows else {}
        print(json.dumps(content, indent=2))
    else:
        console = Console()
        if is_checkpoint:
            print_inspection(console, found)
        if rows:
            print_run(console, str(path), layout, rows)
    if is_checkpoint:
        return 0 if found.complete else 1
    return 0 if any(row["complete"] for row in rows) else 1


def _inspect_url(url: str, format: FormatOrAuto, as_json: bool) -> int:  # noqa: A002
    import json

    from rich.console import Console

    from arm_ray.checkpoints.inspect import inspect_url
    from arm_ray.config import scratch_path
    from arm_ray.report.inspection import print_inspection

    found = inspect_url(url, format, scratch_path(None))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(Console(), found)
    return 0 if found.complete else 1

"""The parser of the whole command line."""

from __future__ import annotations

import argparse

import arm_ray
from arm_ray.cli import checkpoints, evaluating, explaining, jobs, looking, models, starting

_EPILOG = """\
examples:
  arm-ray init /runs/sft
  arm-ray merge merge.yaml
  arm-ray report runs/merge

arm-ray COMMAND --help has examples of each command."""


def make_parser() -> argparse.ArgumentParser:
    """The parser, with all commands."""
    parser = argparse.ArgumentParser(
        prog="arm-ray",
        description="Merge a training run's checkpoints without training, on Ray.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=arm_ray.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    starting.add_to(commands)
    jobs.add_merge_to(commands)
    evaluating.add_to(commands)
    jobs.add_others_to(commands)
    checkpoints.add_to(commands)
    explaining.add_plan_to(commands)
    looking.add_to(commands)
    models.add_to(commands)
    explaining.add_others_to(commands)
    return parser

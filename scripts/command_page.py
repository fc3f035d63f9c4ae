"""The command line as a page of the documentation site, out of its parser."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path

from arm_ray.cli.parser import make_parser

ROOT = Path(__file__).parents[1]

_HEAD = """# The command line

`arm-ray COMMAND --help` says the same. Exit codes: 0 success; 1 an error that the message explains;
2 a wrong command line; 130 interrupted, run the same command again to go on.

`section.key=value` sets a key of the [configuration](configuration.md), with priority over the
file; `arm-ray config KEY` says what a key means.

Each command that works on Ray is also a job: `python -m arm_ray.jobs.merge CONFIG.yaml`, and
`arm_ray.jobs.attach`, `.evaluate`, `.pipeline`, `.study`. The trainings
`python -m arm_ray.jobs.sft CONFIG.yaml` and `arm_ray.jobs.grpo` are jobs alone
([training](training.md)).
"""


def command_parser() -> argparse.ArgumentParser:
    """The parser of `arm-ray`; the one place outside of it that knows where it comes from."""
    return make_parser()


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, in their order; empty where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def command_page() -> str:
    """The page, as Markdown."""
    parser = command_parser()
    parts = [_HEAD]
    for name, command in commands_of(parser).items():
        parts.append(f"## arm-ray {name}\n")
        parts.append(f"{_plain(command.description)}\n")
        usage = " ".join(command.format_usage().split()).removeprefix("usage: ")
        # A line of its own making: argparse's depends on the terminal.
        wrapped = textwrap.wrap(usage, 76, subsequent_indent=" " * 8, break_on_hyphens=False)
        parts.append("\n".join(["```text", *wrapped, "```\n"]))
        rows = list(_rows(command))
        if rows:
            parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n")
        if command.epilog:
            parts.append(f"```text\n{command.epilog.strip()}\n```\n")
    return "\n".join(parts)


def _rows(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = ", ".join(action.option_strings)
        value = ""
        if action.nargs != 0:
            value = str(action.metavar or "")
            if not value and action.choices is not None:
                value = "{" + ",".join(map(str, action.choices)) + "}"
            value = value or (action.dest.upper() if names else action.dest)
        text = " ".join(part for part in (names, value) if part).replace("|", "\\|")
        yield f"| `{text}` | {_plain(action.help)} |"


def _plain(text: str | None) -> str:
    """A help text as one line; Markdown would take what is in angle brackets for HTML."""
    return " ".join((text or "").split()).replace("%%", "%").replace("<", "&lt;")

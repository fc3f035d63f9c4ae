"""Pages of the documentation: their blocks of code, and the command lines in them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.builders.paths import ROOT

_FENCE = re.compile(
    r"^(?P<in> {0,8})```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=in)```[ ]*$", re.MULTILINE | re.DOTALL
)
# What begins a command of ours where a block does not say that it holds commands.
_OURS = re.compile(
    r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:arm-ray|ray job|python -m|python \w|make) ?"
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Path in the repository.
        language: As the fence says; empty: it says none, or the block is an indented one.
        title: The file that the block is, where it says so.
        text: Its lines.
    """

    page: str
    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        page: Path in the repository.
        text: As it is written, without prompt and comment, on one line.
        words: Of it, as a shell splits them; placeholders that may be left out are left out.
    """

    page: str
    text: str
    words: tuple[str, ...]


def pages() -> list[Path]:
    """The pages of the site, and the README."""
    more = ("README.md", "CONTRIBUTING.md", "cluster/README.md", "studies/README.md")
    return [ROOT / name for name in more] + sorted((ROOT / "docs").rglob("*.md"))


@functools.cache
def blocks(path: Path) -> list[Block]:
    """The blocks of a page: fenced ones, then indented ones."""
    text, page = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found = []
    for fence in _FENCE.finditer(text):
        language, _, rest = fence["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        body = re.sub(rf"^{fence['in']}", "", fence["text"], flags=re.MULTILINE)
        found.append(Block(page, language, title[1] if title else "", body))
    outside = _FENCE.sub("", text)
    for indented in re.findall(r"(?:^ {4,}\S.*\n)+", outside, re.MULTILINE):
        lines = "\n".join(line.strip() for line in indented.splitlines())
        found.append(Block(page, "", "", lines))
    return found


def command_lines(path: Path) -> Iterator[Line]:
    """The command lines of a page: all of a block of bash or of a console, else those of ours."""
    for block in blocks(path):
        if block.language not in ("", "bash", "console", "sh"):
            continue
        for text in re.sub(r"\\\n\s*", "", block.text).splitlines():
            is_command = bool(text.strip()) and not text.startswith("#")
            if block.language not in ("bash", "sh"):
                is_command = bool(_OURS.match(text))
                is_command |= block.language == "console" and text.startswith("$ ")
            if is_command:
                yield _line(block.page, text.removeprefix("$ "))


def inline_commands(path: Path) -> Iterator[Line]:
    """What is written as `arm-ray …` within a sentence."""
    outside = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for text in re.findall(r"`(arm-ray\s[^`]+)`", outside):
        yield _line(path.relative_to(ROOT).as_posix(), " ".join(text.split()))


def _line(page: str, text: str) -> Line:
    # `[--gpus N]` of a synopsis, but not the value of `candidates=[1, 2]`.
    bare = re.sub(r"(?<![\w=,'\"])\[[^\[\]]*\]", "", text)
    words = [word for word in shlex.split(bare, comments=True) if word not in ("...", "…")]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    return Line(page, text, tuple(words))

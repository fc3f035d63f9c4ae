"""What attach meets: directories of models that are published, journals, and runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.refusals.place import Malformed, Place


def published(make: Callable[[Path], object]) -> Malformed:
    """Following, where something is in the directory of published models already."""

    def all_of(place: Place) -> list[str]:
        directory = place.root / "published"
        directory.mkdir()
        make(directory)
        return place.attach()

    return Malformed(all_of)


def _of_work(name: str) -> Callable[[str | bytes], Malformed]:
    """Following, where a file in the directory of its work holds what is given."""

    def holding(content: str | bytes) -> Malformed:
        def make(directory: Path) -> None:
            (directory / "work").mkdir()
            data = content.encode() if isinstance(content, str) else content
            (directory / "work" / name).write_bytes(data)

        return published(make)

    return holding


journal, config = _of_work("attach.json"), _of_work("config.yaml")


def _file(place: Place, name: str) -> list[str]:
    place.file(name, "x")
    return place.attach()


def _loop(place: Place) -> list[str]:
    (place.root / "published").symlink_to("published")
    return place.attach()


_LISTS = '"taken": [], "skipped": [], "in_order": [], "broken": []'

CASES: dict[str, Malformed] = {
    "a file for published models": Malformed(lambda place: _file(place, "published")),
    "a link to itself for published models": Malformed(_loop),
    "a file for the run": Malformed(lambda place: _file(place, "training")),
    "a journal cut off": journal('{"version": 1, "arri'),
    "a journal of noise": journal(b"\xff\xfe\x00"),
    "a journal that is a list": journal("[1]"),
    "a journal that is null": journal("null"),
    "a journal of brackets": journal("[" * 100_000),
    "a journal without arrivals": journal("{" + _LISTS + "}"),
    "a journal with an arrival of words": journal('{"arrivals": ["one"], ' + _LISTS + "}"),
    "a journal with an unknown key": journal('{"arrivals": [{"x": 1}], ' + _LISTS + "}"),
    "a journal with a step that is a word": journal(
        '{"arrivals": [], "taken": [["one", "x"]], "skipped": [], "in_order": [], "broken": []}'
    ),
    "a journal that is a pipe": published(
        lambda path: [(path / "work").mkdir(), os.mkfifo(path / "work" / "attach.json")]
    ),
    "a journal that is a directory": published(
        lambda path: (path / "work" / "attach.json").mkdir(parents=True)
    ),
    "a configuration of noise": config(b"\xff\xfe"),
    "a configuration that is a list": config("[a]"),
    "a configuration of another run": config("run: {path: /elsewhere}\nmerge: {base: x}\n"),
    "a configuration with words for sections": config("run: fast\nmerge: slow\npublish: x\n"),
    "a configuration with unknown keys": config("a: b\n"),
    "a configuration that is a pipe": published(
        lambda path: [(path / "work").mkdir(), os.mkfifo(path / "work" / "config.yaml")]
    ),
    "an output that is a file": Malformed(
        lambda place: place.attach(output=str(place.file("work", "x")))  # type: ignore[arg-type]
    ),
}

"""Configuration files of a merge that are none, or ask for what cannot be."""

from __future__ import annotations

import os
from typing import Any

from tests.refusals.place import Malformed, Place

GOOD = "base: a\ncandidates: [b]\noutput: c\n"


def text(content: str | bytes) -> Malformed:
    """A configuration file of this content."""
    return Malformed(lambda place: ["merge", str(place.file("merge.yaml", content))])


def keys(says: str = "", **changes: Any) -> Malformed:
    """A configuration that is right but for these keys."""
    return Malformed(lambda place: place.merge(**changes), says=says)


def overridden(*overrides: str, where: str | None = None) -> Malformed:
    return Malformed(lambda place: place.merge(*overrides), where=where)


def _aliases(kind: str) -> str:
    """Ten levels of ten references each: 10^10 entries."""
    levels = [f"l0: &l0 {'[x, x]' if kind == 'list' else '{x: 1}'}\n"]
    for level in range(1, 11):
        references = ", ".join([f"*l{level - 1}"] * 10)
        if kind == "list":
            levels.append(f"l{level}: &l{level} [{references}]\n")
        elif kind == "merge":
            levels.append(f"l{level}: &l{level} {{<<: [{references}]}}\n")
        else:
            inner = ", ".join(f"k{n}: *l{level - 1}" for n in range(10))
            levels.append(f"l{level}: &l{level} {{{inner}}}\n")
    return "".join(levels) + GOOD


def _pipe(place: Place) -> list[str]:
    os.mkfifo(place.root / "merge.yaml")
    return ["merge", str(place.root / "merge.yaml")]


def _directory(place: Place) -> list[str]:
    (place.root / "merge.yaml").mkdir()
    return ["merge", str(place.root / "merge.yaml")]


def _loop(place: Place) -> list[str]:
    (place.root / "merge.yaml").symlink_to("merge.yaml")
    return ["merge", str(place.root / "merge.yaml")]


def _device(place: Place) -> list[str]:
    (place.root / "merge.yaml").symlink_to("/dev/zero")
    return ["merge", str(place.root / "merge.yaml")]


def _sparse(place: Place) -> list[str]:
    path = place.file("merge.yaml", GOOD)
    with path.open("r+b") as file:
        file.truncate(1 << 32)
    return ["merge", str(path)]


CASES: dict[str, Malformed] = {
    "empty": text(""),
    "spaces only": text("  \n\n"),
    "a comment only": text("# nothing\n"),
    "null": text("null"),
    "a list": text("- base: a\n"),
    "a number": text("42"),
    "a word": text("merge"),
    "two documents": text(GOOD + "---\n" + GOOD),
    "a tab for indentation": text("base: a\nmethod:\n\toperator: arm\n"),
    "an open bracket": text("base: a\ncandidates: [b\n"),
    "an open quote": text('base: "a\ncandidates: [b]\n'),
    "a colon too many": text("base: a: b\n"),
    "an unknown anchor": text("base: *nobody\n"),
    "a key twice": text(GOOD + "base: d\n"),
    "a key twice in a section": text(GOOD + "schedule: {max_iterations: 1, max_iterations: 2}\n"),
    "a list as a key": text(GOOD + "? [a, b]\n: c\n"),
    "a mapping as a key": text(GOOD + "? {a: b}\n: c\n"),
    "a date as a key": text(GOOD + "2024-01-01: c\n"),
    "a number as a key": text(GOOD + "17: c\n"),
    "null as a key": text(GOOD + "null: c\n"),
    "bytes as a key": text(GOOD + "!!binary aGk=: c\n"),
    "an object of Python": text(GOOD + "method: !!python/object/apply:os.system ['true']\n"),
    "an unknown tag": text(GOOD + "method: !mine {a: b}\n"),
    "an impossible date": text(GOOD + "preset: 2024-13-45\n"),
    "a set": text(GOOD + "method: !!set {a, b}\n"),
    "bad base64": text(GOOD + "preset: !!binary '****'\n"),
    "an integer of ten thousand digits": text(GOOD + f"adapter_rank: {'9' * 10_000}\n"),
    "a surrogate": text(GOOD + 'preset: "\\ud800"\n'),
    "not a number": text(GOOD + "method: {coefficient: .nan}\n"),
    "infinity": text(GOOD + "method: {coefficient: .inf}\n"),
    "nested lists": text(GOOD + "x: " + "[" * 20_000 + "]" * 20_000),
    "nested mappings": text(GOOD + "x: " + "{a: " * 20_000 + "b" + "}" * 20_000),
    "nested by indentation": text("".join(" " * n + "a:\n" for n in range(1200))),
    "lists that grow tenfold": text(_aliases("list")),
    "mappings that grow tenfold": text(_aliases("mapping")),
    "merge keys that grow tenfold": text(_aliases("merge")),
    "a list that holds itself": text(GOOD + "x: &x [*x]\n"),
    "a mapping that holds itself": text(GOOD + "x: &x {y: *x}\n"),
    "a mapping that merges itself": text(GOOD + "x: &x {<<: *x}\n"),
    "a merge key that is a number": text(GOOD + "<<: 5\n"),
    "a hundred thousand keys": text(GOOD + "".join(f"k{n}: 1\n" for n in range(50_000))),
    "NUL bytes": text(b"base: a\0b\n"),
    "an escaped NUL in a path": text('base: "a\\0b"\ncandidates: [b]\noutput: c\n'),
    "Latin-1": text("base: caf\xe9\n".encode("latin-1")),
    "UTF-16 without a mark": text("base: a\n".encode("utf-16-le")),
    "a cut character": text(b"base: caf\xc3"),
    "a picture": text(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "JSON cut off": text('{"base": "a", "candidates": ["b"'),
    "a directory": Malformed(_directory),
    "a pipe": Malformed(_pipe),
    "a device": Malformed(_device),
    "a link to itself": Malformed(_loop),
    "four gigabytes of zeros": Malformed(_sparse),
    "not there": Malformed(lambda place: ["merge", str(place.root / "none.yaml")]),
    "a name of 300 characters": Malformed(lambda place: ["merge", str(place.root / ("x" * 300))]),
    "no base": keys("base: required", base=...),
    "no candidates": keys("candidates: required", candidates=...),
    "no output": keys("output: required", output=...),
    "an empty list of candidates": keys(candidates=[]),
    "candidates as a word": keys(candidates="b"),
    "a number among candidates": keys(candidates=["a", 5]),
    "a base that is a list": keys(base=["a"]),
    "a base that is empty": keys(base=""),
    "a candidate that is empty": keys(candidates=[""]),
    "an output that is empty": keys(output=""),
    "an unknown key": keys("did you mean 'method'?", metod={"operator": "arm"}),
    "an unknown key in a section": keys(
        "did you mean 'max_iterations'?", schedule={"max_iteration": 3}
    ),
    "a section that is a list": keys(method=["arm"]),
    "a section that is a word": keys(runtime="fast"),
    "an unknown operator": keys(method={"operator": "amr"}),
    "a word for a number": keys(schedule={"max_iterations": "many"}),
    "a truth for a number": keys(schedule={"max_iterations": True}),
    "a fraction for a whole number": keys(schedule={"max_iterations": 2.5}),
    "no iterations": keys(schedule={"max_iterations": 0}),
    "a window of one": keys(schedule={"window_size": 1}),
    "a tolerance above one": keys(schedule={"tolerance": 2.0}),
    "a number for a truth": keys(calibration={"path": "x", "shuffle": 3}),
    "an unknown word": keys(keep_states="some"),
    "an unknown preset": keys(preset="paper/none"),
    "a preset that is a list": keys(preset=["a"]),
    "keys of another tool": keys(merge_method="ties", models=[{"model": "a"}]),
    "a dotted key": keys("sections are nested", **{"schedule.max_iterations": 3}),
    "an operator that needs data": keys(method={"operator": "arm"}),
    "a given start without a state": keys(schedule={"initial": "given"}),
    "an adapter rank for a model": keys(adapter_rank=4),
    "a range without a run": keys(candidates={"from": 1, "to": 3}),
    "a range of a run that is not there": keys(candidates={"run": "/nowhere/at/all", "from": 1}),
    "a range that goes back": Malformed(
        lambda place: place.merge(candidates={"run": str(place.good), "from": 20, "to": 10})
    ),
    "a range of words": Malformed(
        lambda place: place.merge(candidates={"run": str(place.good), "from": "first"})
    ),
    "an output below a file": Malformed(
        lambda place: place.merge(output=str(place.file("file", "x") / "run"))
    ),
    "an output that is a file": Malformed(
        lambda place: place.merge(output=str(place.file("file", "x")))
    ),
    "an output with a NUL": keys(output="a\0b"),
    "an output of 5000 characters": Malformed(
        lambda place: place.merge(output="/tmp/" + "x" * 5000), where="xxx"
    ),
    "an override without a value": overridden("schedule.max_iterations=", where="merge.yaml"),
    "an override without a name": overridden("=3", where=""),
    "an override of an unknown key": overridden("schedule.max=3"),
    "an override into a value": overridden("base.x=3", where="base"),
    "an override that is no YAML": overridden("base=[a", where="base"),
    "an override that grows tenfold": overridden(
        "base=[&a [x, x], " + ", ".join(f"&b{n} [{', '.join(['*a'] * 9)}]" for n in range(2)) + "]"
    ),
}

"""Whatever comes from outside and is wrong ends in one error that says what to do.

The table has more than 150 faults, each another one. For each, a command is run as users run it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.builders.figures import guarantee
from tests.builders.forked import CommandServer
from tests.refusals import (
    adapters,
    calibration,
    checkpoints,
    configurations,
    followed,
    jobs,
    models,
    runs,
    tasks,
    trainers,
    urls,
)
from tests.refusals.place import Malformed, Place, make_good, tree_of

_TABLES = (
    configurations,
    jobs,
    checkpoints,
    trainers,
    adapters,
    calibration,
    tasks,
    runs,
    urls,
    followed,
    models,
)
CASES: Mapping[str, Malformed] = {
    f"{table.__name__.rpartition('.')[2]}: {name}": case
    for table in _TABLES
    for name, case in table.CASES.items()
}
_GIB = 1 << 30
_LONGEST_ERROR = 10_000
# What Python says of a fault in a program, and no sentence of ours.
_OF_A_FAULT = re.compile(
    r"Traceback|NoneType|<class '|indices must be|object (?:is not|has no|of type) "
)
# The same, where it is not what a library has said of the input.
_NAME = re.compile(r"\b[A-Z][A-Za-z]+Error\b")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def server() -> Iterator[CommandServer]:
    with CommandServer() as started:
        yield started


@dataclass
class Tally:
    """How many cases were tried, and how many went well."""

    tried: int = 0
    refused: int = 0


@pytest.fixture(scope="module")
def tally(good: Path) -> Iterator[Tally]:
    """The count of all cases; what all of them read is as it was at their end."""
    before, counted = tree_of(good), Tally()
    yield counted
    assert tree_of(good) == before
    guarantee(f"inputs refused well: {counted.refused} of {counted.tried}")


def _part(name: str) -> Any:
    """A case; of eight, one is tried with every change, and the others where there are minutes."""
    is_quick = zlib.crc32(name.encode()) % 8 == 0
    return pytest.param(name, marks=() if is_quick else pytest.mark.minutes)


def test_the_table_is_large_enough() -> None:
    assert len(CASES) >= 150


@pytest.mark.processes
@pytest.mark.parametrize("name", map(_part, CASES))
def test_it_is_refused(
    name: str, server: CommandServer, good: Path, tally: Tally, tmp_path: Path
) -> None:
    case = CASES[name]
    tally.tried += 1
    arguments = case.make(Place(tmp_path, good))
    before = tree_of(tmp_path)
    ended = server.run(arguments, tmp_path)
    text = ended.err + ended.out
    assert ended.code is not None, "it did not end"
    assert ended.code in case.codes, text[-3000:]
    assert _raw(text) is None, text[-3000:]
    assert case.says in text, text[-3000:]
    if not case.is_told and ended.code == 1:
        _check_error(ended.err, case.where if case.where is not None else str(tmp_path))
    after = tree_of(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert not [path for path in after.keys() - before.keys() if path.endswith("/model")]
    assert ended.peak_bytes < _GIB, f"{ended.peak_bytes / 1e6:.0f} MB"
    tally.refused += 1


def _raw(text: str) -> re.Match[str] | None:
    """What of a text is an exception of Python, and nothing for people."""
    ours = [line for line in text.splitlines() if not line.startswith("  got: ")]
    return _OF_A_FAULT.search(text) or _NAME.search("\n".join(ours))


def _check_error(err: str, where: str) -> None:
    """It has what, where, and what was expected or is to be done."""
    assert len(err) < _LONGEST_ERROR
    begin = err.index("error: ")
    what, *rows = err[begin + len("error: ") :].splitlines()
    assert what.strip()
    told = {
        match[1]: match[2]
        for row in rows
        if (match := re.match(r"  (where|got|expected|to do): +(.*)", row))
    }
    # A long name may stand for itself in a line of its own.
    assert where in told.get("where", ""), err[-3000:]
    assert told.keys() & {"expected", "to do"}, err[-3000:]

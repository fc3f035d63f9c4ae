"""A process whose files fail on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pytest

from tests.builders.paths import ROOT
from tests.faults import shim
from tests.faults.shim import Fault


class Faulty:
    """Does scenarios with faults, in forks of one process; see `tests.faults.child`."""

    def __init__(self, library: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = self._start(library, errors)
        self._calm: dict[str, dict[str, Any]] = {}

    def _start(self, library: Path, errors: IO[bytes]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.child"],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def ask(self, scenario: str, fault: Fault) -> dict[str, Any]:
        """What came of a scenario with a fault, and of going on without one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"scenario": scenario, "fault": asdict(fault)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text(errors="replace")[-3000:]
        return dict(json.loads(line))

    def calm(self, scenario: str) -> dict[str, Any]:
        """The same without a fault."""
        if scenario not in self._calm:
            found = self.ask(scenario, Fault())
            assert found["ended"] == "well", found
            assert "torn" not in found, found
            self._calm[scenario] = found
        return self._calm[scenario]

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """The process, shared by all tests of the session."""
    place = tmp_path_factory.mktemp("faults")
    library = shim.build(place) if sys.platform == "linux" else None
    if library is None:
        pytest.skip("no C compiler (cc) here, or no Linux")
    found = Faulty(library, place / "log.txt")
    yield found
    found.end()

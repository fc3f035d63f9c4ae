"""What all benchmarks share: the machine they ran on, repeated timing, and how results are kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

import arm_ray
from arm_ray.hardware import cpu_model

RESULTS = Path(__file__).parent / "results"
DEMO = Path(__file__).parents[1] / "examples/smollm2/pipeline.yaml"
_PACKAGES = ("torch", "transformers", "ray", "safetensors", "numpy")


def demo_candidates() -> list[str]:
    """The checkpoints that the demo merges, which `make demo` has left."""
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    return [f"{demo['output']}/train/checkpoint-{step}" for step in demo["candidates"]]


def machine() -> dict[str, Any]:
    """Hardware and versions, for the result file."""
    info = Path("/proc/cpuinfo")
    flags: list[str] = []
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                flags = [f for f in line.split() if f in ("avx2", "avx512f", "amx_bf16")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_model(),
        "features": sorted(set(flags)),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"arm-ray": arm_ray.__version__, **{n: metadata.version(n) for n in _PACKAGES}},
    }


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    function: Callable[[], Any],
    repeats: int,
    warm_up: int = 1,
    device: torch.device = torch.device("cpu"),  # noqa: B008 -- a constant
) -> float:
    """Median seconds of a call on a device, after some that do not count."""
    for _ in range(warm_up):
        function()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def report(
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    goals: Sequence[tuple[str, bool]],
    more: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Print the rows as a table and the goals with their outcome, and write both as JSON.

    Args:
        name: Of the benchmark; the file is `benchmarks/results/NAME.json`.
        title: What the table shows.
        rows: Column -> value; all with the same columns.
        goals: What was aimed at, with the measured figure in words, and whether it was reached.
        more: What the file holds beside the rows.
        command: As for `record`.
    """
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console = Console(width=140)
    console.print(table)
    for goal, reached in goals:
        console.print(f"{'reached' if reached else 'MISSED '}  {goal}", highlight=False)
    record(name, rows, goals, more, command)
    console.print(f"written: benchmarks/results/{name}.json", highlight=False)


def record(
    name: str,
    rows: Sequence[dict[str, Any]],
    goals: Sequence[tuple[str, bool]],
    more: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Write results as JSON; see `report`.

    Args:
        name: Of the benchmark.
        rows: Its rows.
        goals: What was aimed at, and whether it was reached.
        more: What else the file holds.
        command: What made it; None: `python -m benchmarks.NAME`.
    """
    RESULTS.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "command": command or f"python -m benchmarks.{name}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "rows": list(rows),
        "goals": [{"goal": goal, "reached": reached} for goal, reached in goals],
        **(more or {}),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)

"""Measure arm_ray on one GPU, without network, in less than ten minutes.

::

    python -m benchmarks.gpu                    # all of it
    python -m benchmarks.gpu --only rotation layer
    python -m benchmarks.gpu --quick            # tiny shapes, on any machine; nothing is recorded

Parts: `rotation` (error, signs, bits and seconds of the rotation), `layer` (one decoder layer of
7B, 14B and 72B models, stage by stage), `merge` (whole merges through Ray of random models: 1.5B,
and eight layers of a 7B). Beside each figure stands its floor: operations and bytes over rates
that were measured on the same card just before. Results are written part by part, to
`benchmarks/results/gpu-PART.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import record, report
from benchmarks.gpu import layer, rotation, whole
from benchmarks.gpu.rates import measure_rates

PARTS = ("rotation", "layer", "merge")
Row = dict[str, Any]
Goals = list[tuple[str, bool]]


def rotation_goals(rows: list[Row]) -> Goals:
    """What the rotation is held to."""
    worst = max(row["relative error"] for row in rows)
    return [
        (f"within 1e-5 of the CPU in float64: {worst:.1e}", worst <= 1e-5),
        ("no negative diagonal of U", all(row["diagonal not negative"] for row in rows)),
        ("the same bits from run to run", all(row["same bits twice"] for row in rows)),
    ]


def layer_goals(rows: list[Row]) -> Goals:
    """What a layer is held to."""
    worst = max(row["of the floors"] for row in rows)
    return [(f"an iteration takes at most 1.25 of its floors: {worst:.2f}", worst <= 1.25)]


def merge_goals(rows: list[Row]) -> Goals:
    """What whole merges are held to."""
    repeated = [row for row in rows if row["same bits twice"] != ""]
    goals: Goals = [("the same bits of two runs", all(r["same bits twice"] for r in repeated))]
    for row in rows:
        for what, measured, planned in (
            ("time", row["iterations, s"], row["planned, s"]),
            ("memory", row["GPU peak, GB"], row["planned, GB"]),
        ):
            ratio = measured / planned
            text = f"{row['merge']}: {what} within 20 % of the plan: {ratio:.2f}"
            goals.append((text, 0.8 <= ratio <= 1.2))
    return goals


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing is recorded")
    parser.add_argument("--root", type=Path, default=Path("runs/bench/gpu"), help="for models")
    parser.add_argument("--runs", type=Path, help="for merged states; default: the same")
    parser.add_argument("--minutes", type=float, default=9.0, help="then no more merge begins")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.quick):
        print("there is no GPU here; --quick tries the same on a CPU", file=sys.stderr)
        return 1
    until = time.monotonic() + 60.0 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root, runs = (
        Path(path).resolve() for path in (arguments.root, arguments.runs or arguments.root)
    )
    places = {}
    for name, path in (("models", root), ("states", runs)):
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free / 1e9
        places[name] = f"{whole.file_system(path)}, {free:.0f} GB free"
    started = time.monotonic()

    def say(what: Any) -> None:
        text = what if isinstance(what, str) else json.dumps(what)
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    say(places)
    rates = measure_rates(device, quick=arguments.quick)
    say(asdict(rates))
    parts: dict[str, tuple[str, Callable[[], Iterator[Row]], Callable[[list[Row]], Goals]]] = {
        "rotation": (
            "Rotation on the GPU, 64 samples, against the CPU in float64",
            lambda: rotation.measure(device, rates, quick=arguments.quick),
            rotation_goals,
        ),
        "layer": (
            "One layer, three states, 64 samples of 1024 tokens, without writing",
            lambda: layer.measure_layers(device, rates, quick=arguments.quick),
            layer_goals,
        ),
        "merge": (
            "Merges of a base and two candidates, 64 samples of 1024 tokens an iteration",
            lambda: whole.measure_all(root, runs, quick=arguments.quick, until=until, say=say),
            merge_goals,
        ),
    }
    for part in arguments.only:
        title, measure, goals = parts[part]
        more = {"rates": asdict(rates), "places": places}
        command = f"python -m benchmarks.gpu --only {part}"
        rows: list[Row] = []
        for row in measure():
            say(row)
            rows.append(row)
            if not arguments.quick:
                # Time may end at any moment.
                record(f"gpu-{part}", rows, goals(rows), more, command)
        if torch.cuda.is_available():
            # Another process merges next, and wants the memory.
            torch.cuda.empty_cache()
        if arguments.quick or not rows:
            say(f"{part}: a short run, nothing is recorded" if rows else f"{part}: nothing")
            continue
        report(f"gpu-{part}", title, rows, goals(rows), more, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Layers in a row for each shard, and dealt round: six iterations with `runtime.residency: disk`.

The merge of `benchmarks.scaling` with two and four shards of one thread each, one after the other
with `runtime.partition` contiguous and looped. A shard with a row of layers sends its first hidden
state only after it has merged all its groups but the last; dealt round, after the first.

On a machine with fewer cores than shards, all that can be gained is the time in which a core had
nothing to do. Needs the checkpoints that `make demo` makes.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.common import report
from benchmarks.scaling import Run, measure

SHARDS = (2, 4)
PARTITIONS = ("contiguous", "looped")


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--residency", default="disk")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shards in SHARDS:
        found: dict[str, list[Run]] = {name: [] for name in PARTITIONS}
        for _ in range(options.repeats):
            for name in PARTITIONS:
                run = measure(shards, residency=options.residency, partition=name)
                found[name].append(run)
        median = {
            name: statistics.median(run.seconds for run in runs) for name, runs in found.items()
        }
        for name, runs in found.items():
            work = statistics.median(run.forward + run.merge for run in runs)
            rows.append(
                {
                    "shards": shards,
                    "residency": options.residency,
                    "partition": name,
                    "six iterations, s": round(median[name], 2),
                    "of work, all shards, s": round(work, 2),
                    "to contiguous": round(median[name] / median["contiguous"], 3),
                }
            )
    title = f"Six iterations of SmolLM2-135M, residency {options.residency}, 1 thread a shard"
    report("partition", title, rows, [])


if __name__ == "__main__":
    main()

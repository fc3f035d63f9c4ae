"""Six iterations on one layer shard and on two, and what the schedule would give on more.

Measured: the same merge of SmolLM2-135M (base, two candidates, three anchored iterations and three
of a window) with `runtime.layer_shards` 1 and 2, one thread each, on a local Ray. Two cores may
share memory and units, so the yardstick is the merge with one shard twice at the same time, in
programs that know nothing of each other. A round has all three, and ratios are those of a round:
what a virtual machine can do changes from minute to minute.

Simulated: the measured merge with one shard says how long forward passes and merges take in all,
and timing each layer group in this process how they spread over the layers;
`arm_ray.planning.simulator` runs the driver's schedule with that. It is run for the two measured
points (for two shards with the times of the merges beside each other), of which the second tells
how far to believe it, and then for 1 to 64 shards and 1 to 24 iterations of a model of 80 such
layers, with twice as many micro-batches as here.

Needs the checkpoints that `make demo` makes, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from arm_ray.calibration.minibatch import MicroBatch, MiniBatch, micro_batches, unique_samples
from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.events import read_events
from arm_ray.merging.method import open_method
from arm_ray.model.partition import balanced_partition
from arm_ray.planning.simulator import ChunkTimes, IterationTimes, ShardTimes, simulate
from arm_ray.runtime.cluster.joining import local_slots, ray_session
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.merge.specs import shard_specs
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import Placement
from arm_ray.schedule import IterationPlan, plan_iteration
from arm_ray.training.data import read_path
from benchmarks.common import RESULTS, demo_candidates, report

RUNS = Path("runs/smollm2")
OUTPUT = Path("runs/bench/scaling")
DATA = Path("examples/smollm2/data/calibration.jsonl")
SAMPLES = 64
ITERATIONS = 6
LAYERS = 80
ACTORS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 3, 6, 12, 24)
LOOKAHEADS = (2, 8)


@dataclass(frozen=True)
class GroupTimes:
    """Seconds of one layer group: a forward call, and the merge with three and two inputs."""

    forward: float
    merge: dict[int, float]


def configuration(
    shards: int,
    output: Path,
    compute_dtype: str = "auto",
    models: Sequence[str] | None = None,
    samples: int = SAMPLES,
    **runtime: Any,
) -> MergeConfig:
    """The merge that is measured.

    Args:
        shards: `runtime.layer_shards`.
        output: Of the run.
        compute_dtype: As in a configuration.
        models: The base and the candidates; None: the demo's.
        samples: Of a mini-batch.
        runtime: Further settings of `runtime`.
    """
    base, *candidates = models or [str(RUNS / "base"), *demo_candidates()]
    return parse_merge_config(
        {
            "base": base,
            "candidates": candidates,
            "output": str(output),
            "keep_states": "last",
            "calibration": {"path": str(DATA), "batch_size": samples},
            "schedule": {
                "anchor_iterations": 3,
                "max_iterations": ITERATIONS,
                "tolerance": 0.0,
                "step": "fixed",
            },
            "precision": {"compute_dtype": compute_dtype},
            "runtime": {"layer_shards": shards, "threads": 1, **runtime},
        }
    )


@dataclass(frozen=True)
class Run:
    """A merge: seconds from the first call to the end, and of work, over all shards."""

    seconds: float
    forward: float
    merge: float


def measure(shards: int, name: str = "", **runtime: Any) -> Run:
    """Merge once with so many shards, into a directory of that name."""
    output = OUTPUT / (name or f"shards-{shards}")
    shutil.rmtree(output, ignore_errors=True)
    config = configuration(shards, output.resolve(), **runtime)
    # Also a single shard is to be an actor.
    with ray_session(None, local_slots(config.runtime, shards)):
        merge(config, console=Console(quiet=True))
    events = read_events(output / "events.jsonl")
    done = [event for event in events if "task_vector_cosine" in event]
    assert len(done) == ITERATIONS
    shutil.rmtree(output)
    names = ("seconds", "forward_seconds", "merge_seconds")
    return Run(*(float(sum(event[name] for event in done)) for name in names))


def measure_beside(programs: int) -> list[Run]:
    """Merge once with one shard, in so many programs at the same time."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--child"]
    running = [
        subprocess.Popen([*command, f"beside-{i}"], stdout=subprocess.PIPE, text=True)  # noqa: S603
        for i in range(programs)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a merge that ran beside another failed")
    return [Run(**json.loads(text.splitlines()[-1])) for text in printed]


def median(runs: Sequence[Run]) -> Run:
    """The run of median seconds; of an even number the slower one."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def scaled(groups: Sequence[GroupTimes], micro: int, run: Run) -> list[GroupTimes]:
    """Times of the groups that add up to what a merge with one shard took."""
    calls = micro * (3 * 3 + 3 * 2)
    forward = run.forward / (calls * sum(g.forward for g in groups))
    merge = run.merge / (3 * sum(g.merge[3] + g.merge[2] for g in groups))
    return [
        GroupTimes(forward * g.forward, {n: merge * s for n, s in g.merge.items()}) for g in groups
    ]


def measure_groups(repeats: int) -> tuple[list[GroupTimes], int]:
    """Times of each layer group on one thread, and the micro-batches of an iteration."""
    config = configuration(1, OUTPUT / "groups")
    inputs = open_inputs(config)
    method = open_method(config.method, 2)
    tokenizer: Any = AutoTokenizer.from_pretrained(config.base)
    texts = [row["prompt"] + row["completion"] for _, row in read_path(str(DATA))[0][:SAMPLES]]
    ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    different, columns = unique_samples(MiniBatch(1, list(range(SAMPLES)), ids))
    micro = micro_batches(
        different, max_tokens=config.runtime.micro_batch_tokens, max_samples=SAMPLES
    )
    count = sum(len(batch.lengths) for batch in micro)
    forwards: list[list[float]] = [[] for _ in inputs.layout.groups]
    merges: list[dict[int, list[float]]] = [{} for _ in inputs.layout.groups]
    for repeat in range(repeats + 1):
        shutil.rmtree(OUTPUT / "groups", ignore_errors=True)
        run = (OUTPUT / "groups").resolve()
        run.mkdir(parents=True)
        shard = LayerShard(shard_specs(config, method, inputs, run, Placement(1, "cpu"))[0])
        # An anchored iteration and one of the window, which reads what the first has written.
        anchored = plan_iteration(config.schedule, 2, 1)
        window = IterationPlan(2, "sliding_window", "base", ("state-0001",), 2, "state-0001")
        for plan in (anchored, window):
            for group in range(len(inputs.layout.groups)):
                forward = _forward(shard, plan, group, micro, count)
                started = time.perf_counter()
                shard.merge(plan, group, columns)
                seconds = time.perf_counter() - started
                # The first round warms caches and does not count.
                if repeat:
                    forwards[group].append(forward)
                    merges[group].setdefault(len(plan.inputs), []).append(seconds)
    shutil.rmtree(OUTPUT / "groups")
    times = [
        GroupTimes(
            statistics.median(forward), {n: statistics.median(s) for n, s in by_inputs.items()}
        )
        for forward, by_inputs in zip(forwards, merges, strict=True)
    ]
    return times, len(micro)


def _forward(
    shard: LayerShard, plan: IterationPlan, group: int, micro: Sequence[MicroBatch], count: int
) -> float:
    """Mean seconds of one call of one group."""
    started = time.perf_counter()
    for index, batch in enumerate(micro):
        for state in plan.inputs:
            shard.forward(plan, range(group, group + 1), count, state, index, batch, None)
    return (time.perf_counter() - started) / (len(micro) * len(plan.inputs))


def schedule(
    groups: Sequence[GroupTimes], actors: int, iterations: int, micro: int
) -> list[IterationTimes]:
    """What the simulator takes: three anchored iterations, then a window of two."""
    work = [round(1e6 * (9 * g.forward + g.merge[3])) for g in groups]
    shards = balanced_partition(work, actors)
    found = []
    for iteration in range(iterations):
        inputs = 3 if iteration < 3 else 2
        parts = [
            ShardTimes(
                (
                    ChunkTimes(
                        sum(groups[g].forward for g in shard),
                        sum(groups[g].merge[inputs] for g in shard),
                    ),
                )
            )
            for shard in shards
        ]
        found.append(IterationTimes(micro * inputs, tuple(parts)))
    return found


def deeper(groups: Sequence[GroupTimes]) -> list[GroupTimes]:
    """The groups of a model of `LAYERS` such layers: its first and last one, and the median."""
    inner = groups[1:-1]
    middle = GroupTimes(
        statistics.median(g.forward for g in inner),
        {n: statistics.median(g.merge[n] for g in inner) for n in (2, 3)},
    )
    return [groups[0], *([middle] * (LAYERS - 2)), groups[-1]]


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Efficiency over actors, one line for each number of iterations."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same file for the same figures.
    matplotlib.rcParams["svg.hashsalt"] = "arm_ray"
    figure, panels = pyplot.subplots(1, len(LOOKAHEADS), figsize=(10, 4), sharey=True)
    for panel, lookahead in zip(panels, LOOKAHEADS, strict=True):
        for iterations in LENGTHS:
            line = [
                p for p in points if p["iterations"] == iterations and p["lookahead"] == lookahead
            ]
            panel.plot(
                [p["actors"] for p in line],
                [p["efficiency"] for p in line],
                marker="o",
                markersize=3,
                label=f"{iterations}",
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(ACTORS, [str(n) for n in ACTORS])
        panel.set_ylim(0, 1.05)
        panel.set_xlabel("layer shards")
        panel.set_title(f"runtime.lookahead {lookahead}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency (simulated)")
    panels[0].legend(title="iterations", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(asdict(measure(1, options.child))))
        return 0
    groups, micro = measure_groups(options.repeats)
    measured: dict[int, list[Run]] = {1: [], 2: []}
    beside: list[Run] = []
    ratios, limits = list[float](), list[float]()
    for _ in range(options.repeats):
        for shards in measured:
            measured[shards].append(measure(shards))
            print(f"{shards} shard(s): {measured[shards][-1]}", flush=True)
        found = measure_beside(2)
        print(f"beside each other: {found}", flush=True)
        beside += found
        alone, both = measured[1][-1].seconds, measured[2][-1].seconds
        ratios.append(alone / both)
        limits.append(alone * sum(1.0 / run.seconds for run in found))
    rows: list[dict[str, Any]] = []
    middle = {n: median(runs) for n, runs in measured.items()}
    together = median(beside)
    for shards, one in middle.items():
        times = scaled(groups, micro, middle[1] if shards == 1 else together)
        expected = simulate(schedule(times, shards, ITERATIONS, micro), 2).makespan_s
        rows.append(
            {
                "shards": shards,
                "iterations": ITERATIONS,
                "seconds": one.seconds,
                "throughput": 1.0 if shards == 1 else statistics.median(ratios),
                "of it work, s": one.forward + one.merge,
                "simulated seconds": expected,
                "simulated / measured": expected / one.seconds,
            }
        )
    off = max(abs(row["simulated / measured"] - 1) for row in rows)
    ratio = statistics.median(ratios)
    of_limit = statistics.median(r / limit for r, limit in zip(ratios, limits, strict=True))
    rows.append(
        {
            "shards": "1, two merges at once",
            "iterations": ITERATIONS,
            "seconds": together.seconds,
            "throughput": statistics.median(limits),
            "of it work, s": together.forward + together.merge,
            "simulated seconds": None,
            "simulated / measured": None,
        }
    )
    model = deeper(scaled(groups, micro, middle[1]))
    points = []
    for lookahead in LOOKAHEADS:
        for iterations in LENGTHS:
            for actors in ACTORS:
                result = simulate(schedule(model, actors, iterations, 2 * micro), lookahead)
                points.append(
                    {
                        "actors": actors,
                        "iterations": iterations,
                        "lookahead": lookahead,
                        "efficiency": round(result.efficiency, 4),
                    }
                )
    RESULTS.mkdir(exist_ok=True)
    plot(points, RESULTS / "scaling.svg")
    report(
        "scaling",
        f"SmolLM2-135M, base + 2 candidates, {SAMPLES} samples, one thread a shard",
        rows,
        [
            (f"two shards at least 1.8 times as fast as one: {ratio:.2f}", ratio >= 1.8),
            (
                f"at least 0.95 of what two merges at the same time reach: {of_limit:.2f}",
                of_limit >= 0.95,
            ),
            (f"the simulation within 15 % of both measured points: {off:.0%}", off <= 0.15),
        ],
        {"rounds": {"two shards": ratios, "two merges": limits}, "simulated": points},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `arm-ray plan --device this-cpu` says of a merge, beside the merge itself.

The merge of `benchmarks.scaling` (SmolLM2-135M, two candidates, six iterations) on a local Ray,
with one and two layer shards of one thread each and the three places where weights may live:
seconds of the six iterations, and the largest resident memory of a shard, planned and measured.
The plan is given the mean number of tokens of the samples. It is made just before the merge and
just after it, and the mean counts: what a virtual machine can do changes from minute to minute. In
float32, because the rate of bfloat16 may change threefold from one second to the next. With
`--model 3b`: two layers in the shape of Qwen2.5-3B's, of random weights, and 16 samples.

Needs the checkpoints that `make demo` makes.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from arm_ray.config import MergeConfig
from arm_ray.events import read_events
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.devices import MEASURED
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.cluster.joining import ray_session
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.rehearsal import rehearsed
from benchmarks.common import report
from benchmarks.random_models import SHAPES, write_checkpoint
from benchmarks.scaling import DATA, RUNS, configuration

OUTPUT = Path("runs/bench/plans")
MODELS = OUTPUT.with_name("plans-models")
SHARDS = (1, 2)
RESIDENCIES = ("device", "host", "disk")
# The largest difference that counts as told right.
GOAL = 0.1


def mean_tokens(config: MergeConfig) -> int:
    """Tokens of a calibration sample, on average."""
    tokenizer: Any = AutoTokenizer.from_pretrained(config.base)
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    return round(sum(len(tokenizer(text).input_ids) for text in texts) / len(texts))


def wide_models() -> list[str]:
    """Base and candidates of two layers as wide as Qwen2.5-3B's; with SmolLM2's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(RUNS / "base")
    shape = {**SHAPES["3b"], "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    paths = [MODELS / name for name in ("base", "candidate-1", "candidate-2")]
    for seed, path in enumerate(paths):
        write_checkpoint(path, shape, seed, paths[0] if seed else None)
        tokenizer.save_pretrained(path)
    return [str(path) for path in paths]


def planned(config: MergeConfig, tokens: int) -> tuple[float, float]:
    """Seconds of all iterations and memory of the largest shard, GB, as a plan of now has them."""
    cluster = rehearsed(config, make_cluster(config.runtime, device=MEASURED), tokens)
    print(*cluster.notes, sep="\n", flush=True)
    plan = make_plan(config, cluster, tokens)
    memory = max(shard.memory.resident for shard in plan.shards)
    return sum(row.seconds for row in plan.iterations), memory / 1e9


def measured(config: MergeConfig) -> tuple[float, float, float, float]:
    """The same as it was, and the seconds of forward passes and of merges over all shards."""
    shutil.rmtree(config.output, ignore_errors=True)
    merge(config, console=Console(quiet=True))
    events = read_events(Path(config.output) / "events.jsonl")
    done = [event for event in events if event["event"] == "iteration_finished"]
    seconds = [sum(e[n] for e in done) for n in ("seconds", "forward_seconds", "merge_seconds")]
    [end] = [event for event in events if event["event"] == "run_finished"]
    return seconds[0], max(end["peak_shard_bytes"]) / 1e9, seconds[1], seconds[2]


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compute-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shards", type=int, help="only so many; nothing is recorded")
    parser.add_argument("--residency", choices=RESIDENCIES, help="only this; nothing is recorded")
    parser.add_argument("--model", choices=["smollm2", "3b"], default="smollm2")
    options = parser.parse_args()
    dtype = options.compute_dtype
    rows: list[dict[str, Any]] = []
    make = configuration
    if options.model == "3b":
        make = functools.partial(configuration, models=wide_models(), samples=16)
    tokens = mean_tokens(make(1, OUTPUT))
    with ray_session(None, max(*SHARDS, options.shards or 1)):
        for shards in [options.shards] if options.shards else SHARDS:
            for residency in [options.residency] if options.residency else RESIDENCIES:
                config = make(shards, OUTPUT.resolve(), dtype, residency=residency)
                before_s, expected_gb = planned(config, tokens)
                found_s, found_gb, forward, merging = measured(config)
                after_s, _ = planned(config, tokens)
                expected_s = (before_s + after_s) / 2
                rows.append(
                    {
                        "shards": shards,
                        "residency": residency,
                        "before, s": round(before_s, 1),
                        "after, s": round(after_s, 1),
                        "planned, s": round(expected_s, 1),
                        "measured, s": round(found_s, 1),
                        "of time": round(expected_s / found_s, 2),
                        "of it forward": round(forward, 1),
                        "merging": round(merging, 1),
                        "planned, GB": round(expected_gb, 2),
                        "measured, GB": round(found_gb, 2),
                        "of memory": round(expected_gb / found_gb, 2),
                    }
                )
                print(rows[-1], flush=True)
    goals = []
    for name in ("of time", "of memory"):
        worst = max((row[name] for row in rows), key=lambda ratio: abs(ratio - 1.0))
        goals.append((f"{name}, within 10 %: at worst {worst}", abs(worst - 1.0) <= GOAL))
    if options.shards or options.residency or options.model != "smollm2":
        print(*goals, sep="\n")
        return
    title = f"Planned against measured; {tokens} tokens a sample, {dtype}"
    report("plans", title, rows, goals)


if __name__ == "__main__":
    main()

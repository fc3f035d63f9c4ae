"""One ARM iteration on SmolLM2-135M against the forward passes it needs.

Base and two candidates, 64 short word problems, one shard with all layers, bfloat16 compute.
Compared, in the same process and with the same number of threads:

- the three plain Hugging Face forward passes of the batch, padded as a tokenizer pads it;
- the same passes over the micro-batches that the merge makes of it, sorted by length; with the
  head, and the decoder alone (the merge runs no head).

Needs the checkpoints that `make demo` makes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arm_ray.calibration.minibatch import MicroBatch, MiniBatch, micro_batches, unique_samples
from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.merging.method import open_method
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.specs import shard_specs
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import Placement
from arm_ray.schedule import plan_iteration
from arm_ray.training.data import read_path
from benchmarks.common import demo_candidates, report

RUNS = Path("runs/smollm2")
OUTPUT = Path("runs/bench/iteration")
DATA = Path("examples/smollm2/data/calibration.jsonl")
SAMPLES = 64


def configuration(threads: int) -> MergeConfig:
    """One anchored iteration of base and two candidates."""
    return parse_merge_config(
        {
            "base": str(RUNS / "base"),
            "candidates": demo_candidates(),
            "output": str(OUTPUT),
            "calibration": {"path": str(DATA), "batch_size": SAMPLES},
            "schedule": {"anchor_iterations": 1, "max_iterations": 1, "step": "fixed"},
            "precision": {"compute_dtype": "bfloat16"},
            "runtime": {"threads": threads, "layer_shards": 1},
        }
    )


def padded_forwards(models: list[Any], batch: Any) -> float:
    """Seconds of the plain forward passes, head included."""
    started = time.perf_counter()
    with torch.no_grad():
        for model in models:
            model(**batch, use_cache=False)
    return time.perf_counter() - started


def sorted_forwards(models: list[Any], micro: list[MicroBatch]) -> float:
    """Seconds of the forward passes over the micro-batches."""
    started = time.perf_counter()
    with torch.no_grad():
        for model in models:
            for batch in micro:
                model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False)
    return time.perf_counter() - started


def iteration(config: MergeConfig, micro: list[MicroBatch], columns: Any) -> dict[str, float]:
    """Seconds of one iteration on a new shard: forward with capture, merge with writing."""
    inputs = open_inputs(config)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    method = open_method(config.method, len(config.candidates))
    spec = shard_specs(config, method, inputs, OUTPUT.resolve(), Placement(1, "cpu"))[0]
    shard = LayerShard(spec)
    plan = plan_iteration(config.schedule, len(config.candidates), 1)
    count = sum(len(batch.lengths) for batch in micro)
    started = time.perf_counter()
    for chunk in spec.chunks:
        for index, batch in enumerate(micro):
            for state in plan.inputs:
                shard.forward(plan, chunk, count, state, index, batch, None)
        middle = time.perf_counter()
        for group in chunk:
            shard.merge(plan, group, columns)
    ended = time.perf_counter()
    return {"all": ended - started, "forward": middle - started, "merge": ended - middle}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = configuration(options.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(config.base)
    texts = [row["prompt"] + row["completion"] for _, row in read_path(str(DATA))[0]]
    texts = texts[:SAMPLES]
    ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    different, columns = unique_samples(MiniBatch(1, list(range(SAMPLES)), ids))
    micro = micro_batches(
        different, max_tokens=config.runtime.micro_batch_tokens, max_samples=SAMPLES
    )
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        for path in (config.base, *config.candidates)
    ]
    measured: dict[str, list[float]] = {}
    for repeat in range(options.repeats + 1):
        found = {
            "padded": padded_forwards(models, batch),
            "sorted": sorted_forwards(models, micro),
            "decoders": sorted_forwards([model.model for model in models], micro),
            **iteration(config, micro, columns),
        }
        print({name: round(value, 2) for name, value in found.items()}, flush=True)
        # The first round warms caches and does not count.
        for name, value in found.items() if repeat else ():
            measured.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in measured.items()}
    labels = {
        "padded": "three plain forward passes, padded batch, with the head",
        "sorted": "three plain forward passes, sorted micro-batches, with the head",
        "decoders": "three forward passes, sorted micro-batches, without the head",
        "all": "one ARM iteration, all of it",
        "forward": "  of it: forward passes with capture",
        "merge": "  of it: rotation, merging, cosines, writing",
    }
    rows = [
        {
            "what": labels[name],
            "seconds": median[name],
            "of padded": median[name] / median["padded"],
            "of sorted": median[name] / median["sorted"],
            "of decoders": median[name] / median["decoders"],
        }
        for name in labels
    ]
    tokens, positions = int(sum(map(len, ids))), int(batch["input_ids"].numel())
    padded, ordered = median["all"] / median["padded"], median["all"] / median["sorted"]
    report(
        "iteration",
        f"SmolLM2-135M, base + 2 candidates, {SAMPLES} samples: {tokens} tokens in {positions} "
        f"padded positions, {options.threads} threads",
        rows,
        [
            (f"at most 0.8 of the padded forward passes: {padded:.2f}", padded <= 0.8),
            (f"at most 1.25 times the sorted ones: {ordered:.2f}", ordered <= 1.25),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

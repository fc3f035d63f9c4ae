"""ARM on a model that is larger than the memory it may use: one iteration at Qwen2.5-3B's shape.

Base and candidate are random bfloat16 weights. One child process does what one layer shard of a
run does, with `runtime.residency` first `disk`, then `device`: check the weights, run 64 samples,
rotate and write a float32 state, and write the final bfloat16 model from it.

**What the limit is.** `RLIMIT_DATA` is set in the child before anything is imported. The kernel
then refuses to map more private writable memory than that, touched or not: every tensor, and also
every weight file that is mapped, as a whole, because PyTorch maps files copy-on-write. So the limit
is stricter than one on memory in use, and the checkpoints are in files of half a gigabyte, of which
few are mapped at a time. It does not count read-only mappings (libraries); resident memory with all
mapped pages is therefore measured as well (`VmHWM`), and the goal asks that to stay within it too.

`device` on a CPU keeps base and candidate mapped as long as they are read, and the new state in
memory. Either alone is twice the limit; the first of them to meet it ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.random_models import SHAPES, write_checkpoint

GIB = 1 << 30
ROOT = Path("runs/bench")
SAMPLES = 64
# Random, around this many tokens.
MEAN_TOKENS = 50
SHAPE = SHAPES["3b"]
_STATUS = {
    "VmHWM": "peak_rss",
    "VmRSS": "rss",
    "RssAnon": "anonymous",
    "RssFile": "file",
    "VmData": "data",
}
_LINE = re.compile(r"^(\w+):\s+(\d+)(?: kB)?$", re.MULTILINE)


def parse_kilobytes(text: str, names: Mapping[str, str]) -> dict[str, int]:
    """Lines such as `VmRSS:  12 kB` of a file in /proc, in bytes, under other names."""
    return {names[name]: int(n) * 1024 for name, n in _LINE.findall(text) if name in names}


def parse_io(text: str) -> dict[str, int]:
    """The counters of /proc/PID/io."""
    return {name: int(value) for name, value in _LINE.findall(text)}


@dataclass
class MemoryWatch:
    """Samples a process's memory from outside until `stop`, and keeps the largest of each figure.

    Attributes:
        pid: The process.
        interval: Seconds between samples.
        with_pss: Also ask for the proportional share, which makes the kernel walk its pages.
        peaks: Name -> bytes: `peak_rss` is the kernel's own maximum, and exact; `rss`,
            `anonymous` (private, without mapped files), `file`, `data` (what RLIMIT_DATA counts)
            and `pss` are maxima over the samples.
    """

    pid: int
    interval: float = 0.01
    with_pss: bool = False
    peaks: dict[str, int] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """Take no more samples; returns the peaks."""
        self._ended.set()
        self._thread.join()
        return self.peaks

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._sample()
            except OSError:
                return
            self._ended.wait(self.interval)

    def _sample(self) -> None:
        process = Path(f"/proc/{self.pid}")
        found = parse_kilobytes((process / "status").read_text(encoding="utf-8"), _STATUS)
        if self.with_pss:
            rollup = (process / "smaps_rollup").read_text(encoding="utf-8")
            found |= parse_kilobytes(rollup, {"Pss": "pss"})
        for name, value in found.items():
            self.peaks[name] = max(value, self.peaks.get(name, 0))


def forget_pages(paths: Sequence[Path]) -> None:
    """Ask the kernel to drop files from the page cache, so that they are read from disk."""
    for path in paths:
        for file in path.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge_in_this_process(base: Path, candidate: Path, run: Path, residency: str) -> None:
    """One iteration as one layer shard runs it; prints stages as JSON lines."""
    import numpy as np
    import torch

    from arm_ray.calibration.minibatch import MiniBatch, micro_batches, unique_samples
    from arm_ray.checkpoints import states
    from arm_ray.checkpoints.weight_file import SharedWeightFile
    from arm_ray.config import parse_merge_config
    from arm_ray.merging.method import open_method
    from arm_ray.merging.settings import MethodSettings
    from arm_ray.planning.state_life import state_life
    from arm_ray.runtime.inputs import open_inputs
    from arm_ray.runtime.shards.layer_shard import LayerShard
    from arm_ray.runtime.shards.spec import ShardSpec
    from arm_ray.schedule import plan_iteration

    def tell(stage: str, started: float) -> float:
        now = time.perf_counter()
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = parse_kilobytes(text, _STATUS)["peak_rss"]
        print(json.dumps({"stage": stage, "seconds": now - started, "peak": peak}), flush=True)
        return now

    config = parse_merge_config(
        {
            "base": str(base),
            "candidates": [str(candidate)],
            "output": str(run),
            "method": {"operator": "task_arithmetic"},
            "schedule": {"anchor_iterations": 1, "max_iterations": 1},
            "runtime": {"residency": residency, "threads": os.cpu_count() or 1},
        }
    )
    # The operator is set here: a configuration with ARM would ask for a calibration file.
    now = time.perf_counter()
    inputs = open_inputs(config)
    layout, settings = inputs.layout, config.runtime
    groups = range(len(layout.groups))
    spec = ShardSpec(
        layout,
        groups,
        inputs.checkpoints,
        run,
        config.schedule,
        open_method(MethodSettings(), 1),
        "cpu",
        torch.bfloat16,
        settings.threads,
        settings.residency,
        life=state_life(config, 1, None),
    )
    shard = LayerShard(spec)
    generator = np.random.default_rng(0)
    lengths = generator.integers(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2, SAMPLES)
    vocabulary = int(layout.config.vocab_size)
    ids = [generator.integers(0, vocabulary, n, dtype=np.int32) for n in lengths]
    different, columns = unique_samples(MiniBatch(1, list(range(SAMPLES)), ids))
    micro = micro_batches(different, max_tokens=settings.micro_batch_tokens, max_samples=64)
    plan = plan_iteration(config.schedule, 1, 1)
    now = tell("open", now)
    shard.on("files", "check_weights")
    now = tell("check weights", now)
    # In the order in which the driver submits it.
    for chunk in spec.chunks:
        for index, batch in enumerate(micro):
            for state in plan.inputs:
                shard.forward(plan, chunk, len(different.token_ids), state, index, batch, None)
        for group in chunk:
            shard.merge(plan, group, columns)
    now = tell("iteration", now)
    model = run / "model"
    model.mkdir()
    sizes = int(settings.max_weight_file_gb * 1e9)
    exported = states.plan_export(layout.shapes, inputs.storage_dtypes, sizes)
    files = [SharedWeightFile(model / file.name, file.specs) for file in exported]
    for file in files:
        file.create()
    shard.on("states", "fill", 1, files)
    for file in files:
        file.sync()
    tell("final model", now)
    io = parse_io(Path("/proc/self/io").read_text(encoding="utf-8"))
    print(json.dumps({"io": io, "forward": shard.take_usage(0).forward_seconds}), flush=True)


def explain(code: int, errors: str, stages: Mapping[str, float]) -> str:
    """How the child ended, in a few words."""
    if code == 0:
        return "complete"
    after = list(stages)[-1] if stages else "its start"
    refused = ("not enough memory", "Cannot allocate memory", "MemoryError", "bad_alloc")
    known = any(text in errors for text in (*refused, "can't allocate", "os error 12"))
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    why = "memory refused" if known else f"exit code {code}: {last[:80]}"
    return f"{why}, after {after!r}"


def measure(
    residency: str, layers: int, limit_gib: float, base: Path, candidate: Path
) -> dict[str, Any]:
    """Run the child under the limit; returns a row of the table."""
    run = ROOT / f"memory-{layers}-{residency}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    forget_pages([base, candidate])
    limit = int(limit_gib * GIB)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", residency]
    command += ["--layers", str(layers), "--limit-gib", str(limit_gib)]
    started = time.perf_counter()
    with (run / "stderr.txt").open("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(  # noqa: S603 -- this very file
            command, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        watch = MemoryWatch(child.pid, 0.1, with_pss=True)
        output, _ = child.communicate()
        seconds = time.perf_counter() - started
        peaks = watch.stop()
        errors.seek(0)
        messages = errors.read()
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    stages = {line["stage"]: line["seconds"] for line in lines if "stage" in line}
    for line in lines:
        if "stage" in line:
            peak = line["peak"] / GIB
            print(f"  {line['stage']}: {line['seconds']:.1f} s, peak RSS by then {peak:.2f} GiB")
    nothing: dict[str, Any] = {"io": {}, "forward": 0.0}
    end = next((line for line in lines if "io" in line), nothing)
    io = end["io"]
    shutil.rmtree(run)
    gib = {name: round(value / GIB, 2) for name, value in peaks.items()}
    return {
        "residency": residency,
        "ended": explain(child.returncode, messages, stages),
        "limit, GiB": limit / GIB,
        "peak RSS, GiB": gib.get("peak_rss", 0.0),
        "private, GiB": gib.get("anonymous", 0.0),
        "PSS, GiB": gib.get("pss", 0.0),
        "counted by limit, GiB": gib.get("data", 0.0),
        "s": round(seconds, 1),
        "iteration, s": round(stages.get("iteration", 0.0), 1),
        "forward, s": round(end["forward"], 1),
        "read, GB": round(io.get("read_bytes", 0) / 1e9, 1),
        "written, GB": round(io.get("write_bytes", 0) / 1e9, 1),
    }


def needed_bytes(parameters: int) -> int:
    """Disk for two bfloat16 checkpoints, a float32 state and a bfloat16 model."""
    return parameters * (2 * 2 + 4 + 2)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=36, help="decoder layers")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="memory limit")
    parser.add_argument("--quick", action="store_true", help="2 layers, nothing is recorded")
    parser.add_argument("--clean", action="store_true", help="remove the checkpoints at the end")
    parser.add_argument("--child", choices=["disk", "device"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers = 2 if arguments.quick else arguments.layers
    base, candidate = (ROOT / f"qwen-3b-{layers}-{name}" for name in ("base", "candidate"))
    if arguments.child:
        limit = int(arguments.limit_gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        run = ROOT / f"memory-{layers}-{arguments.child}"
        merge_in_this_process(base, candidate, run, arguments.child)
        return 0
    from benchmarks.common import report

    parameters = 311_164_928 + layers * 77_077_504
    ROOT.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(ROOT).free
    if free < needed_bytes(parameters) * 1.1:
        print(f"too little disk: {free / 1e9:.0f} GB free", file=sys.stderr)
        return 1
    print(f"writing or reusing checkpoints of {parameters / 1e9:.2f} B parameters", flush=True)
    shape = {**SHAPE, "num_hidden_layers": layers}
    write_checkpoint(base, shape, seed=1)
    write_checkpoint(candidate, shape, seed=2, base=base)
    rows = []
    for residency in ("disk", "device"):
        rows.append(measure(residency, layers, arguments.limit_gib, base, candidate))
        print(rows[-1], flush=True)
    if arguments.clean:
        for path in (base, candidate):
            shutil.rmtree(path)
    if arguments.quick or layers != SHAPE["num_hidden_layers"]:
        print("a short run: nothing is recorded")
        return 0
    disk = rows[0]
    limit = arguments.limit_gib
    within = disk["ended"] == "complete" and disk["peak RSS, GiB"] <= limit
    report(
        "memory",
        f"ARM, one iteration, {parameters / 1e9:.2f} B parameters, base and one candidate in bf16, "
        f"{SAMPLES} samples of about {MEAN_TOKENS} tokens, one process; RLIMIT_DATA {limit:g} GiB",
        rows,
        [
            (
                f"disk residency completes within {limit:g} GiB, mapped pages included: "
                f"{disk['ended']}, {disk['peak RSS, GiB']} GiB",
                within,
            )
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

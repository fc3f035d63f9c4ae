"""Whole merges through Ray of random models, with what the GPU did meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.events import read_events
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.devices import GB
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.cluster.joining import ray_kept
from arm_ray.runtime.merge.run import merge
from benchmarks.random_models import SHAPES, write_checkpoint

CANDIDATES = 2
SAMPLES = 64
ITERATIONS = 6
_WORDS = 256


@dataclass(frozen=True)
class Case:
    """A merge.

    Attributes:
        model: A name from `SHAPES`.
        layers: Of the model; None: as many as it has.
        operator: `arm` or `task_arithmetic`.
        residency: `runtime.residency`.
        iterations: How many.
        twice: Whether it is run again, to compare bits.
    """

    model: str
    layers: int | None
    operator: str = "arm"
    residency: str = "device"
    iterations: int = ITERATIONS
    twice: bool = False

    @property
    def name(self) -> str:
        """For people."""
        layers = "" if self.layers is None else f", {self.layers} layers"
        return f"{self.model}{layers}, {self.operator}, {self.residency}"

    @property
    def shape(self) -> dict[str, Any]:
        """Its `config.json`."""
        shape = SHAPES[self.model]
        return shape if self.layers is None else {**shape, "num_hidden_layers": self.layers}

    def inputs(self, root: Path) -> Path:
        """Where its base, candidates and data are; cases of the same models share them."""
        return root / f"{self.model}-{self.layers or 'all'}"


# Of a 7B's 28 layers so many that all residencies fit one machine of 80 and 128 GB of memory.
CASES = [
    Case("1.5b", None, "task_arithmetic"),
    Case("1.5b", None, iterations=3, twice=True),
    Case("7b", 8),
    Case("7b", 8, residency="host", iterations=3),
    Case("7b", 8, residency="disk", iterations=3),
]
QUICK_CASES = [
    Case("tiny", None, "task_arithmetic", iterations=2),
    Case("tiny", None, iterations=2, twice=True),
    Case("tiny", None, residency="disk", iterations=2),
]


@dataclass
class GpuWatch:
    """Samples a GPU with the driver's own tool, ten times a second.

    Attributes:
        busy: Fractions of the time in which a kernel ran, as the driver counts them.
        first_bytes: Memory in use at first, by other processes.
        peak_bytes: Most memory in use beside that.
    """

    busy: list[tuple[float, float]] = field(default_factory=list)
    first_bytes: int | None = None
    peak_bytes: int = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sample within the context; without a GPU do nothing."""
        if not torch.cuda.is_available():
            yield
            return
        query = ("--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")
        command = ("nvidia-smi", *query, "--loop-ms=100", "--id=0")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            process.terminate()
            process.wait()
            thread.join()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            percent, mebibytes = line.split(",")
            self.busy.append((time.time(), float(percent) / 100.0))
            used = int(mebibytes) << 20
            self.first_bytes = used if self.first_bytes is None else self.first_bytes
            self.peak_bytes = max(self.peak_bytes, used - self.first_bytes)

    def busy_between(self, start: float, end: float) -> float | None:
        """Mean of `busy` in an interval; None where nothing was sampled."""
        found = [value for at, value in self.busy if start <= at <= end]
        return sum(found) / len(found) if found else None


def write_inputs(case: Case, root: Path, tokens: int) -> Path:
    """Base, candidates and calibration data of a case, unless they are there."""
    directory = case.inputs(root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = directory / "base"
    write_checkpoint(base, case.shape, 1, device=device)
    for number in range(1, CANDIDATES + 1):
        candidate = directory / f"candidate-{number}"
        write_checkpoint(candidate, case.shape, 1 + number, base, device=device)
    words = {f"w{number}": number for number in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106 -- a word
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "w1"})
    fast.save_pretrained(base)
    generator = np.random.default_rng(0)
    with (directory / "calibration.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(SAMPLES * ITERATIONS):
            text = " ".join(f"w{n}" for n in generator.integers(2, _WORDS, tokens))
            file.write(f'{{"text": "{text}"}}\n')
    return directory


def configuration(case: Case, inputs: Path, output: Path, tokens: int) -> MergeConfig:
    """The merge of a case."""
    candidates = [str(inputs / f"candidate-{n}") for n in range(1, CANDIDATES + 1)]
    needs_data = case.operator != "task_arithmetic"
    data = {
        "path": str(inputs / "calibration.jsonl"),
        "batch_size": SAMPLES,
        "max_length": tokens,
    }
    return parse_merge_config(
        {
            "base": str(inputs / "base"),
            "candidates": candidates,
            "output": str(output),
            "keep_states": "none",
            "method": {"operator": case.operator, "coefficient": 0.7},
            "schedule": {
                "anchor_iterations": min(3, case.iterations),
                "max_iterations": case.iterations,
                "tolerance": 0.0,
                "step": "fixed",
            },
            **({"calibration": data} if needs_data else {}),
            "runtime": {
                "layer_shards": 1,
                "residency": case.residency,
                "micro_batch_tokens": 8192,
                "threads": 8 if torch.cuda.is_available() else 1,
            },
        }
    )


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on, as Linux calls it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if path.is_relative_to(mount[1])]
    return max(above, key=lambda mount: len(mount[1]))[2]


def measure(case: Case, root: Path, runs: Path, tokens: int, console: Console) -> dict[str, Any]:
    """Merge as a case says; returns its row."""
    started = time.perf_counter()
    inputs = write_inputs(case, root, tokens)
    written_s = time.perf_counter() - started
    output = runs / "run"
    config = configuration(case, inputs, output, tokens)
    row = _run(case, config, tokens, console)
    if case.twice:
        first = _digest(output / "model")
        shutil.rmtree(output)
        _run(case, config, tokens, console)
        row["same bits twice"] = _digest(output / "model") == first
    shutil.rmtree(output)
    return {**row, "inputs written, s": written_s}


def _run(case: Case, config: MergeConfig, tokens: int, console: Console) -> dict[str, Any]:
    is_gpu = torch.cuda.is_available()
    memory = torch.cuda.mem_get_info()[1] / GB if is_gpu else None
    cluster = make_cluster(config.runtime, gpus=1 if is_gpu else None, gpu_memory_gb=memory)
    plan = make_plan(config, cluster, tokens)
    watch = GpuWatch()
    started, begun = time.perf_counter(), time.time()
    with watch.watching():
        outcome = merge(config, console=console)
    seconds = time.perf_counter() - started
    events = read_events(outcome.run / "events.jsonl")
    times = {event["event"]: event["time"] for event in events}
    iterations = [event for event in events if event["event"] == "iteration_finished"]
    loop = sum(event["seconds"] for event in iterations)
    planned = plan.shards[0].memory.limiting.total
    return {
        "merge": case.name,
        "all, s": seconds,
        "start, s": times["run_started"] - begun,
        "iterations": len(iterations),
        "iterations, s": loop,
        "planned, s": plan.simulation.makespan_s,
        "forward, s": sum(event["forward_seconds"] for event in iterations),
        "merging, s": sum(event["merge_seconds"] for event in iterations),
        "written, GB": sum(event["bytes_written"] for event in iterations) / GB,
        "model, s": sum(e["seconds"] for e in events if e["event"] == "model_written"),
        "GPU busy, %": _percent(watch.busy_between(times["run_started"], iterations[-1]["time"])),
        "GPU peak, GB": watch.peak_bytes / GB,
        "planned, GB": planned / GB,
        "same bits twice": "",
    }


def _percent(share: float | None) -> float | str:
    return "" if share is None else 100.0 * share


def _digest(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def measure_all(
    root: Path, runs: Path, *, quick: bool, until: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row for each case; those are left out that would begin after `until`.

    Args:
        root: Where inputs go.
        runs: Where merged states and models go.
        quick: Tiny models.
        until: `time.monotonic()` after which nothing more begins.
        say: Called with a line about a case that has no row.
    """
    tokens = 16 if quick else 1024
    console = Console(width=120)
    cases = QUICK_CASES if quick else CASES
    with ray_kept(8 if torch.cuda.is_available() else 2, {"job": "benchmark"}):
        for inputs, group in groupby(cases, lambda case: case.inputs(root)):
            for case in group:
                if time.monotonic() > until:
                    say(f"left out, for want of time: {case.name}")
                    continue
                try:
                    yield measure(case, root, runs, tokens, console)
                except Exception as error:  # the other cases may work
                    say(f"FAILED {case.name}: {type(error).__name__}: {error}")
            shutil.rmtree(inputs, ignore_errors=True)

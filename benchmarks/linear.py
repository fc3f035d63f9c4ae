"""A linear merge against mergekit: seconds and peak memory, both in one process and on one file.

Base and two checkpoints of SmolLM2-135M in bfloat16, from `make demo`. Timed is the call that
merges, from opening the checkpoints to the complete weight file, with the page cache warm; starting
Python, importing and, for arm_ray, Ray are not in it. mergekit has a virtual environment of its own
(`runs/bench/mergekit-venv`), made at the first run from `benchmarks/mergekit/requirements.txt`.

`plain loop` is a yardstick: read a tensor of each checkpoint, add, cast, keep the results, save
them at the end. It checks nothing, compares nothing and does not synchronise the file to disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import SharedWeightFile
from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.merging.method import open_method
from arm_ray.model.imports import set_own_process
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.shards.facts import NOTHING_KNOWN, ModelFacts, run_rounds
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.schedule import plan_iteration
from benchmarks.common import demo_candidates, report
from benchmarks.memory import MemoryWatch

ROOT = Path("runs/bench")
BASE = Path("runs/smollm2/base")
CANDIDATES = tuple(Path(path) for path in demo_candidates())
MERGEKIT = ROOT / "mergekit-venv"
THREADS = 2
MEMORY_GOAL = 0.5


@dataclass(frozen=True)
class Case:
    """One merge, in the words of both programs.

    Attributes:
        name: In the table.
        method: arm_ray's `method` section.
        merge_method: mergekit's name for it.
        model_parameters: mergekit's parameters of each candidate.
        parameters: mergekit's parameters of the merge.
        dtype: mergekit's number format of the computation; arm_ray's is float32.
        formula: The plain loop: what becomes of a tensor of the base and of the candidates; None:
            there is none.
        time_goal: The largest part of mergekit's time.
        is_comparable: Whether both programs mean the same numbers.
        has_base: Whether mergekit is given the base; else the first candidate takes its place.
    """

    name: str
    method: Mapping[str, Any]
    merge_method: str
    model_parameters: Mapping[str, Any]
    formula: Callable[[Tensor, Sequence[Tensor]], Tensor] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    time_goal: float = 0.6
    is_comparable: bool = True
    has_base: bool = True


def _task_arithmetic(base: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    return base + 0.35 * sum((c - base for c in candidates), torch.zeros(()))


# One entry for each operator that mergekit has too.
CASES = [
    Case(
        "task_arithmetic",
        {"operator": "task_arithmetic", "coefficient": 0.7},
        "task_arithmetic",
        {"weight": 0.35},
        _task_arithmetic,
    ),
    # mergekit trims tensor by tensor and takes + where signs cancel.
    Case(
        "ties",
        {
            "operator": "ties",
            "coefficient": 0.7,
            "ties": {"keep": 0.2, "scope": "per_tensor", "zero_sign": "positive"},
        },
        "ties",
        {"weight": 1.0, "density": 0.2},
        parameters={"normalize": True, "lambda": 0.7},
        time_goal=0.3,
    ),
    # The original's threshold over the whole model, which mergekit does not have.
    Case(
        "ties, global",
        {"operator": "ties", "coefficient": 0.7, "ties": {"keep": 0.2}},
        "ties",
        {"weight": 1.0, "density": 0.2},
        parameters={"normalize": True, "lambda": 0.7},
        time_goal=0.3,
        is_comparable=False,
    ),
    # Other random numbers, so other results.
    Case(
        "dare",
        {"operator": "dare", "coefficient": 0.7, "dare": {"drop_rate": 0.9}},
        "dare_linear",
        {"weight": 0.35, "density": 0.1},
        time_goal=0.6,
        is_comparable=False,
    ),
    Case(
        "slerp",
        {"operator": "slerp", "slerp": {"t": 0.5}},
        "slerp",
        {},
        parameters={"t": 0.5},
        has_base=False,
    ),
]


def mergekit_config(case: Case) -> dict[str, Any]:
    """The case as mergekit's configuration."""
    return {
        "merge_method": case.merge_method,
        "base_model": str((BASE if case.has_base else CANDIDATES[0]).resolve()),
        "models": [
            {"model": str(path.resolve()), "parameters": dict(case.model_parameters)}
            for path in CANDIDATES
        ],
        "parameters": dict(case.parameters),
        "dtype": case.dtype,
        "out_dtype": "bfloat16",
    }


def arm_ray_config(case: Case, output: Path) -> MergeConfig:
    """The case as arm_ray's configuration: one anchored iteration from the base."""
    return parse_merge_config(
        {
            "base": str(BASE),
            "candidates": [str(path) for path in CANDIDATES],
            "output": str(output),
            "keep_states": "none",
            "method": dict(case.method),
            "schedule": {"anchor_iterations": 1, "max_iterations": 1},
            "runtime": {"threads": THREADS},
        }
    )


def merge_ours(case: Case, output: Path) -> dict[str, float]:
    """Merge as the driver and one layer shard do, without Ray; returns seconds by stage."""
    config = arm_ray_config(case, output)
    clock = [time.perf_counter()]
    inputs = open_inputs(config)
    clock.append(time.perf_counter())
    layout = inputs.layout
    spec = ShardSpec(
        layout,
        range(len(layout.groups)),
        inputs.checkpoints,
        output,
        config.schedule,
        open_method(config.method, len(config.candidates)),
        "cpu",
        inputs.compute_dtype,
        THREADS,
    )
    output.mkdir(parents=True)
    exported = states.plan_export(layout.shapes, inputs.storage_dtypes, 5 * 10**9)
    files = [SharedWeightFile(output / file.name, file.specs) for file in exported]
    for file in files:
        file.create()
    shard = LayerShard(spec)
    plan = plan_iteration(config.schedule, len(config.candidates), 1)

    def measure(number: int, known: ModelFacts) -> list[dict[str, Tensor]]:
        return [shard.measure(plan, group, None, number, known) for group in spec.groups]

    facts = run_rounds(spec.method, len(plan.contributors), NOTHING_KNOWN, measure)
    for group in spec.groups:
        shard.merge_linear([plan], group, frozenset(), files, facts)
    for file in files:
        file.sync()
    clock.append(time.perf_counter())
    return {"open": clock[1] - clock[0], "merge": clock[2] - clock[1]}


def merge_plain(case: Case, output: Path) -> dict[str, float]:
    """The same by a plain loop."""
    started = time.perf_counter()
    paths = [str(path / "model.safetensors") for path in (BASE, *CANDIDATES)]
    result = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        for name in files[0].keys():  # noqa: SIM118 -- not a dictionary
            base, *others = (file.get_tensor(name).float() for file in files)
            assert case.formula is not None
            result[name] = case.formula(base, others).to(torch.bfloat16)
    output.mkdir(parents=True)
    save_file(result, output / "model.safetensors", {"format": "pt"})
    return {"merge": time.perf_counter() - started}


PROGRAMS = {"arm_ray": merge_ours, "plain loop": merge_plain}


def child(program: str, case: Case, output: Path, repeats: int) -> None:
    """Merge some times in this process, and print the seconds."""
    # As `arm-ray merge` has it.
    set_own_process()
    torch.set_num_threads(THREADS)
    stages = []
    for _ in range(repeats):
        shutil.rmtree(output, ignore_errors=True)
        stages.append(PROGRAMS[program](case, output))
    seconds = [sum(stage.values()) for stage in stages]
    print(json.dumps({"seconds": seconds, "stages": stages}))


def prepare_mergekit() -> Path:
    """Make mergekit's virtual environment unless it is there; returns its Python."""
    python = MERGEKIT / "bin" / "python"
    ready = MERGEKIT / ".ready"
    if not ready.exists():
        print("installing mergekit", flush=True)
        venv.create(MERGEKIT, with_pip=True, clear=True)
        requirements = Path(__file__).parent / "mergekit" / "requirements.txt"
        install = [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)]
        subprocess.run(install, check=True)  # noqa: S603 -- pinned packages
        ready.touch()
    return python


def run_child(program: str, case: Case, output: Path, repeats: int) -> dict[str, Any]:
    """Run a program in a process of its own; returns what it printed, and its memory peaks."""
    if program == "mergekit":
        config = ROOT / f"mergekit-{case.name}.yml"
        # JSON is YAML.
        config.write_text(json.dumps(mergekit_config(case), indent=2), encoding="utf-8")
        script = Path(__file__).parent / "mergekit" / "run.py"
        command = [str(prepare_mergekit()), str(script), str(config), str(output)]
        command += ["--threads", str(THREADS)]
    else:
        command = [sys.executable, "-m", "benchmarks.linear", "--child", program]
        command += ["--case", case.name, "--output", str(output)]
    command += ["--repeats", str(repeats)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    # Memory is sampled in the runs that are not timed.
    watch = MemoryWatch(process.pid, 0.005) if repeats == 1 else None
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{program} ended with {process.returncode}")
    content: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {**content, "peaks": watch.stop() if watch else {}}


def steps_apart(one: Tensor, other: Tensor) -> Tensor:
    """How many representable bfloat16 numbers lie between, elementwise; int32."""

    def ordinal(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinal(one) - ordinal(other)).abs()


def compare(one: Path, other: Path) -> dict[str, float]:
    """Two bfloat16 models, tensor by tensor.

    Returns:
        `relative`: the largest difference, over the largest number of its tensor. `steps`: the
        largest, in bfloat16 steps, among numbers of at least 1e-4. `equal`: share of equal numbers.

    Raises:
        ValueError: The models do not have the same tensors.
    """
    relative, steps, equal, total = 0.0, 0, 0, 0
    paths = [str(path / "model.safetensors") for path in (one, other)]
    with safe_open(paths[0], "pt") as left, safe_open(paths[1], "pt") as right:
        if set(left.keys()) != set(right.keys()):
            raise ValueError(f"different tensors: {set(left.keys()) ^ set(right.keys())}")
        for name in left.keys():  # noqa: SIM118 -- not a dictionary
            a, b = left.get_tensor(name), right.get_tensor(name)
            difference = (a.float() - b.float()).abs().max()
            relative = max(relative, float(difference / b.float().abs().max()))
            apart = steps_apart(a, b)
            equal, total = equal + int((apart == 0).sum()), total + apart.numel()
            # Near zero, rounding of the float32 sum is many steps of a tiny number.
            steps = max(steps, int(torch.where(b.abs() >= 1e-4, apart, 0).max()))
    return {"relative": relative, "steps": float(steps), "equal": equal / total}


def measure(case: Case, rounds: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table for one case, and how far arm_ray's result is from mergekit's."""
    programs = ["mergekit", "arm_ray"] + (["plain loop"] if case.formula else [])
    output = {program: ROOT / f"linear-{program.replace(' ', '-')}" for program in programs}
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    stages: list[dict[str, float]] = []
    versions: dict[str, dict[str, str]] = {}
    # In turn, so that what else the machine does meets all of them.
    for _ in range(rounds):
        for program in programs:
            found = run_child(program, case, output[program], 1 + repeats)
            seconds[program] += found["seconds"][1:]
            if program == "arm_ray":
                stages += found["stages"][1:]
            versions[program] = found.get("versions", {})
    rows = []
    for program in programs:
        runs = [run_child(program, case, output[program], 1) for _ in range(2)]
        rows.append(
            {
                "case": case.name,
                "program": " ".join([program, versions[program].get(program, "")]).strip(),
                "median, s": statistics.median(seconds[program]),
                "fastest, s": min(seconds[program]),
                "first call, s": min(run["seconds"][0] for run in runs),
                "peak RSS, MB": round(max(run["peaks"]["peak_rss"] for run in runs) / 1e6),
                "private, MB": round(max(run["peaks"]["anonymous"] for run in runs) / 1e6),
            }
        )
    for stage in stages[0]:
        middle = statistics.median(s[stage] for s in stages)
        print(f"arm_ray, {stage}: {middle:.2f} s", flush=True)
    compared = compare(output["arm_ray"], output["mergekit"]) if case.is_comparable else {}
    print(f"arm_ray against mergekit: {compared}", flush=True)
    for path in output.values():
        shutil.rmtree(path)
    return rows, compared


def goals(
    case: Case, rows: Sequence[Mapping[str, Any]], compared: Mapping[str, float]
) -> list[tuple[str, bool]]:
    """The goals of one case, with what was measured."""
    by_program = {row["program"].split()[0]: row for row in rows}
    ours, theirs = by_program["arm_ray"], by_program["mergekit"]
    name = ours["case"]
    result = []
    for what, column, limit in (
        ("time", "median, s", case.time_goal),
        ("peak memory", "peak RSS, MB", MEMORY_GOAL),
    ):
        ratio = ours[column] / theirs[column]
        result.append(
            (f"{name}: at most {limit} of mergekit's {what}: {ratio:.2f}", ratio <= limit)
        )
    if not compared:
        return result
    same = f"{name}: equal to mergekit's up to one bfloat16 step: "
    same += f"{compared['steps']:.0f}, {compared['equal']:.4%} of the numbers equal"
    return [*result, (same, compared["steps"] <= 1)]


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, nothing is recorded")
    parser.add_argument("--only", help="one case; nothing is recorded")
    parser.add_argument("--child", choices=list(PROGRAMS), help=argparse.SUPPRESS)
    parser.add_argument("--case", default=CASES[0].name, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "linear", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case = next(case for case in CASES if case.name == arguments.case)
        child(arguments.child, case, arguments.output, arguments.repeats)
        return 0
    missing = [str(path) for path in (BASE, *CANDIDATES) if not path.is_dir()]
    if missing:
        print(f"not there: {', '.join(missing)}; `make demo` makes them", file=sys.stderr)
        return 1
    ROOT.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    aims: list[tuple[str, bool]] = []
    cases = [case for case in CASES if arguments.only in (None, case.name)]
    for case in cases:
        found, compared = measure(case, 1 if arguments.quick else 2, 1 if arguments.quick else 2)
        rows += found
        aims += goals(case, found, compared)
    if arguments.quick or arguments.only:
        for line in (*rows, *aims, "a short run: nothing is recorded"):
            print(line)
        return 0
    title = f"SmolLM2-135M, base and two checkpoints in bf16, {THREADS} threads, page cache warm"
    report("linear", title, rows, aims)
    return 0


if __name__ == "__main__":
    sys.exit(main())

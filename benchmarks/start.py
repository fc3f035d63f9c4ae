"""How long a merge takes that has next to nothing to merge: what a start costs.

Task Arithmetic over models of three small layers, by the command: without Ray, and with two layer
shards on a Ray of its own. Beside them, in the same rounds, `import torch` alone and what no merge
with two actors can be shorter than: a Ray that starts, two actors that import torch, and its end.
Each is a process of its own, timed from outside. Machines change their speed: ratios count.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import report
from benchmarks.random_models import write_checkpoint

_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "dtype": "bfloat16",
}
_TORCH = "import torch"
_RAY = """
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=1)
class Actor:
    def work(self):
        import torch
        return torch.get_num_threads()
ray.get([actor.work.remote() for actor in [Actor.remote(), Actor.remote()]])
ray.shutdown()
"""
_CASES = {
    "import torch": None,
    "Ray, and two actors that import torch": None,
    "merge, no Ray": 1,
    "merge, two layer shards": 2,
}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in _CASES}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_checkpoint(root / "base", _MODEL, seed=0)
        for seed in (1, 2):
            write_checkpoint(root / f"checkpoint-{seed}", _MODEL, seed, root / "base")
        # One round more than counts: files come from the disk in the first.
        for round_ in range(options.repeats + 1):
            for name in _CASES:
                seconds = _seconds(name, root)
                if round_:
                    found[name].append(seconds)
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    torch, floor = list(median.values())[:2]
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "s": round(median[name], 2),
            "shortest": round(min(seconds), 2),
            "longest": round(max(seconds), 2),
            "to import torch": round(median[name] / torch, 2),
        }
        for name, seconds in found.items()
    ]
    alone, with_ray = list(median.values())[2:]
    goals = [
        (f"merge without Ray below 6 s: {alone:.1f} s", alone < 6.0),
        (f"merge with two layer shards below 12 s: {with_ray:.1f} s", with_ray < 12.0),
        (f"of Ray and its actors alone below 1.6: {with_ray / floor:.2f}", with_ray < 1.6 * floor),
    ]
    report("start", "From the command to its end, in seconds", rows, goals)


def _seconds(name: str, root: Path) -> float:
    shards, run = _CASES[name], root / "run"
    if shards is None:
        command = [sys.executable, "-c", _TORCH if name == "import torch" else _RAY]
    else:
        shutil.rmtree(run, ignore_errors=True)
        config = {
            "base": str(root / "base"),
            "candidates": [str(root / f"checkpoint-{seed}") for seed in (1, 2)],
            "output": str(run),
            "method": {"operator": "task_arithmetic"},
            "runtime": {"layer_shards": shards},
        }
        file = root / "merge.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "arm_ray.cli", "merge", str(file)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - of this file
    seconds = time.perf_counter() - started
    if shards is not None and not (run / "model").is_dir():
        raise SystemExit(f"{name}: there is no model")
    return seconds


if __name__ == "__main__":
    main()

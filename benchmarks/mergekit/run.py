"""Merge with mergekit some times and print the seconds of each call; runs in mergekit's own venv.

Not imported by anything: `benchmarks/linear.py` starts it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration  # type: ignore[import-not-found, unused-ignore]
from mergekit.merge import MergeOptions, run_merge  # type: ignore[import-not-found, unused-ignore]


def main() -> None:
    """Read a configuration, merge, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    content = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    config = MergeConfiguration.model_validate(content)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    seconds = []
    for _ in range(arguments.repeats):
        shutil.rmtree(arguments.output, ignore_errors=True)
        started = time.perf_counter()
        run_merge(config, str(arguments.output), options)
        seconds.append(time.perf_counter() - started)
    versions = {n: metadata.version(n) for n in ("mergekit", "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()

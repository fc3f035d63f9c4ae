"""Supervised fine-tuning on Ray Train: a checkpoint series to merge.

::

    python -m arm_ray.jobs.sft CONFIG.yaml [key=value ...]
    ray job submit -- python -m arm_ray.jobs.sft /data/sft.yaml

See `docs/training.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from arm_ray.jobs.training import run_job
from arm_ray.training.config import SftConfig, load_training_config


def load_config(path: Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Read a YAML file and apply `key=value` overrides to it.

    Raises:
        ConfigError: The file is missing or no mapping, or a key or value is wrong.
    """
    return load_training_config(SftConfig, path, overrides)


def _train(path: Path, overrides: Sequence[str]) -> None:
    config = load_config(path, overrides)
    # Heavy imports come after validation, so that a typing error is reported at once.
    from arm_ray.runtime.train.run import run_sft

    run_sft(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    return run_job("arm_ray.jobs.sft", _train, arguments)


if __name__ == "__main__":
    sys.exit(main())

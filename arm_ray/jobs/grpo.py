"""Reinforcement learning with GRPO on Ray Train: a checkpoint series to merge.

::

    python -m arm_ray.jobs.grpo CONFIG.yaml [key=value ...]

See `docs/training.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from arm_ray.jobs.training import run_job
from arm_ray.training.config import GrpoConfig, load_training_config


def _train(path: Path, overrides: Sequence[str]) -> None:
    config = load_training_config(GrpoConfig, path, overrides)
    # Heavy imports come after validation, so that a typing error is reported at once.
    from arm_ray.runtime.train.run import run_grpo

    run_grpo(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    return run_job("arm_ray.jobs.grpo", _train, arguments)


if __name__ == "__main__":
    sys.exit(main())

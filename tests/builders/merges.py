"""Merges that say nothing, and the states that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from arm_ray.config import MergeConfig
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.checkpoints import load_all


def run(config: MergeConfig, **options: Any) -> MergeOutcome:
    return merge(config, console=Console(quiet=True), **options)


def state(config: MergeConfig, iteration: int) -> dict[str, torch.Tensor]:
    return load_all(Path(config.output) / "states" / f"{iteration:04d}")

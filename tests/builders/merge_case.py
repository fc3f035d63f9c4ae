"""The inputs of a merge on disk, and configurations for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arm_ray.config import MergeConfig, parse_merge_config
from tests.builders.models import fine_tuned, save, save_tokenizer, tiny_model, write_texts


class MergeCase:
    """A base, candidates and calibration texts on disk, and configurations for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.candidates: list[Path] = []

    def make(
        self,
        family: str = "smollm2",
        count: int = 2,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        num_layers: int = 3,
        rows: int = 24,
        sizes: dict[str, int] | None = None,
    ) -> MergeCase:
        """Write the checkpoints and the calibration file."""
        base = tiny_model(family, seed=1, num_layers=num_layers, sizes=sizes)
        save_tokenizer(save(base, self.root / "base", dtype, max_shard_size))
        for i in range(count):
            path = self.root / f"checkpoint-{10 * (i + 1)}"
            self.candidates.append(save(fine_tuned(base, seed=10 + i), path, dtype, max_shard_size))
        write_texts(self.root / "calibration.jsonl", rows)
        return self

    def content(self, output: str = "run") -> dict[str, Any]:
        """Configuration content: 8 samples an iteration, 2 anchored iterations and 2 of window."""
        return {
            "base": str(self.root / "base"),
            "candidates": [str(path) for path in self.candidates],
            "output": str(self.root / output),
            "keep_states": "all",
            "calibration": {
                "path": str(self.root / "calibration.jsonl"),
                "batch_size": 8,
                "max_length": 32,
            },
            "schedule": {
                "anchor_iterations": 2,
                "max_iterations": 4,
                "tolerance": 0.0,
                "step": "fixed",
            },
            "runtime": {"layer_shards": 1, "micro_batch_tokens": 96},
        }

    def config(self, *overrides: str, output: str = "run") -> MergeConfig:
        """A configuration with overrides."""
        return parse_merge_config(self.content(output), overrides)

"""The content of a pipeline's configuration, and its data."""

from __future__ import annotations

import json
from typing import Any

from tests.builders.merge_case import MergeCase
from tests.builders.models import WORDS


def content(case: MergeCase, **others: Any) -> dict[str, Any]:
    rows = [
        {"prompt": f"{WORDS[i % 12]} {i} {WORDS[i % 7]} apples and", "completion": f" {i} red"}
        for i in range(60)
    ]
    source = case.root / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "held", "type": "loss", "path": str(case.root / "out/data/held.jsonl")}
    return {
        "base": str(case.root / "base"),
        "output": str(case.root / "out"),
        "data": {
            "path": str(source),
            "shares": {"train": 0.6, "calibration": 0.2, "held": 0.2},
        },
        "train": {
            "learning_rate": 1.0e-3,
            "batch_size": 4,
            "steps": 6,
            "save_steps": 2,
            "max_length": 48,
            "save_dtype": "float32",
            "runtime": {"workers": 1, "cpus_per_worker": 1},
        },
        "candidates": [2, 4],
        "calibration": {"batch_size": 8, "max_length": 48},
        "merges": {
            "ARM": {"schedule": {"anchor_iterations": 1, "max_iterations": 1, "step": "fixed"}},
            "mean of two": {
                "method": {"operator": "task_arithmetic"},
                "schedule": {"anchor_iterations": 1, "max_iterations": 1, "step": "fixed"},
            },
        },
        "evaluation": {
            "tasks": [task],
            "engine": {"kv_cache_gb": 0.05, "max_model_len": 64, "dtype": "float32"},
            "resamples": 200,
        },
        "train_on": True,
        **others,
    }

"""The content of a study's configuration, and its data."""

from __future__ import annotations

import json
from typing import Any

from tests.builders.merge_case import MergeCase
from tests.builders.models import WORDS, write_texts


def content(case: MergeCase, **others: Any) -> dict[str, Any]:
    """Two operators over the checkpoints of a run that is there; scored by a held-out loss."""
    task = {"name": "held", "type": "loss", "path": str(write_texts_of(case))}
    return {
        "output": str(case.root / "out"),
        "base": str(case.root / "base"),
        "series": {
            "given": {
                "checkpoints": {10 * (i + 1): str(path) for i, path in enumerate(case.candidates)}
            }
        },
        "merge": {
            "calibration": {
                "path": str(case.root / "calibration.jsonl"),
                "batch_size": 8,
                "max_length": 32,
            },
            "schedule": {"anchor_iterations": 1, "max_iterations": 1, "step": "fixed"},
            "runtime": {"layer_shards": 1},
        },
        "axes": {
            "candidates": [[10, 20]],
            "operator": {
                "ta": {"method.operator": "task_arithmetic"},
                "arm": {"method.operator": "arm"},
            },
        },
        "evaluation": {
            "tasks": [task],
            "engine": {"kv_cache_gb": 0.05, "max_model_len": 64, "dtype": "float32"},
            "resamples": 200,
        },
        **others,
    }


def write_texts_of(case: MergeCase) -> Any:
    """Held-out texts of the case."""
    return write_texts(case.root / "held.jsonl", 6)


def training(case: MergeCase, **others: Any) -> dict[str, Any]:
    """The keys of a training of four steps."""
    rows = [
        {"prompt": f"{WORDS[i % 12]} {i} {WORDS[i % 7]} apples and", "completion": f" {i} red"}
        for i in range(30)
    ]
    source = case.root / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "learning_rate": 1.0e-3,
        "batch_size": 4,
        "steps": 4,
        "save_steps": 1,
        "max_length": 48,
        "save_dtype": "float32",
        "data": {"path": str(source)},
        "runtime": {"workers": 1, "cpus_per_worker": 1},
        **others,
    }

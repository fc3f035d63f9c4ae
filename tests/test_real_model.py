"""ARM on the real SmolLM2-135M against the plain program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from arm_ray.config import parse_merge_config
from arm_ray.runtime.merge.run import merge
from tests.builders import reference
from tests.builders.checkpoints import load_all, relative_error
from tests.builders.real_models import calibration_texts, moved_copy, real_base

pytestmark = [pytest.mark.minutes, pytest.mark.usefixtures("shards_in_process")]


def test_arm_on_smollm2_equals_the_plain_program(tmp_path: Path) -> None:
    base = real_base(tmp_path / "base")
    data = calibration_texts(tmp_path / "texts.jsonl")
    content = {
        "base": str(base),
        "candidates": [str(moved_copy(base, tmp_path / f"c{seed}", seed)) for seed in (1, 2)],
        "output": str(tmp_path / "run"),
        "calibration": {"path": str(data), "batch_size": 8, "max_length": 128},
        "schedule": {
            "anchor_iterations": 1,
            "max_iterations": 2,
            "tolerance": 0.0,
            "step": "fixed",
        },
        "precision": {"compute_dtype": "float32"},
        "runtime": {"layer_shards": 2},
    }
    outcome = merge(parse_merge_config(content), console=Console(quiet=True))
    expected = reference.streaming_merge(content)
    for iteration, weights in enumerate(expected, start=1):
        found = load_all(outcome.run / "states" / f"{iteration:04d}")
        assert found.keys() == weights.keys()
        worst = max(relative_error(found[name], tensor) for name, tensor in weights.items())
        assert worst < 1e-5, iteration
    assert outcome.model is not None
    model, report = AutoModelForCausalLM.from_pretrained(
        outcome.model, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16

"""ARM on the real SmolLM2-135M against the plain program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from arm_ray.config import parse_merge_config
from arm_ray.runtime.merge.run import merge
from tests.builders import reference
from tests.builders.checkpoints import load_all, relative_error
from tests.builders.paths import ROOT

pytestmark = [pytest.mark.minutes, pytest.mark.usefixtures("shards_in_process")]
EXAMPLE = ROOT / "examples" / "smollm2"


def real_base(directory: Path) -> Path:
    """The base that the demo made, or a new one."""
    made = ROOT / "runs" / "smollm2" / "base"
    if (made / "model.safetensors").exists():
        return made
    script = [sys.executable, str(EXAMPLE / "prepare_base.py"), "--output", str(directory)]
    subprocess.run(script, check=True, cwd=ROOT, capture_output=True, timeout=300)
    return directory


def moved_copy(base: Path, path: Path, seed: int) -> Path:
    """A candidate: every number of the base moved by about a thousandth, saved in bfloat16."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 5e-3 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_arm_on_smollm2_equals_the_plain_program(tmp_path: Path) -> None:
    base = real_base(tmp_path / "base")
    lines = (EXAMPLE / "data" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
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

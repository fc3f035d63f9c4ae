"""SmolLM2-135M as the demo has it, and copies of it that stand for fine-tuned ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.builders.paths import ROOT

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


def calibration_texts(path: Path, count: int = 12) -> Path:
    """The first texts of the demo's calibration data."""
    lines = (EXAMPLE / "data" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines[:count])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path

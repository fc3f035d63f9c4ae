"""LoRA adapters over a base, and the dense models that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints import peft
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.model.checks import layout_of
from tests.builders.merge_case import MergeCase
from tests.builders.models import tiny_model
from tests.builders.tensors import gaussian

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 2, 4


def save_base(path: Path, family: str) -> Checkpoint:
    model: Any = tiny_model(family, seed=1)
    model.to(torch.bfloat16).save_pretrained(path)
    return open_checkpoint(path)


def factors(base: Checkpoint, module: str, rank: int, seed: int = 0) -> Tensors:
    """A and B of one linear module, under PEFT's names."""
    rows, columns = base.tensors[f"{module}.weight"].shape
    return {
        f"{peft.PREFIX}{module}.lora_A.weight": gaussian(rank, columns, seed=seed),
        f"{peft.PREFIX}{module}.lora_B.weight": gaussian(rows, rank, seed=seed + 1),
    }


def write_adapter(path: Path, tensors: Tensors, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **settings}
    (path / peft.CONFIG_NAME).write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / WEIGHTS_NAME)
    return path


def base_weights(case: MergeCase) -> Tensors:
    return {n: t.clone() for n, t in load_file(case.root / "base" / "model.safetensors").items()}


def write_adapters(case: MergeCase, rank: int = RANK) -> list[Path]:
    """Two adapters of all linear modules of the layers over the base, in place of candidates."""
    base = base_weights(case)
    linear = layout_of(open_checkpoint(case.root / "base")).rotated
    case.candidates = []
    for index in range(2):
        generator = torch.Generator().manual_seed(20 + index)
        factors: Tensors = {}
        for name in sorted(linear):
            rows, columns = base[name].shape
            module = peft.PREFIX + name.removesuffix(".weight")
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                factor = 0.1 * torch.randn(shape, generator=generator)
                factors[f"{module}.lora_{side}.weight"] = factor
        path = case.root / f"adapter-{index + 1}"
        path.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "bias": "none"}
        (path / peft.CONFIG_NAME).write_text(json.dumps(config))
        save_file(factors, path / WEIGHTS_NAME)
        case.candidates.append(path)
    return case.candidates


def write_dense(case: MergeCase, adapter: Path) -> Path:
    """The model that an adapter stands for, `W + α / r B A` in float32, by hand."""
    dense, factors = base_weights(case), load_file(adapter / WEIGHTS_NAME)
    for name in [n for n in factors if ".lora_A." in n]:
        weight = name.removeprefix(peft.PREFIX).replace(".lora_A", "")
        a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        dense[weight] = (dense[weight].double() + ALPHA / RANK * (b @ a)).float()
    path = adapter.with_name(f"{adapter.name}-dense")
    path.mkdir()
    save_file(dense, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((case.root / "base" / "config.json").read_text())
    return path

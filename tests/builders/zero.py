"""DeepSpeed's ZeRO shards of a model, as three processes write them."""

from __future__ import annotations

import contextlib
import enum
import math
import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

WORLD = 3
CONFIG, SCALER = "deepspeed.runtime.zero.config", "deepspeed.runtime.fp16.loss_scaler"
# By the name that pickles of DeepSpeed have.
ZeroStageEnum = enum.IntEnum("ZeroStageEnum", {"gradients": 2, "weights": 3}, module=CONFIG)
Stage: Any = ZeroStageEnum
LossScaler: Any = type("LossScaler", (), {"__module__": SCALER})


@contextlib.contextmanager
def deepspeed() -> Iterator[None]:
    """DeepSpeed's names for what its checkpoints hold, so that pickles say them."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Stage, LossScaler):
            parts = cls.__module__.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                patch.setitem(sys.modules, name, types.ModuleType(name))
            setattr(sys.modules[cls.__module__], cls.__qualname__, cls)
        yield


def flat_parts(weights: dict[str, Tensor], stage: int) -> list[list[Tensor]]:
    """Rank -> its flat tensors, in two groups, as DeepSpeed lays them out."""
    names = list(weights)
    groups = [names[:4], names[4:]]
    ranks: list[list[Tensor]] = [[] for _ in range(WORLD)]
    for group in groups:
        if stage == 3:
            rows: list[list[Tensor]] = [[] for _ in range(WORLD)]
            for name in group:
                flat = weights[name].reshape(-1)
                size = math.ceil(flat.numel() / WORLD)
                padded = torch.cat([flat, flat.new_zeros(size * WORLD - flat.numel())])
                for rank in range(WORLD):
                    rows[rank].append(padded[rank * size : (rank + 1) * size])
            for rank in range(WORLD):
                ranks[rank].append(torch.cat(rows[rank]))
        else:
            flat = torch.cat([weights[name].reshape(-1) for name in group])
            size = math.ceil(flat.numel() / (2 * WORLD)) * 2
            padded = torch.cat([flat, flat.new_zeros(size * WORLD - flat.numel())])
            for rank in range(WORLD):
                ranks[rank].append(padded[rank * size : (rank + 1) * size].clone())
    return ranks


def write_zero(source: Path, target: Path, stage: int, extra: Any = None) -> dict[str, Tensor]:
    """Write a model's weights as ZeRO shards, with its configuration, and nothing else of it."""
    weights = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    shards = target / "global_step7"
    shards.mkdir(parents=True)
    (target / "latest").write_text("global_step7")
    shutil.copy(source / "config.json", target)
    names = list(weights)
    shapes = [OrderedDict((n, weights[n].shape) for n in part) for part in (names[:4], names[4:])]
    if stage == 3:
        shapes = [OrderedDict((n, weights[n].shape) for n in names)]
    for rank, groups in enumerate(flat_parts(weights, stage)):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {
            "zero_stage": Stage(stage),
            "loss_scaler": LossScaler(),
            "partition_count": WORLD if stage == 3 else [WORLD, WORLD],
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}},
            key: groups,
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        with deepspeed():
            torch.save({"optimizer_state_dict": state, "extra": extra}, shards / name)
        model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(model, shards / f"{prefix}mp_rank_00_model_states.pt")
    return weights

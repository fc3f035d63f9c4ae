"""DeepSpeed's ZeRO shards, in layouts that its engine makes only with more processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from arm_ray.checkpoints.formats import open_source
from arm_ray.checkpoints.zero import find
from arm_ray.errors import (
    ArmRayError,
    CorruptCheckpointError,
    NotACheckpointError,
    PickleRefusedError,
)
from arm_ray.runtime.merge.run import merge
from tests.builders.merge_case import MergeCase
from tests.builders.zero import WORLD, deepspeed, write_zero


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_are_the_model_that_was_saved(case: MergeCase, stage: int) -> None:
    case.make("qwen2.5")
    target = case.root / "zero"
    weights = write_zero(case.candidates[0], target, stage)
    assert find(target) == target / "global_step7"
    assert find(case.candidates[0]) is None
    opened = open_source(target)
    found = opened.read(weights)
    assert opened.tensors.keys() == found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    before = opened.fingerprint
    os.utime(next((target / "global_step7").glob("*optim*")), (1, 1))
    assert open_source(target).fingerprint != before


def test_padding_between_parameters_is_passed_over(case: MergeCase) -> None:
    """DeepSpeed may align each parameter in the flat tensor, and says by how much."""
    case.make("smollm2")
    target = case.root / "zero"
    weights = write_zero(case.candidates[0], target, 2)
    names = list(weights)
    groups = [names[:4], names[4:]]
    paddings = [[-weights[n].numel() % 64 + 5 for n in group] for group in groups]
    flat = [
        torch.cat(
            [
                torch.cat([weights[n].reshape(-1), torch.full((pad,), 7.0)])
                for n, pad in zip(group, pads, strict=True)
            ]
        )
        for group, pads in zip(groups, paddings, strict=True)
    ]
    for rank, file in enumerate(sorted((target / "global_step7").glob("*optim*"))):
        with deepspeed():
            state = torch.load(file, weights_only=False)
            parts = [part.chunk(WORLD)[rank].clone() for part in flat]
            state["optimizer_state_dict"]["single_partition_of_fp32_groups"] = parts
            state["optimizer_state_dict"]["param_alignment_paddings"] = paddings
            torch.save(state, file)
    found = open_source(target).read(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.usefixtures("shards_in_process")
def test_a_merge_of_shards_equals_that_of_the_export(case: MergeCase) -> None:
    case.make("smollm2", dtype=torch.float32)
    target = case.root / "zero"
    write_zero(case.candidates[1], target, 3)
    options = ("method.operator=task_arithmetic", "schedule.max_iterations=1")
    options += ("schedule.anchor_iterations=1", "schedule.tolerance=0.0")
    expected = merge(case.config(*options, output="dense"), console=Console(quiet=True))
    case.candidates[1] = target
    config = case.config(*options, output="sharded")
    found = merge(config, console=Console(quiet=True))
    ours, theirs = (load_file(o.model / "model.safetensors") for o in (found, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert merge(config, console=Console(quiet=True)).reason == "complete"


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_what_is_missing_damaged_or_dangerous(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2")
    monkeypatch.chdir(case.root)

    def refused(kind: type[ArmRayError], text: str, extra: Any = None) -> None:
        target = case.root / f"zero-{len(list(case.root.iterdir()))}"
        write_zero(case.candidates[0], target, 3, extra)
        damage[text](target / "global_step7")
        with pytest.raises(kind, match=text):
            open_source(target)

    damage = {
        "are missing": lambda d: next(d.glob("*rank_2*optim*")).unlink(),
        "cannot be read": lambda d: next(d.glob("*rank_1*optim*")).write_bytes(b"\0" * 100),
        "no shapes": lambda d: [f.unlink() for f in d.glob("*model_states*")],
        "holds objects": lambda _d: None,
    }
    refused(CorruptCheckpointError, "are missing")
    refused(CorruptCheckpointError, "cannot be read")
    refused(CorruptCheckpointError, "no shapes")
    refused(PickleRefusedError, "holds objects", extra=Harmful())
    assert not (case.root / "harmed").exists()
    with pytest.raises(NotACheckpointError, match="no ZeRO shards"):
        open_source(case.root / "base", format="zero")

"""SLERP of tensors that are read twice: piece by piece for the angle, then to merge them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.errors import CorruptCheckpointError
from arm_ray.planning import workload
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.shards import linear
from tests.builders.checkpoints import load_all
from tests.builders.merge_case import MergeCase

WINDOW = ("schedule.anchor_iterations=1", "schedule.max_iterations=4", "schedule.window_size=2")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_LINEAR_PIECE", 200)
    monkeypatch.setattr(linear, "_LARGEST_WHOLE_MODELS", 200)


def merged(case: MergeCase, output: str, *overrides: str) -> dict[str, torch.Tensor]:
    config = case.config("calibration=null", "method.operator=slerp", *overrides, output=output)
    return load_all(merge(config, console=Console(quiet=True)).model or Path())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("schedule", [("schedule.max_iterations=1",), WINDOW])
def test_pieces_give_what_the_whole_gives(
    case: MergeCase, request: pytest.FixtureRequest, schedule: tuple[str, ...], threads: int
) -> None:
    case.make("qwen2.5", dtype=torch.float32)
    whole = merged(case, "whole", *schedule)
    request.getfixturevalue("small_pieces")
    found = merged(case, "pieces", *schedule, f"runtime.threads={threads}")
    assert found.keys() == whole.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole[name], rtol=2e-6, atol=1e-7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bad", ["base", "checkpoint-10"])
def test_what_is_not_finite_is_named_wherever_it_is_read_first(case: MergeCase, bad: str) -> None:
    """The base is none of the models: it is first read when they are merged."""
    case.make()
    file = case.root / bad / SINGLE_NAME
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="holds") as caught:
        merged(case, "run")
    assert caught.value.subject == ("base" if bad == "base" else "candidate-1")
    assert name in str(caught.value)


@pytest.mark.usefixtures("small_pieces")
def test_a_base_that_is_no_model_is_read_once(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    read: list[tuple[str, str, int]] = []
    rows = linear.WeightStore.rows

    def counted(self, state, group, name, part):
        read.append((state, name, part.start))
        return rows(self, state, group, name, part)

    monkeypatch.setattr(linear.WeightStore, "rows", counted)
    merged(case, "run", "schedule.max_iterations=1")
    of_base = [each for each in read if each[0] == "base"]
    of_candidate = [each for each in read if each[0] == "candidate-1"]
    assert len(of_base) == len(set(of_base)) < len(of_candidate)

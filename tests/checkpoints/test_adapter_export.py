"""A merged model of low rank over its base becomes an adapter that reads back as that model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arm_ray.checkpoints import adapter_export
from arm_ray.checkpoints.adapter_export import export_adapter
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint
from arm_ray.checkpoints.peft import CONFIG_NAME, open_adapter
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.errors import CheckpointError
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.settings import MethodSettings
from arm_ray.model.checks import layout_of
from arm_ray.model.layout import ModelLayout
from tests.builders.models import tiny_model

Weights = dict[str, torch.Tensor]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("base")
    tiny_model("qwen2.5", seed=1).to(torch.bfloat16).save_pretrained(path)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def layout(base: Checkpoint) -> ModelLayout:
    return layout_of(base)


def moved(weight: torch.Tensor, rank: int, seed: int, scale: float = 1e-3) -> torch.Tensor:
    """A weight in float32, plus a matrix of low rank, rounded once."""
    rows, columns = weight.shape
    low = gaussian(rows, rank, seed=seed).double() @ gaussian(rank, columns, seed=seed + 1).double()
    return (weight.double() + scale * low).float()


def export(path: Path, base: Checkpoint, layout: ModelLayout, merged: Weights, **options) -> int:
    weights = ((n, merged.get(n, w.float()), w) for n, w in base.read(layout.shapes).items())
    return export_adapter(path, weights, layout.rotated, base_model="the/base", **options)


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_it_reads_back_as_the_merged_model(
    base: Checkpoint,
    layout: ModelLayout,
    tmp_path: Path,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_export, "_BLOCK", block)
    merged = {
        name: moved(weight, 1 + i % 5, seed=2 * i)
        for i, (name, weight) in enumerate(sorted(base.read(layout.rotated).items()))
    }
    assert export(tmp_path, base, layout, merged) == 5
    found = open_adapter(tmp_path, base)
    weights = found.read(layout.shapes)
    for name, start in base.read(layout.shapes).items():
        if name in merged:
            difference = merged[name].double() - start.double()
            error = (weights[name].double() - merged[name].double()).norm()
            assert float(error) < 1e-6 * float(merged[name].norm())
            assert float(error) < 1e-2 * float(difference.norm())
        else:
            assert torch.equal(weights[name], start)
    assert {update.scaling for update in found.updates.values()} == {1.0}
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["target_modules"] == sorted(
        f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert config["base_model_name_or_path"] == "the/base"


def test_modules_that_do_not_differ_are_left_out(
    base: Checkpoint, layout: ModelLayout, tmp_path: Path
) -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    merged = {n: moved(w, 2, seed=5) for n, w in base.read(names).items()}
    assert export(tmp_path, base, layout, merged) == 2
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    attention = [name.removesuffix(".weight") for name in names[:2]]
    assert config["target_modules"] == sorted([*attention, "up_proj"])
    assert len(load_file(tmp_path / WEIGHTS_NAME)) == 10
    assert set(open_adapter(tmp_path, base).updates) == set(names)


def test_rounding_is_no_rank(base: Checkpoint, layout: ModelLayout, tmp_path: Path) -> None:
    """Several roundings to float32 make every difference one of full rank, but for tiny values."""
    name = "model.layers.1.mlp.down_proj.weight"
    start = base.read([name])[name]
    weight = start.float()
    for step in range(6):
        weight = moved(weight, 3, seed=7, scale=1e-3 / (step + 1))
    difference = weight.double() - start.double()
    assert int(torch.linalg.matrix_rank(difference, rtol=1e-14)) > 3
    assert export(tmp_path, base, layout, {name: weight}) == 3


def test_a_merge_of_adapters_is_an_adapter(
    base: Checkpoint, layout: ModelLayout, tmp_path: Path
) -> None:
    """Rotated or not: two candidates of rank 2 give rank 4."""
    method = open_method(MethodSettings(), 2)
    merged = {}
    for name, weight in base.read(layout.rotated).items():
        start = weight.float()
        states = [moved(weight, 2, seed=seed, scale=1e-2) for seed in (1, 3)]
        shifts = [gaussian(len(start), 4, seed=seed) for seed in (5, 6)]
        inputs = TensorInputs(name, start, states, 2, shifts=shifts, is_linear=True)
        merged[name] = method.merge(inputs).tensor
    assert export(tmp_path, base, layout, merged) == 4
    found = open_adapter(tmp_path, base).read(merged)
    for name, tensor in merged.items():
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-6


def test_a_difference_of_full_rank_is_named(
    base: Checkpoint, layout: ModelLayout, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = base.read([name])[name].float() + 1e-3 * gaussian(48, 48)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj") as caught:
        export(tmp_path / "a", base, layout, {name: weight}, max_rank=8)
    assert caught.value.got == "rank 48 of 48"
    assert not (tmp_path / "a").exists()
    assert export(tmp_path / "b", base, layout, {name: weight}, max_rank=48) == 48


def test_other_tensors_have_to_be_the_base_s(
    base: Checkpoint, layout: ModelLayout, tmp_path: Path
) -> None:
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        weight = base.read([name])[name].float() * 1.01
        with pytest.raises(CheckpointError, match=name):
            export(tmp_path, base, layout, {name: weight})


def test_no_difference_is_no_adapter(base: Checkpoint, layout: ModelLayout, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="equals its base"):
        export(tmp_path, base, layout, {})

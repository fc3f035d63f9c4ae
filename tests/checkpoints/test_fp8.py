"""Checkpoints in FP8 with a scale for each block are read as bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints.formats import open_source
from arm_ray.checkpoints.fp8 import dequantised
from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError
from arm_ray.model.checks import layout_of
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.tensors import gaussian

BLOCK = [16, 32]


def quantised(weight: torch.Tensor, block: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 and the scales of blocks, each so that its largest entry is the largest number of FP8."""
    rows, columns = weight.shape
    result = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[at].abs().max() / 448.0
            result[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return result, scales


def write_fp8(path: Path, **settings: Any) -> None:
    """Write a checkpoint's projections in FP8, in place."""
    file = path / SINGLE_NAME
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name], BLOCK)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    config["quantization_config"] = told | settings
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shape", [(48, 96), (40, 70), (7, 5), (16, 33)])
def test_each_entry_takes_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=2)
    low, scales = quantised(weight, BLOCK)
    found = dequantised(low, scales, (BLOCK[0], BLOCK[1]))
    assert found.dtype == torch.bfloat16
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected = low[i, j].float() * scales[i // BLOCK[0], j // BLOCK[1]]
            assert found[i, j] == expected.to(torch.bfloat16)
    torch.testing.assert_close(found.float(), weight, rtol=0.08, atol=0.02)


def test_it_is_what_transformers_reads() -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(integration, "Fp8Dequantize"):
        pytest.skip("this version of transformers dequantises elsewhere")
    low, scales = quantised(gaussian(48, 96, seed=3), BLOCK)
    known = {"weight$": [low], "weight_scale_inv": [scales.bfloat16()]}
    [expected] = integration.Fp8Dequantize(None).convert(known).values()
    expected = expected[0] if isinstance(expected, list) else expected
    found = dequantised(low, scales.bfloat16(), (BLOCK[0], BLOCK[1]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_a_base_in_fp8_is_merged_as_its_dequantised_copy(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    case.make("qwen2.5", dtype=torch.bfloat16)
    base = case.root / "base"
    write_fp8(base)
    asked = (f"method.operator={operator}", "runtime.residency=disk")
    outcome = merge(case.config(*asked), console=Console(quiet=True))
    found = load_all(outcome.model or Path())
    assert not [name for name in found if name.endswith("scale_inv")]
    config = json.loads((outcome.model / "config.json").read_text())
    assert "quantization_config" not in config
    # The same with what transformers would have written of it.
    opened = open_source(base)
    plain = opened.read(opened.tensors)
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    save_file({n: t.clone() for n, t in plain.items()}, base / SINGLE_NAME, {"format": "pt"})
    (base / "config.json").write_text(json.dumps(dict(opened.config)))
    again = merge(case.config(*asked, output="plain"), console=Console(quiet=True))
    assert_same_bits(found, load_all(again.model or Path()))


def test_scales_that_are_missing_or_do_not_fit(case: MergeCase) -> None:
    base = case.make("qwen2.5").root / "base"
    write_fp8(base)
    whole = {name: tensor.clone() for name, tensor in load_file(base / SINGLE_NAME).items()}
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    for tensors in (
        {n: t for n, t in whole.items() if n != name},
        {n: t[:1] if n == name else t for n, t in whole.items()},
    ):
        save_file(tensors, base / SINGLE_NAME, {"format": "pt"})
        with pytest.raises(CorruptCheckpointError, match=r"the scales of model\.layers\.1\.mlp"):
            open_source(base)


def test_one_scale_for_each_tensor_is_refused(case: MergeCase) -> None:
    base = case.make("qwen2.5").root / "base"
    write_fp8(base, weight_block_size=None)
    with pytest.raises(NotACheckpointError, match="quantised"):
        layout_of(open_source(base))

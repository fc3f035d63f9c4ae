"""Checkpoints in FP8 with a scale for each block are read as bfloat16, and written as FP8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints.formats import open_source
from arm_ray.checkpoints.fp8 import Fp8Checkpoint, dequantised, quantised, read_as_bfloat16
from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.checkpoints.remote import local_copy, open_remote
from arm_ray.errors import ConfigError, CorruptCheckpointError, NotACheckpointError
from arm_ray.model.checks import layout_of
from arm_ray.planning.sources import open_workload
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.shards import files
from arm_ray.runtime.shards.meter import Meter, RateLimit
from arm_ray.storage.store import StoredFile
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard
from tests.builders.tensors import gaussian

BLOCK = [16, 32]


def write_fp8(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    """Write a checkpoint's projections in FP8, in place, with scales of a dtype."""
    file = path / SINGLE_NAME
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name], scales = quantised(
            tensors[name], (BLOCK[0], BLOCK[1]), dtype, powers="scale_fmt" in settings
        )
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    config["quantization_config"] = told | settings
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shape", [(48, 96), (40, 70), (7, 5), (16, 33)])
def test_each_entry_takes_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=2)
    low, scales = quantised(weight, (BLOCK[0], BLOCK[1]))
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
    low, scales = quantised(gaussian(48, 96, seed=3), (BLOCK[0], BLOCK[1]))
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


SHAPES = [(48, 96), (40, 70), (7, 5), (16, 33)]
SCALES = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
if hasattr(torch, "float8_e8m0fnu"):
    SCALES.append((torch.float8_e8m0fnu, True))


@pytest.mark.parametrize(("dtype", "powers"), SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_quantised_is_within_half_a_unit_in_the_last_place(
    shape: tuple[int, int], dtype: torch.dtype, powers: bool
) -> None:
    # Blocks of very different sizes, and one of zeros.
    weight = gaussian(*shape, seed=4) * torch.logspace(-6, 3, shape[1])
    weight[: BLOCK[0], : BLOCK[1]] = 0.0
    low, scales = quantised(weight, (BLOCK[0], BLOCK[1]), dtype, powers=powers)
    assert (low.dtype, scales.dtype) == (torch.float8_e4m3fn, dtype)
    assert low.shape == weight.shape
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            at = (
                slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
            )
            scale, exact = scales[i, j].double(), weight[at].double()
            if not exact.any():
                assert scale == 1.0
                continue
            # The whole range of the format is used: to a power of two, or nearly all of it.
            top = float(exact.abs().max() / scale)
            assert 224 < top <= 448 if powers else 445 < top < 450
            assert not powers or float(torch.log2(scale)).is_integer()
            # Three bits after the point; below 2^-6 they are 2^-9 apart.
            exponent = torch.floor(torch.log2((exact / scale).abs())).clamp(min=-6)
            ulp = 2.0 ** (exponent - 3)
            assert bool(((low[at].double() * scale - exact).abs() <= 0.5 * ulp * scale).all())


def test_it_is_what_transformers_writes() -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(integration, "Fp8Quantize"):
        pytest.skip("this version of transformers quantises elsewhere")
    from transformers import FineGrainedFP8Config

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=tuple(BLOCK))

    weight = gaussian(48, 96, seed=5)
    made = integration.Fp8Quantize(Quantizer()).convert({"weight": weight})
    low, scales = quantised(weight, (BLOCK[0], BLOCK[1]))
    torch.testing.assert_close(scales, made["weight_scale_inv"], rtol=1e-6, atol=0.0)
    # It multiplies by a reciprocal, which may round otherwise: by one number of the format at most.
    other = low.view(torch.int8) != made["weight"].view(torch.int8)
    assert other.float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_a_merge_is_quantised_again(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, operator: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    case.make("qwen2.5", dtype=torch.bfloat16)
    base = case.root / "base"
    write_fp8(base, dtype, modules_to_not_convert=["lm_head"])
    # One of them is not merged: it is carried over.
    stored = {name: tensor.clone() for name, tensor in load_file(base / SINGLE_NAME).items()}
    first = "model.layers.0.mlp.up_proj.weight"
    for end in ("", "_scale_inv"):
        stored[f"mtp.proj.weight{end}"] = stored[f"{first}{end}"].clone()
    save_file(stored, base / SINGLE_NAME, {"format": "pt"})
    asked = (f"method.operator={operator}", "runtime.residency=disk")
    plain = merge(case.config(*asked, "precision.storage_dtype=float32", output="plain"),
                  console=Console(quiet=True))  # fmt: skip
    low = merge(case.config(*asked, "precision.storage_dtype=float8_e4m3fn"),
                console=Console(quiet=True))  # fmt: skip
    expected, found = load_all(plain.model or Path()), load_all(low.model or Path())
    assert found.keys() == stored.keys()
    # The same are quantised as in the base, in the same dtypes.
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in stored.items()}
    for name, tensor in found.items():
        if name.startswith("mtp"):
            assert torch.equal(tensor.float(), stored[name].float())
        elif tensor.dtype == torch.float8_e4m3fn:
            again, scales = quantised(expected[name], (BLOCK[0], BLOCK[1]), dtype)
            assert torch.equal(tensor.float(), again.float()), name
            assert torch.equal(found[f"{name}_scale_inv"], scales)
        elif not name.endswith("_scale_inv"):
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    config = json.loads((low.model / "config.json").read_text())
    wanted = json.loads((base / "config.json").read_text())
    assert config["quantization_config"] == wanted["quantization_config"]
    assert config["dtype"] == "bfloat16"
    # What was written is read again, and may be a base.
    opened = open_source(low.model)
    assert isinstance(opened, Fp8Checkpoint)
    assert opened.quantised == {n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert not list(low.model.glob(".*"))


def test_transformers_loads_what_is_written(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    case.make("qwen2.5", dtype=torch.bfloat16)
    # transformers wants whole blocks: the keys have 24 rows.
    monkeypatch.setattr(f"{__name__}.BLOCK", [8, 16])
    write_fp8(case.root / "base", modules_to_not_convert=["lm_head"])
    asked = ("method.operator=task_arithmetic", "precision.storage_dtype=float8_e4m3fn")
    outcome = merge(case.config(*asked), console=Console(quiet=True))
    config = AutoConfig.from_pretrained(outcome.model)
    assert config.quantization_config["quant_method"] == "fp8"
    model = AutoModelForCausalLM.from_pretrained(
        outcome.model,
        quantization_config=FineGrainedFP8Config(weight_block_size=(8, 16), dequantize=True),
        dtype=torch.bfloat16,
    )
    opened = open_source(outcome.model)
    expected = opened.read(opened.tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_base_that_is_not_in_fp8_says_what_to_do(case: MergeCase) -> None:
    case.make("qwen2.5")
    asked = ("method.operator=task_arithmetic", "precision.storage_dtype=float8_e4m3fn")
    for check in (open_inputs, open_workload):
        with pytest.raises(ConfigError, match=r"which ones(?s:.*)storage_dtype(?s:.*)to auto"):
            check(case.config(*asked))
    write_fp8(case.root / "base")
    inputs = open_inputs(case.config(*asked))
    assert inputs.fp8 is not None
    assert inputs.fp8.names == {n for n in inputs.layout.shapes if n.endswith("_proj.weight")}
    assert any("count so" in note for note in open_workload(case.config(*asked))[1])


class Elsewhere:
    """A directory that is read by ranges, as a store's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> dict[str, StoredFile]:
        return {f.name: StoredFile(f.stat().st_size, "1", 1) for f in self.path.iterdir()}

    def read(self, name: str, begin: int, end: int) -> bytes:
        return (self.path / name).read_bytes()[begin:end]

    def __str__(self) -> str:
        return "s3://elsewhere"


@pytest.mark.parametrize(("dtype", "powers"), SCALES)
def test_fp8_behind_a_url_is_the_same(
    case: MergeCase, tmp_path: Path, dtype: torch.dtype, powers: bool
) -> None:
    base = case.make("qwen2.5", dtype=torch.bfloat16).root / "base"
    write_fp8(base, dtype, **({"scale_fmt": "ue8m0"} if powers else {}))
    local = tmp_path / "mirror"
    local.mkdir()
    (local / "config.json").write_bytes((base / "config.json").read_bytes())
    here, there = open_source(base), read_as_bfloat16(open_remote(Elsewhere(base), local))
    assert not there.is_local
    assert there.tensors.keys() == here.tensors.keys()
    assert there.fingerprint != here.fingerprint
    assert_same_bits(there.read(there.tensors), here.read(here.tensors))
    # Under other names, and copied to a node by layer groups.
    name = "model.layers.0.mlp.up_proj.weight"
    renamed = there.under({"other": name})
    assert torch.equal(renamed.read(["other"])["other"], here.read([name])[name])
    assert name not in renamed.tensors
    counts: list[int] = []
    copied = local_copy(there, tmp_path / "copies", ((name, "model.norm.weight"),), counts.append)
    for _ in range(2):
        found = copied.read([name])[name]
        assert torch.equal(found, here.read([name])[name])
    assert counts == [2 * found.numel() + 2 * 48]
    assert layout_of(there).shapes == layout_of(here).shapes


def test_a_node_without_the_files_fetches_weights_and_scales(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = case.make("qwen2.5", dtype=torch.bfloat16).root / "base"
    write_fp8(base)
    shard = DirectShard(case.config("method.operator=task_arithmetic"))
    expected = open_source(base).read(shard.inputs.layout.shapes)
    fingerprints = shard.inputs.fingerprints
    # The driver's node has them, and this one does not.
    there = base.rename(tmp_path / "there")
    monkeypatch.setattr(files, "NodeDirectory", lambda _origin, _path: Elsewhere(there))
    given = files.ShardFiles(shard.spec, Meter(), RateLimit(None))
    moved = given.moved_to("run", None, fingerprints)  # type: ignore[arg-type]
    found = moved.spec.checkpoints["base"].read(expected)
    assert_same_bits(found, expected)

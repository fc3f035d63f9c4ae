"""LoRA adapters are read as the models that they stand for, and everything else is refused."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints import peft
from arm_ray.checkpoints.formats import missing
from arm_ray.checkpoints.huggingface import SINGLE_NAME, Checkpoint, open_checkpoint
from arm_ray.checkpoints.peft import AdaptedCheckpoint, is_adapter, open_adapter
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.checkpoints.validation import check_finite, check_tied_head
from arm_ray.config import parse_merge_config
from arm_ray.errors import (
    ArmRayError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    PickleRefusedError,
)
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.settings import MethodSettings
from arm_ray.model.checks import check_layout, layout_of
from arm_ray.planning.sources import open_workload
from arm_ray.runtime.inputs import open_inputs
from tests.builders.adapters import factors, save_base
from tests.builders.adapters import write_adapter as write
from tests.builders.models import tiny_model
from tests.builders.tensors import gaussian

QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.1.self_attn.k_proj"
UP = "model.layers.2.mlp.up_proj"
EMBED = "model.embed_tokens"
HEAD = "lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """bfloat16, with a head of its own."""
    return save_base(tmp_path_factory.mktemp("base"), "qwen2.5")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_base(tmp_path_factory.mktemp("tied"), "smollm2")


def expected(base: Checkpoint, module: str, a: torch.Tensor, b: torch.Tensor, s: float) -> Any:
    weight = base.read([f"{module}.weight"])[f"{module}.weight"]
    return weight.double() + s * (b.double() @ a.double())


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


def adapted(found: AdaptedCheckpoint, module: str) -> torch.Tensor:
    return found.read([f"{module}.weight"])[f"{module}.weight"]


def refused(path: Path, base: Checkpoint, kind: type[ArmRayError], match: str) -> ArmRayError:
    with pytest.raises(kind, match=match) as caught:
        open_adapter(path, base)
    return caught.value


def test_weights_are_the_base_s_plus_the_scaled_product(base: Checkpoint, tmp_path: Path) -> None:
    own = {**factors(base, QUERY, 4, seed=1), **factors(base, UP, 4, seed=3)}
    found = open_adapter(write(tmp_path / "a", own), base)
    for module in (QUERY, UP):
        a, b = (own[f"{peft.PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        assert_close(adapted(found, module), expected(base, module, a, b, 2.0))
        entry = found.tensors[f"{module}.weight"]
        assert (entry.code, entry.num_bytes) == ("F32", adapted(found, module).nbytes)
        assert entry.file == tmp_path / "a" / WEIGHTS_NAME
    everything = found.read(base.tensors)
    assert list(everything) == list(base.tensors)
    for name, tensor in base.read(base.tensors).items():
        if name not in found.updates:
            assert torch.equal(everything[name], tensor)
            assert found.tensors[name] == base.tensors[name]
    assert found.config == base.config


def test_factors_by_hand(base: Checkpoint, tmp_path: Path) -> None:
    """One entry of A and one of B: one entry of the weight moves by α / r · a · b."""
    own = {name: torch.zeros_like(t) for name, t in factors(base, QUERY, 2).items()}
    first, second = own.values()
    first[1, 5], second[7, 1] = 3.0, 0.5
    found = open_adapter(write(tmp_path / "a", own, r=2, lora_alpha=16), base)
    name = f"{QUERY}.weight"
    moved = adapted(found, QUERY) - base.read([name])[name].float()
    assert moved.nonzero().tolist() == [[7, 5]]
    assert float(moved[7, 5]) == pytest.approx(12.0)


def test_layers_without_factors_do_not_open_the_adapter_s_file(
    base: Checkpoint, tmp_path: Path
) -> None:
    found = open_adapter(write(tmp_path / "a", factors(base, QUERY, 4)), base)
    (tmp_path / "a" / WEIGHTS_NAME).unlink()
    name = f"{KEY}.weight"
    assert torch.equal(found.read([name])[name], base.read([name])[name])
    assert found.read([]) == {}


def test_factors_in_bfloat16_are_multiplied_in_float32(base: Checkpoint, tmp_path: Path) -> None:
    own = {name: t.bfloat16() for name, t in factors(base, QUERY, 4).items()}
    found = open_adapter(write(tmp_path / "a", own), base)
    a, b = own.values()
    assert_close(adapted(found, QUERY), expected(base, QUERY, a, b, 2.0))


@pytest.mark.parametrize("style", ["lora_{}.default.weight", "lora_{}.weight"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_both_ways_to_name_a_factor(
    base: Checkpoint, tmp_path: Path, style: str, prefix: str
) -> None:
    a, b = factors(base, QUERY, 4).values()
    own = {f"{prefix}{QUERY}.{style.format(side)}": t for side, t in (("A", a), ("B", b))}
    found = open_adapter(write(tmp_path / "a", own), base)
    assert_close(adapted(found, QUERY), expected(base, QUERY, a, b, 2.0))


def test_rslora_divides_by_the_root_of_the_rank(base: Checkpoint, tmp_path: Path) -> None:
    own = factors(base, QUERY, 4)
    found = open_adapter(write(tmp_path / "a", own, use_rslora=True), base)
    assert_close(adapted(found, QUERY), expected(base, QUERY, *own.values(), 4.0))


def test_ranks_and_alphas_of_modules(base: Checkpoint, tmp_path: Path) -> None:
    """A pattern is a regular expression for the end of a module's name, from a dot; first wins."""
    sizes = {QUERY: 3, KEY: 5, UP: 4}
    own = {m: factors(base, m, rank, seed=rank) for m, rank in sizes.items()}
    path = write(
        tmp_path / "a",
        {name: t for group in own.values() for name, t in group.items()},
        rank_pattern={"q_proj": 3, r"layers\.1\..*\.k_proj": 5, "_proj": 99, "proj": 99},
        alpha_pattern={f"model.{'layers.2.mlp'}.up_proj": 6, "up_proj": 77, "k_proj": 10.5},
    )
    found = open_adapter(path, base)
    for module, scaling in {QUERY: 8 / 3, KEY: 10.5 / 5, UP: 6 / 4}.items():
        wanted = expected(base, module, *own[module].values(), scaling)
        assert_close(adapted(found, module), wanted)


def test_fan_in_fan_out_is_refused_although_a_square_weight_would_fit(
    base: Checkpoint, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", factors(base, QUERY, 4), fan_in_fan_out=True)
    error = refused(path, base, NotACheckpointError, r"stored as \[inputs, outputs\]")
    assert "nn.Linear" in (error.expected or "")
    assert "set it to false" in (error.hint or "")
    open_adapter(write(tmp_path / "b", factors(base, QUERY, 4), fan_in_fan_out=False), base)


def magnitudes(base: Checkpoint, module: str, style: str = "lora_magnitude_vector") -> Any:
    rows = base.tensors[f"{module}.weight"].shape[0]
    return {f"{peft.PREFIX}{module}.{style}": gaussian(rows, seed=9).abs() + 0.5}


@pytest.mark.parametrize(
    "style",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ],
)
def test_dora_gives_each_row_a_length(base: Checkpoint, tmp_path: Path, style: str) -> None:
    own = {**factors(base, UP, 4), **magnitudes(base, UP, style)}
    found = open_adapter(write(tmp_path / "a", own, use_dora=True), base)
    a, b, lengths = own.values()
    whole = expected(base, UP, a, b, 2.0)
    wanted = whole / whole.norm(dim=1, keepdim=True) * lengths.double()[:, None]
    assert_close(adapted(found, UP), wanted)
    assert torch.allclose(adapted(found, UP).norm(dim=1), lengths, rtol=1e-5)


def test_lengths_that_do_not_belong_to_the_settings_are_refused(
    base: Checkpoint, tmp_path: Path
) -> None:
    plain, lengths = factors(base, QUERY, 4), magnitudes(base, QUERY)
    for name, own, is_dora in (("a", plain, True), ("b", {**plain, **lengths}, False)):
        path = write(tmp_path / name, own, use_dora=is_dora)
        error = refused(path, base, CorruptCheckpointError, "not of one kind")
        assert f"use_dora {is_dora}" in str(error.got)
    short = {name: tensor[:-1] for name, tensor in lengths.items()}
    path = write(tmp_path / "c", {**plain, **short}, use_dora=True)
    refused(path, base, CorruptCheckpointError, "not as many as it has")
    path = write(tmp_path / "d", lengths, use_dora=True)
    refused(path, base, CorruptCheckpointError, "lacks one of the two factors")
    tokens, size = base.tensors[f"{EMBED}.weight"].shape
    table = {f"{EMBED}.lora_embedding_A": gaussian(4, tokens)}
    table |= {f"{EMBED}.lora_embedding_B": gaussian(size, 4)}
    path = write(tmp_path / "e", {**table, **magnitudes(base, EMBED)}, use_dora=True)
    refused(path, base, NotACheckpointError, "DoRA of an embedding")


@pytest.mark.parametrize("between", ["", ".base_layer"])
def test_biases_take_the_place_of_the_base_s(
    base: Checkpoint, tmp_path: Path, between: str
) -> None:
    bias = gaussian(base.tensors[f"{QUERY}.bias"].shape[0], seed=5)
    own = {**factors(base, QUERY, 4), f"{peft.PREFIX}{QUERY}{between}.bias": bias}
    for trained in ("all", "lora_only"):
        found = open_adapter(write(tmp_path / trained, own, bias=trained), base)
        assert torch.equal(found.read([f"{QUERY}.bias"])[f"{QUERY}.bias"], bias)
        lacking = write(tmp_path / f"{trained}-lacking", factors(base, QUERY, 4), bias=trained)
        refused(lacking, base, CorruptCheckpointError, "lacks the biases")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True, "bias": "all", "use_rslora": True},
    ],
    ids=str,
)
def test_what_peft_saves_is_read_as_peft_merges_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    library = pytest.importorskip("peft")
    plain: Any = tiny_model("qwen2.5", seed=1)
    plain.save_pretrained(tmp_path / "base")
    config = library.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings
    )
    wrapped = library.get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.mul_(1.0 + 0.1 * torch.rand(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    found = open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    merged = wrapped.merge_and_unload().state_dict()
    read = found.read(found.tensors)
    assert read.keys() == merged.keys()
    before = found.base.read(found.base.tensors)
    changed = {n for n in read if not torch.equal(read[n], before[n])}
    assert len(changed) == 9 + 9 * (settings.get("bias") == "all") + 6 * (
        settings.get("bias") == "lora_only"
    )
    for name, tensor in merged.items():
        difference = (read[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert float(difference) < 1e-6, name


def test_an_embedding(base: Checkpoint, tmp_path: Path) -> None:
    tokens, size = base.tensors[f"{EMBED}.weight"].shape
    a, b = gaussian(4, tokens), gaussian(size, 4, seed=1)
    own = {f"{peft.PREFIX}{EMBED}.lora_embedding_{s}": t for s, t in (("A", a), ("B", b))}
    found = open_adapter(write(tmp_path / "a", own), base)
    table = base.read([f"{EMBED}.weight"])[f"{EMBED}.weight"].double()
    assert_close(adapted(found, EMBED), table + 2.0 * (b.double() @ a.double()).T)
    # Saved along with the embedding as it was.
    other = gaussian(tokens, size, seed=2)
    own[f"{peft.PREFIX}{EMBED}.base_layer.weight"] = other
    found = open_adapter(write(tmp_path / "b", own), base)
    assert_close(adapted(found, EMBED), other.double() + 2.0 * (b.double() @ a.double()).T)


@pytest.mark.parametrize("between", ["", ".modules_to_save", ".modules_to_save.default"])
def test_whole_modules_take_the_place_of_the_base_s(
    base: Checkpoint, tmp_path: Path, between: str
) -> None:
    head = gaussian(*base.tensors[f"{HEAD}.weight"].shape).bfloat16()
    own = {f"{peft.PREFIX}{HEAD}{between}.weight": head, **factors(base, QUERY, 4)}
    found = open_adapter(write(tmp_path / "a", own, modules_to_save=["lm_head"]), base)
    assert torch.equal(adapted(found, HEAD), head)
    assert found.tensors[f"{HEAD}.weight"].code == "BF16"
    assert f"{QUERY}.weight" in found.updates


def test_the_base_s_copy_of_a_tied_head_is_not_the_adapter_s(
    tied: Checkpoint, tmp_path: Path
) -> None:
    weights = tied.read(tied.tensors)
    shutil.copytree(tied.path, tmp_path / "base")
    copied = {**weights, f"{HEAD}.weight": weights[f"{EMBED}.weight"].clone()}
    save_file(copied, tmp_path / "base" / SINGLE_NAME, {"format": "pt"})
    base = open_checkpoint(tmp_path / "base")
    assert f"{HEAD}.weight" in base.tensors
    trained = gaussian(*base.tensors[f"{EMBED}.weight"].shape).bfloat16()
    own = {f"{peft.PREFIX}{m}.weight": trained.clone() for m in (EMBED, HEAD)}
    found = open_adapter(write(tmp_path / "a", own, modules_to_save=["x"]), base)
    assert torch.equal(adapted(found, EMBED), trained)
    check_tied_head(found, "a", f"{EMBED}.weight", f"{HEAD}.weight")
    assert f"{HEAD}.weight" not in found.tensors


def test_an_adapter_survives_pickling(base: Checkpoint, tmp_path: Path) -> None:
    found = open_adapter(write(tmp_path / "a", factors(base, QUERY, 4)), base)
    copy = pickle.loads(pickle.dumps(found))
    assert copy == found
    assert copy.fingerprint == found.fingerprint
    assert torch.equal(adapted(copy, QUERY), adapted(found, QUERY))


def test_a_fingerprint_changes_with_the_adapter(base: Checkpoint, tmp_path: Path) -> None:
    own = factors(base, QUERY, 4)
    first = open_adapter(write(tmp_path / "a", own), base).fingerprint
    assert open_adapter(tmp_path / "a", base).fingerprint == first
    assert open_adapter(write(tmp_path / "a", own, lora_alpha=9), base).fingerprint != first
    other = factors(base, KEY, 4)
    assert open_adapter(write(tmp_path / "a", other), base).fingerprint != first


def test_bad_numbers_are_found_where_they_are(base: Checkpoint, tmp_path: Path) -> None:
    own = factors(base, QUERY, 4)
    next(iter(own.values()))[0, 3] = torch.nan
    found = open_adapter(write(tmp_path / "a", own), base)
    name = f"{QUERY}.weight"
    with pytest.raises(CorruptCheckpointError, match="NaN") as caught:
        check_finite(found.read([name])[name], name, found.tensors[name].file)
    assert str(tmp_path / "a" / WEIGHTS_NAME) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "IA3"}, "of another type"),
        ({"peft_type": "LOHA"}, "of another type"),
        ({"peft_type": "PROMPT_TUNING"}, "of another type"),
        ({"peft_type": None}, "of another type"),
        ({"bias": "some"}, "of a kind that is not known"),
        ({"lora_bias": True}, "has a bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
        ({"init_lora_weights": "pissa_niter_4"}, "took something away"),
        ({"init_lora_weights": "olora"}, "took something away"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    base: Checkpoint, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    path = write(tmp_path / "a", factors(base, QUERY, 4), **settings)
    assert refused(path, base, NotACheckpointError, match).hint


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r$"),
        ({"r": "4"}, "r$"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"r": 5}, "do not have the rank"),
        ({"rank_pattern": {"q_proj": 2}}, "do not have the rank"),
    ],
)
def test_settings_that_make_no_sense(
    base: Checkpoint, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    path = write(tmp_path / "a", factors(base, QUERY, 4), **settings)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_adapter(path, base)
    assert match.rstrip("$") in caught.value.what


def test_initialisations_that_leave_the_base_alone(base: Checkpoint, tmp_path: Path) -> None:
    for initial in (True, False, "gaussian", "eva"):
        own = factors(base, QUERY, 4)
        open_adapter(write(tmp_path / "a", own, init_lora_weights=initial), base)


def test_tensors_of_other_methods_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    for extra in (
        f"{QUERY}.lora_A.second.weight",
        f"{QUERY}.lora_B.bias",
        f"{HEAD}.original_module.weight",
        "prompt_embeddings",
    ):
        own = {**factors(base, QUERY, 4), peft.PREFIX + extra: torch.ones(48)}
        error = refused(write(tmp_path / "a", own), base, NotACheckpointError, "no part of a LoRA")
        assert extra in error.what


def test_half_an_update_and_one_twice(base: Checkpoint, tmp_path: Path) -> None:
    own = factors(base, QUERY, 4)
    first = next(iter(own))
    half = write(tmp_path / "a", {first: own[first]})
    assert QUERY in refused(half, base, CorruptCheckpointError, "lacks one of the two").what
    twice = {**own, first.replace("lora_A", "lora_A.default"): own[first].clone()}
    refused(write(tmp_path / "b", twice), base, CorruptCheckpointError, "twice")


def test_an_adapter_of_another_base(base: Checkpoint, tmp_path: Path) -> None:
    wide = {
        f"{QUERY}.lora_A.weight": gaussian(4, 64),
        f"{QUERY}.lora_B.weight": gaussian(64, 4),
    }
    path = write(tmp_path / "a", wide, base_model_name_or_path="some/other")
    error = refused(path, base, MismatchError, "does not fit the base")
    assert QUERY in error.what
    assert error.got == "[64, 64]"
    assert "some/other" in (error.hint or "")
    deep = {name.replace("layers.0", "layers.9"): t for name, t in factors(base, QUERY, 4).items()}
    error = refused(write(tmp_path / "b", deep), base, MismatchError, "does not fit the base")
    assert "layers.9" in error.what
    head = {f"{HEAD}.weight": gaussian(7, 48)}
    assert HEAD in refused(write(tmp_path / "c", head), base, MismatchError, "does not fit").what


def test_pickles_missing_and_broken_weights(base: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "a", factors(base, QUERY, 4))
    file = path / WEIGHTS_NAME
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    refused(path, base, CorruptCheckpointError, "truncated")
    file.unlink()
    refused(path, base, CorruptCheckpointError, "no weights")
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Path("x")))
    assert is_adapter(path)
    refused(path, base, PickleRefusedError, r"pathlib\.")
    (path / peft.CONFIG_NAME).write_text("{")
    refused(path, base, CorruptCheckpointError, "malformed")


def test_an_adapter_as_torch_saves_it(base: Checkpoint, tmp_path: Path) -> None:
    own = {**factors(base, QUERY, 4), **factors(base, UP, 4)}
    expected = open_adapter(write(tmp_path / "a", own), base)
    path = write(tmp_path / "b", own)
    torch.save(load_file(path / WEIGHTS_NAME), path / "adapter_model.bin")
    (path / WEIGHTS_NAME).unlink()
    assert is_adapter(path)
    assert missing(path) is None
    found = open_adapter(path, base)
    ours, theirs = found.read(base.tensors), expected.read(base.tensors)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.tensors.keys() == expected.tensors.keys()
    before = found.fingerprint
    os.utime(path / "adapter_model.bin", (1, 1))
    assert open_adapter(path, base).fingerprint != before


def test_a_file_that_is_still_being_written(base: Checkpoint, tmp_path: Path) -> None:
    """Full size, but zeros where the last tensors will be. An untrained adapter has only zeros."""
    own = {**factors(base, QUERY, 4), **factors(base, UP, 4)}
    path = write(tmp_path / "a", own)
    file = path / WEIGHTS_NAME
    data = file.read_bytes()
    file.write_bytes(data[:-600] + bytes(600))
    open_adapter(path, base)
    size = own[f"{peft.PREFIX}{UP}.lora_B.weight"].nbytes
    file.write_bytes(data[:-size] + bytes(size))
    refused(path, base, CorruptCheckpointError, "ends in zeros")
    untrained = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in own.items()}
    found = open_adapter(write(tmp_path / "b", untrained), base)
    name = f"{QUERY}.weight"
    assert torch.equal(adapted(found, QUERY), base.read([name])[name].float())


def test_a_number_format_that_is_not_merged(base: Checkpoint, tmp_path: Path) -> None:
    own = {name: t.to(torch.int8) for name, t in factors(base, QUERY, 4).items()}
    refused(write(tmp_path / "a", own), base, NotACheckpointError, "number format")


def test_a_tied_head_stays_tied(tied: Checkpoint, tmp_path: Path) -> None:
    name = f"{EMBED}.weight"
    tokens, size = tied.tensors[name].shape
    table = tied.read([name])[name]
    low = {
        f"{EMBED}.lora_embedding_A": gaussian(4, tokens),
        f"{EMBED}.lora_embedding_B": gaussian(size, 4),
    }
    refused(write(tmp_path / "a", low), tied, NotACheckpointError, "unties the head")
    head = {
        f"{HEAD}.lora_A.weight": gaussian(4, size),
        f"{HEAD}.lora_B.weight": gaussian(tokens, 4),
    }
    refused(write(tmp_path / "b", head), tied, NotACheckpointError, "unties the head")
    alone = {f"{EMBED}.weight": gaussian(tokens, size)}
    refused(write(tmp_path / "c", alone), tied, NotACheckpointError, "unties the head")
    # What PEFT saves along although nothing trained it.
    kept = {f"{EMBED}.weight": table, **factors(tied, QUERY, 4)}
    assert torch.equal(adapted(open_adapter(write(tmp_path / "d", kept), tied), EMBED), table)
    both = {**alone, f"{HEAD}.weight": alone[f"{EMBED}.weight"].clone()}
    found = open_adapter(write(tmp_path / "e", both), tied)
    assert torch.equal(adapted(found, EMBED), alone[f"{EMBED}.weight"])
    assert set(found.tensors) == set(tied.tensors)
    both[f"{HEAD}.weight"][0, 0] += 1
    refused(write(tmp_path / "f", both), tied, NotACheckpointError, "unties the head")


def test_what_is_an_adapter(base: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "a", factors(base, QUERY, 4))
    assert is_adapter(path)
    assert not is_adapter(base.path)
    assert not is_adapter(tmp_path / "missing")
    # A merged model with the adapter's settings left beside it is a model.
    save_file(load_file(base.path / "model.safetensors"), path / "model.safetensors")
    assert not is_adapter(path)


@pytest.fixture
def merge_config(base: Checkpoint, tmp_path: Path) -> Callable[..., Any]:
    def config(*candidates: Path) -> Any:
        return parse_merge_config(
            {
                "base": str(base.path),
                "candidates": [str(path) for path in candidates],
                "output": str(tmp_path / "out"),
                "method": {"operator": "task_arithmetic", "coefficient": 0.5},
                "schedule": {"anchor_iterations": 1, "max_iterations": 1},
            }
        )

    return config


def test_a_merge_of_an_adapter_and_a_model(
    base: Checkpoint, tmp_path: Path, merge_config: Callable[..., Any]
) -> None:
    """From the configuration to the merged weights, without actors."""
    own = {**factors(base, QUERY, 4, seed=1), **factors(base, UP, 4, seed=3)}
    # As the Hugging Face trainer leaves it: pickles of its own lie beside the adapter.
    adapter = write(tmp_path / "checkpoint-10", own)
    (adapter / "optimizer.pt").write_bytes(b"")
    (adapter / "training_args.bin").write_bytes(b"")
    full = tmp_path / "full"
    full.mkdir()
    (full / "config.json").write_text((base.path / "config.json").read_text())
    moved = {n: t + 0.01 for n, t in load_file(base.path / "model.safetensors").items()}
    save_file(moved, full / "model.safetensors")
    config = merge_config(adapter, full)
    inputs = open_inputs(config)
    assert isinstance(inputs.checkpoints["candidate-1"], AdaptedCheckpoint)
    assert inputs.compute_dtype == torch.bfloat16
    assert len(set(inputs.fingerprints.values())) == 3
    layout = layout_of(base)
    check_layout(layout, inputs.checkpoints["candidate-1"], "candidate-1")
    method = open_method(MethodSettings(operator="task_arithmetic", coefficient=0.5), 2)
    for name in layout.shapes:
        start, *states = (c.read([name])[name].float() for c in inputs.checkpoints.values())
        merged = method.merge(TensorInputs(name, start, states, 2)).tensor
        module = name.removesuffix(".weight")
        shift = moved[name].double() - start.double()
        if module in (QUERY, UP):
            a, b = (own[f"{peft.PREFIX}{module}.lora_{side}.weight"] for side in "AB")
            shift = shift + 2.0 * (b.double() @ a.double())
        assert torch.allclose(merged.double(), start.double() + 0.25 * shift, atol=1e-5)
    workload, notes = open_workload(config)
    assert workload.dtypes["candidate-1"][f"{QUERY}.weight"] == torch.float32
    assert workload.dtypes["candidate-1"][f"{KEY}.weight"] == torch.bfloat16
    assert not any("candidate" in note for note in notes)


def test_a_broken_adapter_is_named_as_the_configuration_does(
    base: Checkpoint, tmp_path: Path, merge_config: Callable[..., Any]
) -> None:
    good = write(tmp_path / "good", factors(base, QUERY, 4))
    bad = write(tmp_path / "bad", factors(base, QUERY, 4), use_qalora=True)
    for opened in (open_inputs, open_workload):
        with pytest.raises(NotACheckpointError, match=r"candidate-2: .*QALoRA"):
            opened(merge_config(good, bad))

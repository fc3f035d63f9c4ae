"""Whole merges of mixtures of experts, of models with vision, and of families unknown to anyone."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.errors import MismatchError, NotACheckpointError
from arm_ray.events import read_events
from arm_ray.model.gate import tiny_model_config
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.families import config_of
from tests.builders.families_on_disk import write_family
from tests.builders.merge_case import MergeCase
from tests.builders.reference import batches, dense_rotation

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def run(case: MergeCase, output: str, *overrides: str) -> MergeOutcome:
    return merge(case.config(*overrides, output=output), console=Console(quiet=True))


def notes(outcome: MergeOutcome) -> list[str]:
    events = read_events(outcome.run / "events.jsonl")
    return [event["message"] for event in events if event["event"] == "warning"]


def read(path: Path) -> Weights:
    return {name: tensor.float() for name, tensor in load_all(path).items()}


# --- mixtures of experts ----------------------------------------------------------------------


def in_model(weights: Weights, layers: int, experts: int) -> Weights:
    """Qwen3-MoE's weights as its module has them, from those of the files."""
    found = {n: t for n, t in weights.items() if ".experts." not in n}
    for layer in range(layers):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: torch.stack([weights[f"{place}.{e}.{kind}_proj.weight"] for e in range(experts)])
            for kind in ("gate", "up", "down")
        }
        found[f"{place}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        found[f"{place}.down_proj"] = parts["down"]
    return found


def parts_of_qwen3(name: str, experts: Any, args: Any) -> Weights:
    """Weight in the files -> outputs of an expert for the tokens that it is sent."""
    hidden, chosen, _ = args
    found = {}
    for e in range(experts.num_experts):
        value = hidden[(chosen == e).any(1)]
        gate, up = (value @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        down = (nn.functional.silu(gate) * up) @ experts.down_proj[e].T
        for kind, output in (("gate", gate), ("up", up), ("down", down)):
            found[f"{name}.{e}.{kind}_proj.weight"] = output
    return found


def parts_of_gpt_oss(name: str, experts: Any, args: Any) -> Weights:
    """The same of parameters `[experts, d_in, d_out]`, with gate and up in turn."""
    hidden, chosen, _ = args
    found = {}
    for e in range(experts.num_experts):
        value = hidden[(chosen == e).any(1)]
        both = value @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        found[f"{name}.gate_up_proj[{e}]"] = both
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2]
        inner = (up.clamp(-experts.limit, experts.limit) + 1) * gate
        inner = inner * torch.sigmoid(gate * experts.alpha)
        found[f"{name}.down_proj[{e}]"] = inner @ experts.down_proj[e] + experts.down_proj_bias[e]
    return found


def parts_of_llama4(name: str, experts: Any, args: Any) -> Weights:
    """The same where an expert is given all tokens, by how much it is to do for each."""
    inputs = args[0].view(experts.num_experts, -1, experts.hidden_size)
    found = {}
    for e, every in enumerate(inputs):
        value = every[every.abs().sum(1) > 0]
        both = value @ experts.gate_up_proj[e]
        gate, up = both.chunk(2, dim=-1)
        found[f"{name}.gate_up_proj[{e}]"] = both
        found[f"{name}.down_proj[{e}]"] = (up * nn.functional.silu(gate)) @ experts.down_proj[e]
    return found


def mean_outputs(
    model: Any, samples: list[torch.Tensor], parts_of: Callable[[str, Any, Any], Weights]
) -> dict[str, dict[int, torch.Tensor]]:
    """Weight in the files -> sample -> mean output; of an expert, over the tokens it is sent."""
    means: dict[str, dict[int, torch.Tensor]] = {}
    handles, sample = [], 0

    def record_linear(name: str) -> Any:
        def record(_m: Any, _a: Any, out: torch.Tensor) -> None:
            means.setdefault(f"{name}.weight", {})[sample] = out.reshape(-1, out.shape[-1]).mean(0)

        return record

    def record_experts(name: str) -> Any:
        def record(experts: Any, args: Any) -> None:
            for each, outputs in parts_of(name, experts, args).items():
                if len(outputs):
                    means.setdefault(each, {})[sample] = outputs.mean(0)

        return record

    for name, part in model.named_modules():
        is_router = name.endswith("router")  # its outputs are scores
        if isinstance(part, nn.Linear) and ".layers." in name and not is_router:
            handles.append(part.register_forward_hook(record_linear(name)))
        if name.endswith(".experts"):
            handles.append(part.register_forward_pre_hook(record_experts(name)))
    with torch.no_grad():
        for number, ids in enumerate(samples):
            sample = number
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return means


def shift_of(
    reference: dict[int, torch.Tensor], other: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    columns = [other[s] - reference[s] for s in sorted(reference.keys() & other.keys())]
    return torch.stack(columns, dim=1) if columns else None


Means = dict[str, dict[int, torch.Tensor]]


def rotated(name: str, delta: torch.Tensor, reference: Means, other: Means) -> torch.Tensor:
    """A task vector `[d_out, d_in]` as ARM adds it."""
    if name not in reference or name not in other:
        return delta
    shift = shift_of(reference[name], other[name])
    u = None if shift is None else dense_rotation(shift, "positive_diagonal", 1e-6)
    return delta if u is None else (u @ delta.double()).float()


def rotated_by_expert(
    name: str, delta: torch.Tensor, reference: Means, other: Means, halves: int
) -> torch.Tensor:
    """The same of `[experts, d_in, d_out]`, whose outputs are so many projections."""
    found = []
    for e, matrix in enumerate(delta):
        parts = []
        for h, part in enumerate(matrix.T.chunk(halves)):

            def outputs(means: Means, e: int = e, h: int = h) -> Means:
                at = means.get(f"{name}[{e}]", {})
                return {name: {s: v.chunk(halves)[h] for s, v in at.items()}} if at else {}

            parts.append(rotated(name, part, outputs(reference), outputs(other)))
        found.append(torch.cat(parts).T)
    return torch.stack(found)


def streamed(
    case: MergeCase,
    iterations: int,
    kind: Any = transformers.Qwen3MoeForCausalLM,
    parts_of: Callable[[str, Any, Any], Weights] = parts_of_qwen3,
    halves: int = 1,
) -> list[Weights]:
    """Anchored ARM on a mixture of experts as a plain program over whole models."""
    more: Any = {"experts_implementation": "eager"} if parts_of is parts_of_qwen3 else {}
    model = kind.from_pretrained(case.root / "base", **more).eval()
    state, candidates = read(case.root / "base"), [read(path) for path in case.candidates]
    history = []
    for samples in batches(case.content(), iterations):
        activations = []
        for weights in (state, *candidates):
            if parts_of is parts_of_qwen3:
                sizes = model.config.num_hidden_layers, model.config.num_experts
                model.load_state_dict(in_model(weights, *sizes))
            else:
                model.load_state_dict(weights)
            activations.append(mean_outputs(model, samples, parts_of))
        new = {}
        for name, weight in state.items():
            total = torch.zeros_like(weight)
            for other, found in zip(candidates, activations[1:], strict=True):
                delta, means = other[name] - weight, (activations[0], found)
                if delta.ndim == 3:
                    split = halves if name.endswith("gate_up_proj") else 1
                    total += rotated_by_expert(name, delta, *means, split)
                else:
                    total += rotated(name, delta, *means)
            new[name] = weight + 0.7 / len(candidates) * total
        state = new
        history.append(new)
    return history


def test_arm_on_experts_equals_a_plain_program(tmp_path: Path) -> None:
    case = write_family(tmp_path, "qwen3_moe")
    fixed = ("schedule.anchor_iterations=2", "schedule.max_iterations=2")
    outcome = run(case, "run", *fixed, "runtime.layers_per_group=2")
    expected = streamed(case, 2)
    for iteration, weights in enumerate(expected, start=1):
        found = read(outcome.run / "states" / f"{iteration:04d}")
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    assert outcome.model is not None
    assert transformers.Qwen3MoeForCausalLM.from_pretrained(outcome.model) is not None


@pytest.mark.parametrize(
    ("family", "kind", "parts_of", "halves"),
    [
        # Gate and up in turn: one matrix. One after the other: each by itself.
        ("gpt_oss", transformers.GptOssForCausalLM, parts_of_gpt_oss, 1),
        ("llama4_text", transformers.Llama4ForCausalLM, parts_of_llama4, 2),
    ],
)
def test_experts_with_their_inputs_first_are_rotated_too(
    tmp_path: Path, family: str, kind: Any, parts_of: Any, halves: int
) -> None:
    case = write_family(tmp_path, family)
    fixed = ("schedule.anchor_iterations=2", "schedule.max_iterations=2")
    outcome = run(case, "run", *fixed, "runtime.layers_per_group=2")
    expected = streamed(case, 2, kind, parts_of, halves)
    plain = run(case, "plain", *fixed, "method.operator=task_arithmetic")
    for iteration, weights in enumerate(expected, start=1):
        found = read(outcome.run / "states" / f"{iteration:04d}")
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    # And they are rotated.
    assert plain.model is not None
    linear = read(plain.model)
    far = [n for n in weights if ".experts." in n and "bias" not in n]
    assert far
    assert all(float((found[n] - linear[n]).abs().max()) > 1e-3 for n in far)


def test_experts_are_rotated_each_by_itself(tmp_path: Path) -> None:
    """One candidate's expert that is turned changes that expert's merged weight alone."""
    case = write_family(tmp_path, "mixtral")
    one = ("schedule.anchor_iterations=1", "schedule.max_iterations=1")
    turned = read(run(case, "arm", *one).model or Path())
    plain = read(run(case, "ta", *one, "method.operator=task_arithmetic").model or Path())
    changed = {n for n in turned if not torch.allclose(turned[n], plain[n], atol=1e-6)}
    experts = {name for name in turned if re.search(r"experts\.\d+\.w[123]\.weight$", name)}
    assert len(experts & changed) > len(experts) // 2
    routers = {name for name in turned if name.endswith("block_sparse_moe.gate.weight")}
    assert routers
    assert not routers & changed


@pytest.mark.parametrize("residency", ["host", "disk"])
@pytest.mark.parametrize("form", ["separate", "fused"])
def test_experts_give_the_same_bits_wherever_they_live(
    tmp_path: Path, residency: str, form: str
) -> None:
    case = write_family(tmp_path, "glm4_moe" if form == "separate" else "qwen3_moe")
    if form == "fused":
        config = json.loads((case.root / "base" / "config.json").read_text())
        sizes = config["num_hidden_layers"], config["num_local_experts"]
        everywhere(case, lambda weights: in_model(weights, *sizes))
    plain = load_all(run(case, "plain").model or Path())
    other = run(case, "other", f"runtime.residency={residency}", "runtime.layers_per_group=3")
    assert_same_bits(plain, load_all(other.model or Path()))


def test_experts_that_are_stored_in_two_forms_are_refused(tmp_path: Path) -> None:
    case = write_family(tmp_path, "qwen3_moe")
    weights = read(case.candidates[1])
    config = json.loads((case.candidates[1] / "config.json").read_text())
    fused = in_model(weights, config["num_hidden_layers"], config["num_local_experts"])
    save_file(
        {n: t.clone().contiguous() for n, t in fused.items()},
        case.candidates[1] / SINGLE_NAME,
        {"format": "pt"},
    )
    with pytest.raises(MismatchError, match="stored in another form") as caught:
        run(case, "run")
    assert (caught.value.got or "").startswith("model.layers.0.mlp.experts.")
    assert (caught.value.expected or "").startswith("8 tensors, the first model.layers.0.mlp.")
    assert caught.value.subject == "candidate-2"


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    case = write_family(tmp_path, "qwen3_moe")
    file = case.candidates[0] / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "num_local_experts": 4}))
    with pytest.raises(MismatchError, match="experts differs"):
        run(case, "run")


# --- weights that a model has as one tensor ---------------------------------------------------

_ONE = ("schedule.anchor_iterations=1", "schedule.max_iterations=1", "schedule.step=fixed")


def rewrite(path: Path, change: Callable[[Weights], Weights], **config: Any) -> None:
    """Write a checkpoint's weights in another form, and other settings into its config.json."""
    weights = change(load_all(path))
    # A copy: what was read is mapped from the file that is written.
    plain = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(plain, path / SINGLE_NAME, {"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | config))


def everywhere(case: MergeCase, change: Callable[[Weights], Weights], **config: Any) -> None:
    for path in (case.root / "base", *case.candidates):
        rewrite(path, change, **config)


@pytest.mark.parametrize("operator", ["arm", "ties"])
def test_experts_in_one_tensor_give_what_separate_ones_do(tmp_path: Path, operator: str) -> None:
    case = write_family(tmp_path, "qwen3_moe")
    content = json.loads((case.root / "base" / "config.json").read_text())
    sizes = content["num_hidden_layers"], content["num_local_experts"]
    rotated = (f"method.operator={operator}", "method.rotate=true") if operator != "arm" else ()
    separate = read(run(case, "separate", *_ONE, *rotated).model or Path())
    everywhere(case, lambda weights: in_model(weights, *sizes))
    outcome = run(case, "fused", *_ONE, *rotated)
    found, expected = read(outcome.model or Path()), in_model(separate, *sizes)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if operator == "ties" and name.endswith("gate_up_proj"):
            continue  # what TIES trims is counted over both together
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    plain = read(run(case, "ta", *_ONE, "method.operator=task_arithmetic").model or Path())
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 2 * sizes[0]
    assert operator == "ties" or not any(
        torch.allclose(found[name], plain[name], atol=1e-6) for name in experts
    )
    # As transformers loads it, fused as it is stored.
    kind = transformers.Qwen3MoeForCausalLM
    _, told = kind.from_pretrained(outcome.model, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


def unfused(heads: int, keys: int) -> Callable[[Weights], Weights]:
    """Phi-3's weights under Llama's names."""

    def change(weights: Weights) -> Weights:
        found = {}
        for name, tensor in weights.items():
            if name.endswith("qkv_proj.weight"):
                shares = {"q_proj": heads, "k_proj": keys, "v_proj": keys}
            elif name.endswith("gate_up_proj.weight"):
                shares = {"gate_proj": 1, "up_proj": 1}
            else:
                found[name] = tensor
                continue
            width = tensor.shape[0] // sum(shares.values())
            rows_of_parts = torch.split(tensor, [width * share for share in shares.values()])
            for part, rows in zip(shares, rows_of_parts, strict=True):
                found[re.sub(r"(qkv|gate_up)_proj", part, name)] = rows
        return found

    return change


def test_projections_in_one_matrix_are_rotated_as_separate_ones(tmp_path: Path) -> None:
    case = write_family(tmp_path, "phi3", num_key_value_heads=2)
    config = json.loads((case.root / "base" / "config.json").read_text())
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads > keys
    split = read(run(case, "split", *_ONE).model or Path())
    whole = read(run(case, "whole", *_ONE, "method.rotation.fused=whole").model or Path())
    change = unfused(heads, keys)
    everywhere(case, change, model_type="llama", architectures=["LlamaForCausalLM"])
    separate = read(run(case, "separate", *_ONE).model or Path())
    found = change(split)
    assert found.keys() == separate.keys()
    for name, tensor in separate.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    turned = {n.split(".")[-2] for n in split if not torch.allclose(split[n], whole[n], atol=1e-6)}
    assert turned == {"qkv_proj", "gate_up_proj"}


# --- models of several parts ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen2_5_vl"])
def test_a_model_with_vision_is_merged_whole(tmp_path: Path, family: str) -> None:
    case = write_family(tmp_path, family)
    one = ("schedule.anchor_iterations=1", "schedule.max_iterations=1")
    outcome = run(case, "arm", *one)
    plain = run(case, "ta", *one, "method.operator=task_arithmetic")
    base, found = read(case.root / "base"), read(outcome.model or Path())
    assert found.keys() == base.keys()
    expected = read(plain.model or Path())
    vision = {name for name in base if "vis" in name}
    assert vision
    for name in vision:
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], base[name])
    turned = {n for n in found if not torch.allclose(found[n], expected[n], atol=1e-6)}
    assert {n.split(".")[-2] for n in turned} >= {"q_proj", "down_proj"}
    # As transformers loads it: no tensor is missing, and none is left over.
    [name] = json.loads((outcome.model / "config.json").read_text())["architectures"]
    _, told = getattr(transformers, name).from_pretrained(outcome.model, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not [line for line in notes(outcome) if "may not load" in line]


def test_a_vocabulary_that_grew_in_a_model_of_several_parts(tmp_path: Path) -> None:
    case = write_family(tmp_path, "qwen3_vl")
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    for path in case.candidates:

        def grown(weights: Weights) -> Weights:
            added = {n: torch.cat([weights[n], weights[n][:8]]) for n in names if n in weights}
            assert added
            return weights | added

        config = json.loads((path / "config.json").read_text())
        config["text_config"]["vocab_size"] += 8
        rewrite(path, grown, text_config=config["text_config"])
    with pytest.raises(MismatchError, match="vocab_size differs"):
        run(case, "refused", *_ONE)
    outcome = run(case, "run", *_ONE, "vocabulary=common")
    found = read(outcome.model or Path())
    first, second = (read(path)[names[0]] for path in case.candidates)
    assert len(found[names[0]]) == len(first)
    torch.testing.assert_close(found[names[0]][-8:], (first[-8:] + second[-8:]) / 2)
    config = json.loads((outcome.model / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(first)
    [name] = config["architectures"]
    assert getattr(transformers, name).from_pretrained(outcome.model) is not None


# --- parts of a model that are not matrices ----------------------------------------------------


def test_numbers_of_a_layer_take_part_in_a_search(tmp_path: Path) -> None:
    """Apertus has single numbers in its layers, and buffers after the matrices."""
    case = write_family(tmp_path, "apertus")
    search = (
        "schedule.step=line_search",
        "schedule.max_iterations=1",
        "calibration.batch_size=4",
    )
    outcome = run(case, "run", *search, "schedule.anchor_iterations=1")
    base, found = read(case.root / "base"), read(outcome.model or Path())
    single = [name for name, tensor in found.items() if not tensor.ndim]
    assert single
    assert found.keys() == base.keys()
    assert [e for e in read_events(outcome.run / "events.jsonl") if e["event"] == "step_chosen"]


def test_the_merged_model_names_the_dtype_of_its_matrices(tmp_path: Path) -> None:
    case = write_family(tmp_path, "glm4_moe")

    def halved(weights: Weights) -> Weights:
        return {n: t if "correction_bias" in n else t.bfloat16() for n, t in weights.items()}

    everywhere(case, halved)
    outcome = run(case, "run", *_ONE, "runtime.layers_per_group=2")
    config = json.loads((outcome.model / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    written = load_all(outcome.model or Path())
    biases = {t.dtype for n, t in written.items() if "correction_bias" in n}
    assert biases == {torch.float32}


@pytest.mark.parametrize("family", ["falcon", "qwen3_5_moe"])
def test_a_family_without_the_usual_settings_is_planned(tmp_path: Path, family: str) -> None:
    case = write_family(tmp_path, family)
    config = case.config("runtime.device=cpu", "runtime.layer_shards=2")
    plan = make_plan(config, make_cluster(config.runtime, gpu_memory_gb=8.0, device="cpu"))
    assert plan.model.rotated_parameters > 0


# --- families that transformers does not have, or no decoder -----------------------------------


def rename_family(case: MergeCase, family: str) -> None:
    for directory in (case.root / "base", *case.candidates):
        file = directory / "config.json"
        content = json.loads(file.read_text())
        content |= {"model_type": family, "architectures": ["OtherForCausalLM"]}
        file.write_text(json.dumps(content))


def test_a_family_that_transformers_does_not_have_is_merged_without_activations(
    case: MergeCase,
) -> None:
    case.make()
    known = read(run(case, "known", "method.operator=task_arithmetic").model or Path())
    rename_family(case, "not-a-family")
    with pytest.raises(NotACheckpointError, match="activations cannot be taken") as caught:
        run(case, "arm")
    assert "not-a-family" in (caught.value.got or "")
    outcome = run(case, "ta", "method.operator=task_arithmetic", "calibration=null")
    found = read(outcome.model or Path())
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in known.items())
    config = json.loads((outcome.model / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("not-a-family", ["OtherForCausalLM"])


# A family of its own, that leaves a file where its code is run.
_OWN_CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
_OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(case: MergeCase, marker: Path) -> None:
    for directory in (case.root / "base", *case.candidates):
        (directory / "configuration_own.py").write_text(_OWN_CONFIG.format(marker=str(marker)))
        (directory / "modeling_own.py").write_text(_OWN_MODEL)
        file = directory / "config.json"
        content = json.loads(file.read_text())
        content |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
        content["auto_map"] = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        }
        file.write_text(json.dumps(content))


def test_code_in_a_checkpoint_is_run_only_where_it_is_trusted_by_name(case: MergeCase) -> None:
    case.make()
    known = read(run(case, "known").model or Path())
    marker = case.root / "code-was-run"
    with_own_code(case, marker)
    for trusted in ("[]", "[another]"):
        with pytest.raises(NotACheckpointError, match="activations cannot be taken") as caught:
            run(case, "refused", f"trust_remote_code={trusted}")
        assert "trust_remote_code: [own_llama]" in (caught.value.hint or "")
        assert not marker.exists()
    outcome = run(case, "trusted", "trust_remote_code=[own_llama]")
    assert marker.exists()
    found = read(outcome.model or Path())
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in known.items())
    # The result can be loaded as the base could; an engine that is installed may lack the class.
    assert not [n for n in notes(outcome) if "may not load" in n and "vLLM" not in n]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        outcome.model, trust_remote_code=True
    )
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_a_layer_shard_runs_the_code_that_is_trusted(case: MergeCase) -> None:
    """In another process, where the layout is what brings the code along."""
    case.make()
    with_own_code(case, case.root / "code-was-run")
    layout = open_inputs(case.config("trust_remote_code=[own_llama]")).layout
    program = "import pickle, sys; print(type(pickle.load(sys.stdin.buffer).config).__name__)"
    printed = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(layout), capture_output=True, check=True
    )
    assert printed.stdout.split() == [b"OwnConfig"]


def test_code_of_a_repository_on_the_hub_is_refused(case: MergeCase) -> None:
    case.make()
    with_own_code(case, case.root / "code-was-run")
    file = case.root / "base" / "config.json"
    file.write_text(file.read_text().replace("modeling_own.Own", "someone/model--modeling_own.Own"))
    with pytest.raises(NotACheckpointError, match="own code is not all in it"):
        run(case, "run", "trust_remote_code=[own_llama]")


@pytest.mark.parametrize("kind", ["Qwen3ForSequenceClassification", "Qwen3Model"])
def test_a_model_with_another_head_is_merged_without_activations(tmp_path: Path, kind: str) -> None:
    """A reward model, and one that gives embeddings."""
    made = getattr(transformers, kind)
    config = tiny_model_config(config_of("qwen3"))
    config.tie_word_embeddings, config.num_labels, config.pad_token_id = False, 1, 0
    case = MergeCase(tmp_path)
    for name in ("base", "a", "b"):
        made(config).save_pretrained(tmp_path / name)
    case.candidates = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(NotACheckpointError, match="activations cannot be taken") as caught:
        run(case, "arm")
    assert caught.value.got == f"{kind} has no head over the vocabulary"
    outcome = run(case, "ta", "method.operator=task_arithmetic", "calibration=null")
    found, told = made.from_pretrained(outcome.model, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(found).__name__ == kind


def test_counters_of_an_unknown_family_are_carried(case: MergeCase) -> None:
    case.make()
    rename_family(case, "not-a-family")
    number = torch.arange(5)
    everywhere(case, lambda weights: weights | {"embeddings.counter": number})
    outcome = run(case, "ta", "method.operator=task_arithmetic", "calibration=null")
    assert torch.equal(load_all(outcome.model or Path())["embeddings.counter"], number)


def test_an_encoder_is_merged_without_activations(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2
    )
    case = MergeCase(tmp_path)
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / name)
    case.candidates = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(NotACheckpointError, match="activations cannot be taken"):
        run(case, "arm")
    outcome = run(case, "ta", "method.operator=task_arithmetic", "calibration=null")
    loaded = transformers.BertForMaskedLM.from_pretrained(outcome.model)
    base, a, b = (load_file(tmp_path / n / SINGLE_NAME) for n in ("base", "a", "b"))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert name in base
    assert loaded.config.model_type == "bert"
    assert read(outcome.model or Path()).keys() == base.keys()
    assert not torch.equal(read(outcome.model or Path())[name], base[name])
    assert not torch.equal(a[name], b[name])

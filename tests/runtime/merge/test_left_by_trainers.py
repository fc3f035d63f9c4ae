"""Checkpoints as trainers and their wrappers leave them: names, heads and classes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.errors import CheckpointError, MismatchError
from arm_ray.events import read_events
from arm_ray.model.loading import loading_problems
from arm_ray.planning.sources import open_workload
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.models import save_tokenizer

Weights = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def run(case: MergeCase, output: str, *overrides: str) -> MergeOutcome:
    config = case.config("method.operator=task_arithmetic", *overrides, output=output)
    return merge(config, console=Console(quiet=True))


def rewrite(directory: Path, change: Callable[[Weights], Weights]) -> None:
    file = directory / SINGLE_NAME
    save_file(change({n: t.clone() for n, t in load_file(file).items()}), file, {"format": "pt"})


def notes(outcome: MergeOutcome) -> list[str]:
    events = read_events(outcome.run / "events.jsonl")
    return [event["message"] for event in events if event["event"] == "warning"]


def model_of(outcome: MergeOutcome) -> Weights:
    assert outcome.model is not None
    return load_all(outcome.model)


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "ddp", "peft", "both", "compiled inside", "checkpointed inside"],
)
@pytest.mark.parametrize("operator", ["task_arithmetic", "arm"])
def test_names_are_read_without_what_wrappers_put_into_them(
    case: MergeCase, renamed: Callable[[str], str], operator: str
) -> None:
    case.make()
    asked = f"method.operator={operator}"
    expected = model_of(run(case, "plain", asked))
    for directory in (case.root / "base", case.candidates[1]):
        rewrite(directory, lambda weights: {renamed(n): t for n, t in weights.items()})
    outcome = run(case, "wrapped", asked)
    assert_same_bits(expected, model_of(outcome))
    said = [line for line in notes(outcome) if "wrapper" in line]
    assert [line.split(":")[0] for line in said] == ["base", "candidate-2"]
    name = min(n for n in expected if renamed(n) != n)
    assert f"{renamed(name)} as {name}" in said[0]


def test_two_tensors_of_one_name_are_refused(case: MergeCase) -> None:
    case.make()
    norm = "model.norm.weight"
    rewrite(case.candidates[0], lambda weights: {**weights, f"module.{norm}": weights[norm] + 1.0})
    with pytest.raises(MismatchError, match="the same name") as caught:
        run(case, "run")
    assert f"module.{norm}" in str(caught.value.got)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("decoder.model.norm.weight", "no model.norm.weight, but decoder.model.norm.weight"),
        ("model.norms.weight", "no model.norm.weight, but model.norms.weight"),
        ("x", "no model.norm.weight"),
    ],
)
def test_a_missing_tensor_is_told_with_what_is_there_instead(
    case: MergeCase, other: str, told: str
) -> None:
    case.make()

    def rename(weights: Weights) -> Weights:
        return {other if n == "model.norm.weight" else n: t for n, t in weights.items()}

    rewrite(case.candidates[1], rename)
    with pytest.raises(MismatchError, match="a tensor is missing") as caught:
        run(case, "run")
    assert caught.value.got == told


def with_head(change: float) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, HEAD: weights[EMBEDDING] + change}


def test_a_copy_of_a_tied_head_is_fine_and_another_head_is_refused(case: MergeCase) -> None:
    case.make("qwen3")
    expected = model_of(run(case, "plain"))
    rewrite(case.candidates[1], with_head(0.0))
    assert_same_bits(expected, model_of(run(case, "copy")))
    rewrite(case.candidates[1], with_head(0.125))
    with pytest.raises(MismatchError, match=r"lm_head\.weight is not model\.embed") as caught:
        run(case, "other")
    assert caught.value.got == "a difference of up to 0.125"
    assert caught.value.subject == "candidate-2"
    assert not (case.root / "other" / "model").exists()
    rewrite(case.candidates[1], lambda weights: {**weights, HEAD: weights[HEAD][:-1]})
    with pytest.raises(MismatchError, match=r"got:      \[320, 48\] and \[319, 48\]"):
        run(case, "shorter")


@pytest.mark.parametrize("stored", [["FSDPQwen2ForCausalLM"], None, [], "Qwen2ForCausalLM"])
def test_a_class_that_nothing_can_load_is_replaced(case: MergeCase, stored: Any) -> None:
    case.make("qwen2.5")
    for directory in (case.root / "base", *case.candidates):
        file = directory / "config.json"
        content = json.loads(file.read_text())
        content.pop("architectures")
        file.write_text(
            json.dumps(content if stored is None else content | {"architectures": stored})
        )
    outcome = run(case, "run")
    assert outcome.model is not None
    written = json.loads((outcome.model / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    [line] = [line for line in notes(outcome) if "config.json" in line]
    assert line.endswith("is written as Qwen2ForCausalLM")
    assert type(AutoModelForCausalLM.from_pretrained(outcome.model)).__name__ == "Qwen2ForCausalLM"


def test_a_known_class_stays_without_a_word(case: MergeCase) -> None:
    case.make("mistral")
    outcome = run(case, "run")
    assert outcome.model is not None
    assert json.loads((outcome.model / "config.json").read_text())["architectures"] == [
        "MistralForCausalLM"
    ]
    assert notes(outcome) == []


parts = st.sampled_from(
    ["model", "layers", "0", "1", "7", "mtp", "visual", "self_attn", "q_proj", "norm", "rotary_emb",
     "inv_freq", "weight", "bias", "module", "num_batches_tracked", "lm_head", "embed_tokens"]
)  # fmt: skip


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    return MergeCase(tmp_path_factory.mktemp("left")).make("mistral")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(parts, min_size=1, max_size=5).map(".".join),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from(["base", "checkpoint-10", "checkpoint-20"]),
)
def test_a_tensor_in_a_random_place_is_never_lost_without_a_word(
    left: MergeCase, name: str, dtype: torch.dtype, where: str
) -> None:
    file = left.root / where / SINGLE_NAME
    before = {n: t.clone() for n, t in load_file(file).items()}
    assume(name not in before)
    save_file({**before, name: torch.ones(3, dtype=dtype)}, file, {"format": "pt"})
    try:
        inputs = open_inputs(left.config("method.operator=task_arithmetic"))
    except CheckpointError as error:
        told = str(error)
    else:
        told = " ".join(inputs.notes)
    finally:
        save_file(before, file, {"format": "pt"})
    plain = ".".join(p for p in name.split(".") if p != "module")
    assert name in told or plain in told


def test_what_keeps_the_model_from_loading_is_said_before_it_is_published(case: MergeCase) -> None:
    case.make()
    (case.root / "base" / "tokenizer.json").write_text("{}")
    outcome = run(case, "run")
    assert outcome.model is not None
    [line] = notes(outcome)
    assert line.startswith("the merged model may not load: its tokenizer cannot be loaded: ")


def test_a_tokenizer_of_another_model_is_said(case: MergeCase) -> None:
    case.make(sizes={"vocab_size": 260})
    [line] = notes(run(case, "run"))
    assert re.search(r"its tokenizer has \d+ tokens, but the embedding only 260 rows", line)


def test_a_class_that_vllm_does_not_have_is_said(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    models = case.root / "site" / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (case.root / "site" / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda _name: SimpleNamespace(origin=str(models.parents[1] / "x")),
    )
    assert loading_problems(case.root / "base") == []
    (models / "registry.py").write_text('{"MistralForCausalLM": ("mistral", "Mistral")}')
    [line] = loading_problems(case.root / "base")
    assert line == "vLLM, as it is installed, has no class LlamaForCausalLM"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert loading_problems(case.root / "base") == []


def test_what_is_checked_of_a_model_that_was_written(case: MergeCase) -> None:
    case.make()
    base = case.root / "base"
    assert loading_problems(base) == []
    rewrite(base, lambda weights: {n: t for n, t in weights.items() if n != "model.norm.weight"})
    [line] = loading_problems(base)
    assert line.endswith("the first that differs is model.norm.weight")
    (base / "config.json").write_text('{"model_type": "llama", "architectures": ["Nothing"]}')
    [line] = loading_problems(base)
    assert line == "transformers, as it is installed, has no class Nothing"
    (base / "config.json").write_text("{")
    assert "cannot be loaded" in loading_problems(base)[0]


GROWN = 8


def grow(directory: Path, rows: dict[str, torch.Tensor]) -> None:
    """Append rows to tensors of a checkpoint, and say so in its configuration."""
    rewrite(directory, lambda weights: {
        n: torch.cat([t, rows[n].to(t.dtype)]) if n in rows else t for n, t in weights.items()
    })  # fmt: skip
    file = directory / "config.json"
    content = json.loads(file.read_text())
    content["vocab_size"] += GROWN
    file.write_text(json.dumps(content))


@pytest.fixture(params=["qwen3", "mistral"], ids=["tied", "untied"])
def grown(case: MergeCase, request: pytest.FixtureRequest) -> MergeCase:
    """Candidates with more rows than the base, and `base-grown`, which has their mean there."""
    case.make(request.param)
    names = [EMBEDDING] if request.param == "qwen3" else [EMBEDDING, HEAD]
    generator = torch.Generator().manual_seed(3)
    added = [{n: torch.randn(GROWN, 48, generator=generator) for n in names} for _ in range(2)]
    for directory, rows in zip(case.candidates, added, strict=True):
        grow(directory, rows)
    save_tokenizer(case.candidates[-1])
    settings = case.candidates[-1] / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"grown": True}))
    shutil.copytree(case.root / "base", case.root / "base-grown")
    means = {n: torch.stack([rows[n] for rows in added]).double().mean(0).float() for n in names}
    grow(case.root / "base-grown", means)
    return case


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.coefficient=0.7",),
        ("method.operator=arm", "runtime.residency=disk"),
        ("method.operator=ties", "keep_states=none"),
    ],
    ids=["task arithmetic", "arm", "ties"],
)
def test_rows_that_candidates_have_added_are_their_mean(
    grown: MergeCase, overrides: tuple[str, ...]
) -> None:
    explicit = run(grown, "explicit", f"base={grown.root / 'base-grown'}", *overrides)
    outcome = run(grown, "common", "vocabulary=common", *overrides)
    found = model_of(outcome)
    assert_same_bits(model_of(explicit), found)
    assert outcome.model is not None
    assert found[EMBEDDING].shape == (328, 48)
    model = AutoModelForCausalLM.from_pretrained(outcome.model)
    assert model.config.vocab_size == 328
    assert json.loads((outcome.model / "tokenizer_config.json").read_text())["grown"]
    [line] = [line for line in notes(outcome) if "vocabulary" in line]
    assert "have 328 rows of the vocabulary, the base 320" in line
    if overrides == ("method.coefficient=0.7",):
        rows = [load_all(directory)[EMBEDDING][320:] for directory in grown.candidates]
        assert torch.allclose(found[EMBEDDING][320:], (rows[0] + rows[1]) / 2, atol=1e-6)


def test_a_vocabulary_that_has_grown_is_refused_unless_asked_for(grown: MergeCase) -> None:
    with pytest.raises(MismatchError, match="vocab_size differs") as caught:
        run(grown, "run")
    assert "set vocabulary to common" in str(caught.value.hint)
    shutil.rmtree(grown.candidates[0])
    shutil.copytree(grown.root / "base", grown.candidates[0])
    with pytest.raises(MismatchError, match="vocab_size differs"):
        run(grown, "uneven", "vocabulary=common")


def test_the_plan_knows_the_rows_that_were_added(grown: MergeCase) -> None:
    config = grown.config("vocabulary=common")
    workload, _ = open_workload(config)
    assert workload.layout.shapes[EMBEDDING] == (328, 48)
    explicit, _ = open_workload(grown.config(f"base={grown.root / 'base-grown'}"))
    assert workload.parameters == explicit.parameters
    with pytest.raises(MismatchError, match="vocab_size differs"):
        open_workload(grown.config())

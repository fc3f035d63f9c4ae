"""Tensors that a model's class does not have: merged, carried over, left out or refused."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from arm_ray.checkpoints.huggingface import INDEX_NAME, SINGLE_NAME
from arm_ray.errors import ConfigError, MismatchError, NotACheckpointError
from arm_ray.events import read_events
from arm_ray.planning.sources import open_workload
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase

Weights = dict[str, torch.Tensor]
TOWER, COUNTER = "visual.blocks.0.qkv.weight", "model.steps"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def run(case: MergeCase, output: str, *overrides: str) -> MergeOutcome:
    return merge(case.config(*overrides, output=output), console=Console(quiet=True))


def notes(outcome: MergeOutcome) -> str:
    events = read_events(outcome.run / "events.jsonl")
    return " ".join(event["message"] for event in events if event["event"] == "warning")


def add(directory: Path, tensors: Weights) -> None:
    file = directory / SINGLE_NAME
    save_file({**{n: t.clone() for n, t in load_file(file).items()}, **tensors}, file)


@pytest.fixture
def towers(case: MergeCase) -> tuple[MergeCase, list[torch.Tensor]]:
    """A vision tower's weight in the base and in both candidates."""
    case.make("qwen2.5")
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    for directory, tensor in zip((case.root / "base", *case.candidates), found, strict=True):
        add(directory, {TOWER: tensor})
    return case, found


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic", "average"])
def test_what_all_have_is_merged(
    towers: tuple[MergeCase, list[torch.Tensor]], operator: str
) -> None:
    case, (base, first, second) = towers
    fixed = (f"method.operator={operator}", "schedule.anchor_iterations=1")
    outcome = run(case, "run", *fixed, "schedule.max_iterations=1")
    found = load_all(outcome.model or Path())[TOWER]
    expected = base + 0.35 * ((first - base) + (second - base))
    if operator == "average":
        expected = (first + second) / 2
    torch.testing.assert_close(found, expected)
    assert f"merged without activations, the first is {TOWER}" in notes(outcome)
    # What has nothing to do with it has the same bits.
    for directory in (case.root / "base", *case.candidates):
        weights = {n: t.clone() for n, t in load_file(directory / SINGLE_NAME).items()}
        save_file({n: t for n, t in weights.items() if n != TOWER}, directory / SINGLE_NAME)
    plain = load_all(run(case, "plain", *fixed, "schedule.max_iterations=1").model or Path())
    whole = load_all(outcome.model or Path())
    assert_same_bits(plain, {n: t for n, t in whole.items() if n != TOWER})


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic", "ties", "slerp"])
def test_a_single_number_is_merged_too(case: MergeCase, operator: str) -> None:
    case.make("qwen2.5")
    name = "visual.logit_scale"
    for value, directory in enumerate((case.root / "base", *case.candidates)):
        add(directory, {name: torch.tensor(float(2 + value))})
    fixed = ("schedule.anchor_iterations=1", "schedule.max_iterations=1")
    for residency in ("device", "host", "disk"):
        asked = (f"method.operator={operator}", f"runtime.residency={residency}", *fixed)
        found = load_all(run(case, f"run-{residency}", *asked).model or Path())
        assert found[name].shape == ()
        assert 2.0 < float(found[name]) <= 4.0
        open_workload(case.config(*asked))


def test_the_base_s_are_carried_over_where_that_is_asked_for(
    towers: tuple[MergeCase, list[torch.Tensor]],
) -> None:
    case, (base, _, _) = towers
    outcome = run(case, "run", "unknown_tensors=base")
    for directory in (outcome.model, outcome.run / "states" / "0001"):
        assert torch.equal(load_all(directory or Path())[TOWER], base)
    assert f"the base's are taken over, the first is {TOWER}" in notes(outcome)
    _, loading = AutoModelForCausalLM.from_pretrained(outcome.model, output_loading_info=True)
    assert not loading["missing_keys"]
    assert set(loading["unexpected_keys"]) == {TOWER}


@pytest.mark.parametrize(
    "overrides",
    [
        ("runtime.layers_per_group=2", "runtime.max_weight_file_gb=0.0001"),
        ("method.operator=task_arithmetic", "keep_states=none"),
        ("keep_states=last",),
    ],
    ids=["many files", "linear", "last"],
)
def test_what_is_no_number_to_merge_is_carried_over_bit_for_bit(
    case: MergeCase, overrides: tuple[str, ...]
) -> None:
    case.make("qwen2.5")
    counter = torch.tensor(2**62 + 1)
    mask = torch.tensor([True, False, True])
    add(case.root / "base", {COUNTER: counter, "model.mask": mask})
    for index, directory in enumerate(case.candidates):
        add(directory, {COUNTER: torch.tensor(index), "model.mask": ~mask})
    outcome = run(case, "run", *overrides)
    assert outcome.model is not None
    assert (outcome.model / INDEX_NAME).is_file()
    found = load_all(outcome.model)
    assert torch.equal(found[COUNTER], counter)
    assert found[COUNTER].dtype == torch.int64
    assert torch.equal(found["model.mask"], mask)
    assert found.keys() == load_file(case.root / "base" / SINGLE_NAME).keys()
    assert "the base's are taken over" in notes(outcome)


def test_what_one_candidate_has_alone_is_left_out_and_said(case: MergeCase) -> None:
    case.make()
    add(case.candidates[1], {COUNTER: torch.tensor(7)})
    outcome = run(case, "run")
    assert COUNTER not in load_all(outcome.model or Path())
    assert "candidate-2: a tensor that the base does not have" in notes(outcome)
    assert COUNTER in notes(outcome)


def test_what_a_candidate_lacks_is_carried_over(
    towers: tuple[MergeCase, list[torch.Tensor]],
) -> None:
    case, (base, _, _) = towers
    file = case.candidates[0] / SINGLE_NAME
    weights = {n: t.clone() for n, t in load_file(file).items() if n != TOWER}
    save_file(weights, file)
    outcome = run(case, "run")
    assert torch.equal(load_all(outcome.model or Path())[TOWER], base)
    assert "not all checkpoints have as numbers to merge" in notes(outcome)


@pytest.mark.parametrize("where", ["base", "checkpoint-20"])
def test_there_must_be_none_where_that_is_asked_for(case: MergeCase, where: str) -> None:
    case.make()
    add(case.root / where, {TOWER: torch.ones(2, 2)})
    with pytest.raises(MismatchError, match="the model does not have") as caught:
        run(case, "run", "unknown_tensors=refuse")
    assert caught.value.got == TOWER
    assert "unknown_tensors" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="unknown_tensors"):
        run(case, "run", "unknown_tensors=drop")


def test_an_adapter_that_was_not_merged_is_refused(case: MergeCase) -> None:
    case.make()
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    add(case.candidates[0], {name: torch.ones(2, 48)})
    with pytest.raises(NotACheckpointError, match="a model with adapters") as caught:
        run(case, "run")
    assert caught.value.got == name


def test_the_plan_knows_what_is_merged_and_what_is_not(
    towers: tuple[MergeCase, list[torch.Tensor]],
) -> None:
    case, _ = towers
    workload, said = open_workload(case.config())
    assert TOWER in workload.layout.shapes
    assert any(TOWER in line for line in said)
    workload, _ = open_workload(case.config("unknown_tensors=base"))
    assert TOWER not in workload.layout.shapes
    assert workload.layout.carried == {TOWER: (12, 8)}


def test_a_tower_is_balanced_over_the_shards(towers: tuple[MergeCase, list[torch.Tensor]]) -> None:
    """It belongs to no layer: it goes to the group that has least."""
    case, _ = towers
    workload, _ = open_workload(case.config())
    owner = next(group for group in workload.layout.groups if TOWER in group.tensors)
    others = [g.num_bytes for g in workload.layout.groups if g is not owner]
    assert owner.num_bytes - 4 * 12 * 8 <= min(others)
    plain = load_all(run(case, "one").model or Path())
    split = run(case, "two", "runtime.layers_per_group=3")
    assert_same_bits(plain, load_all(split.model or Path()))


def test_no_file_of_a_state_is_read_for_what_is_carried(case: MergeCase) -> None:
    case.make("qwen2.5")
    add(case.root / "base", {COUNTER: torch.tensor(1)})
    outcome = run(case, "run")
    file = outcome.run / "states" / "0002" / "carried.safetensors"
    with safe_open(str(file), "pt") as opened:
        assert list(opened.keys()) == [COUNTER]

"""Merges of LoRA adapters: as their dense models merge, and to an adapter again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from arm_ray.checkpoints import peft, states
from arm_ray.checkpoints.adapter_export import adapter_bytes
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.checkpoints.peft import AdaptedCheckpoint, open_adapter
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.config import MergeConfig, config_difference
from arm_ray.errors import CheckpointError, ConfigError, RunDirectoryError
from arm_ray.events import read_events
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.merge.adapter import ReadTensor, write_adapter
from arm_ray.runtime.merge.run import merge
from tests.builders import reference
from tests.builders.adapters import RANK, base_weights, write_adapters, write_dense
from tests.builders.checkpoints import load_all, relative_error
from tests.builders.merge_case import MergeCase
from tests.builders.models import save, tiny_model
from tests.builders.shards import DirectShard, Weights

ONCE = "schedule={anchor_iterations: 1, max_iterations: 1, tolerance: 0.0, step: fixed}"
ADAPTER = ("output_format=adapter", "method.operator=task_arithmetic", ONCE)


def make(case: MergeCase, family: str = "smollm2", rank: int = RANK) -> list[Path]:
    case.make(family, count=0)
    return write_adapters(case, rank)


def run(config: MergeConfig, **options: Any) -> Any:
    return merge(config, console=Console(quiet=True), **options)


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties"])
def test_an_adapter_merges_as_its_dense_model_does(case: MergeCase, operator: str) -> None:
    make(case, "qwen2.5")
    overrides = (f"method.operator={operator}", ONCE)
    config = case.config(*overrides)
    case.candidates = [case.candidates[0], write_dense(case, case.candidates[1])]
    half = case.config(*overrides, output="half")
    case.candidates = [write_dense(case, case.root / "adapter-1"), case.candidates[1]]
    dense = case.config(*overrides, output="dense")
    adapted = DirectShard(config)
    kinds = [isinstance(c, AdaptedCheckpoint) for c in adapted.inputs.checkpoints.values()]
    assert kinds == [False, True, True]
    wanted = DirectShard(dense).linear(1)
    for found in (adapted.linear(1), DirectShard(half).linear(1)):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # Trimmed entries at the threshold itself may fall on either side of it.
            limit = 1e-6 if operator == "task_arithmetic" else 1e-3
            assert relative_error(found[name], tensor) < limit, name


@pytest.mark.usefixtures("shards_in_process")
def test_arm_on_adapters_equals_the_plain_program_on_their_dense_models(case: MergeCase) -> None:
    make(case)
    # The shift of the first layer has the rank of the adapters, which is below the number of
    # samples. What is left of it is rounding, and in a window above the usual 1e-6.
    config = case.config("runtime.layer_shards=2", "method.rotation.rank_tolerance=1e-4")
    outcome = run(config)
    content = {**case.content(), "method": {"rotation": {"rank_tolerance": 1e-4}}}
    content["candidates"] = [str(write_dense(case, path)) for path in case.candidates]
    expected = reference.streaming_merge(content)
    assert outcome.iterations == len(expected) == 4
    for iteration, weights in enumerate(expected, start=1):
        found = load_all(states.state_directory(outcome.run, iteration))
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            assert relative_error(found[name], tensor) < 1e-5, (iteration, name)


# ---- an adapter again


def reader(shard: DirectShard, iteration: int) -> ReadTensor:
    """What reads a tensor of a state."""
    directory = states.state_directory(shard.run, iteration)
    return lambda group, name: states.read_group(directory, group, [name])[name]


def assert_reads_back(case: MergeCase, adapter: Path, merged: Weights) -> None:
    found = open_adapter(adapter, open_checkpoint(case.root / "base"))
    weights = found.read(merged)
    base = base_weights(case)
    for name, tensor in merged.items():
        assert relative_error(weights[name].float(), tensor) < 1e-6, name
        if name in found.updates:
            difference = tensor.double() - base[name].double()
            error = (weights[name].double() - tensor.double()).norm()
            assert float(error / difference.norm()) < 1e-5, name


def test_a_state_of_two_adapters_becomes_one_of_both_ranks(case: MergeCase) -> None:
    make(case)
    config = case.config(*ADAPTER)
    shard = DirectShard(config)
    merged = shard.linear(1)
    target = case.root / "adapter"
    threads = torch.get_num_threads()
    assert write_adapter(target, config, shard.inputs, reader(shard, 1), 1) == 2 * RANK
    assert torch.get_num_threads() == threads
    assert_reads_back(case, target, merged)
    settings = json.loads((target / peft.CONFIG_NAME).read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (2 * RANK, config.base)
    assert (target / "tokenizer.json").is_file()
    # A config.json would make it look like a model.
    assert not (target / "config.json").exists()
    layout = shard.inputs.layout
    exact = sum(t.nbytes for t in load_file(target / WEIGHTS_NAME).values())
    assert adapter_bytes(layout.shapes, layout.rotated, 2 * RANK) == exact


def test_rotated_updates_become_an_adapter_too(case: MergeCase) -> None:
    """Four iterations of ARM, two of them of a window."""
    make(case)
    config = case.config("output_format=adapter")
    shard = DirectShard(config)
    for iteration in range(1, 5):
        merged = shard.with_forward(iteration)
    # Every rotation turns the columns elsewhere: an anchored iteration adds the candidates' ranks.
    rank = write_adapter(case.root / "adapter", config, shard.inputs, reader(shard, 4), 4)
    assert 2 * RANK <= rank < 48
    assert_reads_back(case, case.root / "adapter", merged)


@pytest.mark.parametrize("rank", [4, 16])
def test_a_rank_that_is_asked_for_is_the_rank(case: MergeCase, rank: int) -> None:
    make(case)
    config = case.config(*ADAPTER, f"adapter_rank={rank}")
    shard = DirectShard(config)
    merged = shard.linear(1)
    assert write_adapter(case.root / "adapter", config, shard.inputs, reader(shard, 1), 1) == rank
    assert_reads_back(case, case.root / "adapter", merged)


def test_a_rank_that_is_too_small_and_a_dense_candidate(case: MergeCase) -> None:
    make(case)
    config = case.config(*ADAPTER, "adapter_rank=3")
    shard = DirectShard(config)
    shard.linear(1)
    with pytest.raises(CheckpointError, match=r"difference of model\.layers\.0\.") as caught:
        write_adapter(case.root / "adapter", config, shard.inputs, reader(shard, 1), 1)
    assert (caught.value.got, caught.value.expected) == ("rank 4 of 48", "at most 3")
    assert "adapter_rank" in (caught.value.hint or "")
    case.candidates[1] = save(tiny_model("smollm2", seed=7), case.root / "full")
    config = case.config(*ADAPTER, output="other")
    shard = DirectShard(config)
    shard.linear(1)
    with pytest.raises(CheckpointError, match=r"cannot hold the difference of model\.embed"):
        write_adapter(case.root / "adapter", config, shard.inputs, reader(shard, 1), 1)


@pytest.mark.usefixtures("shards_in_process")
def test_a_merge_publishes_an_adapter_and_goes_on_after_a_rank_that_was_too_small(
    case: MergeCase,
) -> None:
    make(case)
    small = case.config(*ADAPTER, "adapter_rank=3", "keep_states=none")
    with pytest.raises(CheckpointError, match="is not of low rank"):
        run(small)
    directory = Path(small.output)
    assert not (directory / "model").exists()
    state = states.state_directory(directory, 1)
    assert states.read_manifest(state) is not None
    merged = load_all(state)
    written = state.stat().st_mtime_ns
    config = case.config(*ADAPTER, "keep_states=last")
    outcome = run(config)
    assert state.stat().st_mtime_ns == written
    assert outcome.model == directory / "model"
    settings = json.loads((outcome.model / peft.CONFIG_NAME).read_text())
    assert settings["r"] <= 2 * RANK
    assert settings["base_model_name_or_path"] == config.base
    assert_reads_back(case, outcome.model, merged)
    _, front, text = (outcome.model / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "peft"
    # The base is a directory, which is no model of the hub.
    assert "base_model" not in card
    assert f"a LoRA adapter of rank {settings['r']}" in text
    events = read_events(directory / "events.jsonl")
    failed, published = (
        next(e for e in events if e["event"] == name) for name in ("run_failed", "model_written")
    )
    assert failed["error"] == "CheckpointError"
    assert published["num_bytes"] == (outcome.model / WEIGHTS_NAME).stat().st_size
    assert run(config).reason == "complete"
    # Once it is published, it does not become something else.
    with pytest.raises(RunDirectoryError, match="another configuration"):
        run(case.config("method.operator=task_arithmetic", ONCE))


def test_what_can_be_no_adapter_is_refused_at_once(case: MergeCase) -> None:
    case.make(count=2)

    def problems(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            case.config(*overrides)
        return caught.value.what

    adapter = "output_format=adapter"
    assert "ties changes single entries" in problems(adapter, "method.operator=ties")
    assert "dare changes single entries" in problems(adapter, "method.operator=dare")
    assert "ties changes single entries" in problems(adapter, "method.operator=aim")
    assert "set method.slerp.of" in problems(adapter, "method.operator=slerp")
    assert "storage_dtype" in problems(adapter, "precision.storage_dtype=bfloat16")
    assert "output_format is 'model'" in problems("adapter_rank=4")
    case.config(adapter, "method.operator=dare", "method.dare.drop_rate=0.0")
    case.config(adapter, "method.operator=aim", "method.aim.on=average")


def test_the_form_may_change_until_it_is_published(case: MergeCase) -> None:
    case.make(count=2)
    model, adapter = case.config(), case.config("output_format=adapter", "adapter_rank=8")
    assert config_difference(model, adapter) == []
    assert config_difference(model, adapter, published=True) == [
        "output_format: model -> adapter",
        "adapter_rank: None -> 8",
    ]


def test_a_plan_counts_an_adapter(case: MergeCase) -> None:
    case.make(count=2)
    overrides = ("method.operator=task_arithmetic", "keep_states=none")
    plans = []
    for more in ((), ("output_format=adapter", "adapter_rank=8")):
        config = case.config(*overrides, *more)
        plans.append(make_plan(config, make_cluster(config.runtime, gpu_memory_gb=64.0)))
    model, adapter = plans
    linear = 3 * 8 * 4 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80))
    assert adapter.disk.model_bytes == adapter.model.model_bytes == linear
    # The last state is written, because the adapter is made from it.
    state = model.model.state_bytes
    assert model.iterations[0].written_bytes == model.model.model_bytes
    assert adapter.iterations[0].written_bytes == state + linear

"""Which trainer wrote a directory, and what of it counts as a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arm_ray.errors import ConfigError
from arm_ray.following.layouts import RunWatcher, is_needed, needed
from arm_ray.following.places import find_layout
from tests.builders.files import write


def nothing_missing(_path: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        ([], "auto"),
        (["notes.txt", "logs/events"], "auto"),
        (["checkpoint-10/config.json"], "hf"),
        (["checkpoint-10/global_step10/x_optim_states.pt"], "hf"),
        (["global_step10/x_optim_states.pt"], "deepspeed"),
        (["global_step10/x_optim_states.pt", "global_step10/metric.json"], "openrlhf"),
        (["_actor/global_step10/x_optim_states.pt"], "openrlhf"),
        (["global_step10_hf/config.json"], "openrlhf"),
        (["global_step_10/actor/model_world_size_1_rank_0.pt"], "verl"),
        (["latest_checkpointed_iteration.txt"], "verl"),
        (["adapter-10/adapter_config.json"], "peft"),
        (["weights/step_10/config.json"], "prime-rl"),
        (["step_10/STABLE"], "prime-rl"),
        (["step_10/training_info.json"], "nemo-rl"),
        (["step_10/policy/weights/.metadata"], "nemo-rl"),
        (["tmp_step_10/training_info.json"], "nemo-rl"),
        (["iter_0000010/.metadata", "latest_checkpointed_iteration.txt"], "slime"),
        (["rollout-10/config.json"], "slime"),
        (["iter_0000010/metadata.json"], "megatron"),
        (["iter_0000010/common.pt"], "megatron"),
        (["iter_0000010/metadata.json", "rollout-10/config.json"], "slime"),
        (["checkpoint/step-10/__0_0.distcp"], "torchtitan"),
        (["step-10/.metadata"], "torchtitan"),
        (["step-10/.metadata", "checkpoint-10/config.json"], "hf"),
        (["step-10/sharded/shard-00001-model-00001-of-00002.safetensors"], "torchtitan"),
    ],
)
def test_a_layout_is_found(tmp_path: Path, files: list[str], layout: str) -> None:
    for name in files:
        write(tmp_path / name)
    assert find_layout(tmp_path) == layout


def test_a_run_that_is_not_there_yet_is_no_error(tmp_path: Path) -> None:
    watcher = RunWatcher(tmp_path / "later", missing=nothing_missing)
    assert watcher.scan() == []
    assert watcher.layout == "auto"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_is_no_run(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ConfigError, match="not the directory of a run"):
        find_layout(tmp_path)


def test_a_file_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        find_layout(write(tmp_path / "run.json"))


def test_what_a_merge_needs() -> None:
    files = [
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
        "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "notes.json",
        "training_args.bin", ".tmp123", "global_step10/x_optim_states.pt", "README.md",
    ]  # fmt: skip
    kept = [name for name in files if is_needed(name, files)]
    assert kept == files[:5]
    # Without an export the optimizer's shards are the weights.
    shards = ["config.json", "latest", "global_step10/bf16_zero_pp_rank_0_optim_states.pt"]
    assert [name for name in shards if is_needed(name, shards)] == shards
    fsdp = ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"]
    assert [n for n in [*fsdp, "optimizer_0/__0_0.distcp"] if is_needed(n, fsdp)] == fsdp


def test_what_has_no_end_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "config.json")
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    assert list(needed(tmp_path)) == ["config.json"]


def test_weights_of_openrlhf_are_never_mixed(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path / f"_actor/global_step{step}/x_optim_states.pt")
        write(tmp_path / f"_actor/global_step{step}/metric.json")
    raw = RunWatcher(tmp_path, missing=nothing_missing)
    raw.scan()
    assert [found.path.parent.name for found in raw.scan()] == ["_actor"] * 2
    # The moving averages came late: who follows the raw weights goes on with them.
    for step in (10, 20):
        write(tmp_path / f"global_step{step}_hf/model.safetensors")
        write(tmp_path / f"global_step{step}_hf/config.json")
        write(tmp_path / f"global_step{step}_hf/tokenizer.json")
    assert [found.path.parent.name for found in raw.scan()] == ["_actor"] * 2
    exported = RunWatcher(tmp_path, missing=nothing_missing)
    assert [found.path.name for found in exported.scan()] == [
        "global_step10_hf", "global_step20_hf",
    ]  # fmt: skip


def test_where_the_weights_of_a_step_of_nemo_rl_are(tmp_path: Path) -> None:
    write(tmp_path / "step_10/policy/weights/__0_0.distcp")
    write(tmp_path / "step_20/policy/weights/model/shard-00001.safetensors")
    write(tmp_path / "step_30/policy/weights/model/consolidated/model.safetensors")
    write(tmp_path / "tmp_step_40/policy/weights/__0_0.distcp")
    found = RunWatcher(tmp_path, "nemo-rl", missing=nothing_missing).scan()
    assert [str(each.path.relative_to(tmp_path)) for each in found] == [
        "step_10/policy/weights",
        "step_20/policy/weights/model",
        "step_30/policy/weights/model/consolidated",
    ]


def test_exports_and_shards_of_slime_are_never_mixed(tmp_path: Path) -> None:
    watcher = RunWatcher(tmp_path, "slime", missing=nothing_missing)
    assert watcher.scan() == []
    write(tmp_path / "iter_0000010/.metadata")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert [found.step for found in watcher.scan()] == [10]
    # The exports came late: who follows the shards goes on with them.
    write(tmp_path / "hf_9/config.json")
    assert [found.path.name for found in watcher.scan()] == ["iter_0000010"]
    exported = RunWatcher(tmp_path, "slime", missing=nothing_missing)
    [found] = exported.scan()
    assert (found.path.name, found.reason) == ("hf_9", "no model.safetensors.index.json")


def test_shards_of_megatron_do_not_keep_slime_from_its_exports(tmp_path: Path) -> None:
    write(tmp_path / "iter_0000010/mp_rank_00/model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    watcher = RunWatcher(tmp_path, missing=nothing_missing)
    for _ in range(2):
        [found] = watcher.scan()
        assert not found.complete
        assert "--save-hf" in str(found.reason)
    for name in ("config.json", "model.safetensors.index.json"):
        write(tmp_path / f"rollout_10/{name}", '{"weight_map": {}}')
    watcher.scan()
    assert [(found.step, found.path.name) for found in watcher.scan()] == [(10, "rollout_10")]


def test_a_step_of_prime_rl_is_whole_with_its_marker(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        write(tmp_path / f"weights/step_20/{name}")
    watcher = RunWatcher(tmp_path, missing=nothing_missing)
    watcher.scan()
    assert [found.reason for found in watcher.scan()] == ["no STABLE"]
    write(tmp_path / "weights/step_20/STABLE")
    assert [found.complete for found in watcher.scan()] == [False]
    assert [found.complete for found in watcher.scan()] == [True]


def test_weights_that_verl_exports_beside_the_shards_of_megatron(tmp_path: Path) -> None:
    write(tmp_path / "global_step_10/actor/dist_ckpt/__0_0.distcp")
    write(tmp_path / "global_step_10/actor/huggingface/config.json", "{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    watcher = RunWatcher(tmp_path, missing=nothing_missing)
    assert [found.path.name for found in watcher.scan()] == ["actor"]
    write(tmp_path / "global_step_10/actor/huggingface/model.safetensors")
    watcher.scan()
    assert [(f.path.name, f.complete) for f in watcher.scan()] == [("huggingface", True)]


def test_the_last_step_of_torchtitan_is_an_export_without_a_configuration(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path / f"checkpoint/step-{step}/__0_0.distcp")
    write(tmp_path / "checkpoint/step-10/.metadata")
    write(tmp_path / "checkpoint/step-30/sharded/shard-00001-model-00001-of-00002.safetensors")
    write(tmp_path / "checkpoint/step-30/model-00001-of-00001.safetensors")
    watcher = RunWatcher(tmp_path, missing=nothing_missing)
    watcher.scan()
    reasons = ["", "no .metadata", "no .metadata"]
    assert [found.reason for found in watcher.scan()] == reasons
    write(tmp_path / "checkpoint/step-30/model.safetensors.index.json", "{}")
    watcher.scan()
    last = watcher.scan()[-1]
    assert last.complete
    # What it was put together from is not needed.
    assert not [name for name in last.files if name.startswith("sharded")]
    # An old table beside new pieces: the step is being written again.
    write(tmp_path / "checkpoint/step-10/__0_0.distcp", "other")
    for _ in range(2):
        assert watcher.scan()[0].reason == "it is being written again"


def test_the_end_of_a_run(tmp_path: Path) -> None:
    watcher = RunWatcher(tmp_path, missing=nothing_missing)
    for step in (10, 20):
        state = {"global_step": step, "max_steps": 20}
        write(tmp_path / f"checkpoint-{step}/trainer_state.json", json.dumps(state))
        assert [watcher.is_last(found) for found in watcher.scan()] == [False, True][: step // 10]

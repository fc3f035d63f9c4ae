"""A tensor in a random place of a trainer's files is merged, carried over, refused or told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.config import parse_merge_config
from arm_ray.errors import ArmRayError
from arm_ray.runtime.inputs import open_inputs
from tests.builders.adapters import factors, write_adapter
from tests.builders.trainer_names import write_megatron, write_torchtitan

CASES = {
    "zero-2-tied": "checkpoint-2",
    "zero-3-tied": "checkpoint-2",
    "universal-1-tied": "",
    "fsdp-1d-tied": "global_step_7",
    "dcp-tied": "step-3",
    "torchtitan": "step-3",
    "megatron": "iter_0000003",
    "peft": "",
}
WRITERS = {"torchtitan": write_torchtitan, "megatron": write_megatron}
PARTS = st.sampled_from(
    ["model", "layers", "0", "7", "mtp", "visual", "q_proj", "rotary_emb", "inv_freq", "weight",
     "bias", "num_batches_tracked", "embed_tokens", "_extra_state"]
)  # fmt: skip


def _rewrite_pickle(file: Path, name: str, tensor: Tensor, key: str | None) -> None:
    content: Any = torch.load(file, weights_only=False)
    place = content if key is None else content[key]
    assume(name not in place)
    place[name] = tensor
    torch.save(content, file)


def add(root: Path, kind: str, name: str, tensor: Tensor) -> None:
    """Put a tensor into a checkpoint, as its trainer would have."""
    if kind.startswith("fsdp"):
        for file in sorted(root.rglob("model_world_size_*.pt")):
            _rewrite_pickle(file, name, tensor, None)
    elif kind.startswith(("zero", "universal")):
        # The first rank's: a tensor of the module that no optimizer has.
        file = sorted(root.rglob("*mp_rank_00_model_states.pt"))[0]
        _rewrite_pickle(file, name, tensor, "module")
    elif kind.startswith("dcp") or kind in WRITERS:
        _rewrite_dcp(root, name, tensor)
    else:
        tensors = load_file(root / WEIGHTS_NAME)
        assume(name not in tensors)
        save_file({**tensors, name: tensor}, root / WEIGHTS_NAME)


def _rewrite_dcp(root: Path, name: str, tensor: Tensor) -> None:
    from torch.distributed import checkpoint as dcp

    [metadata] = root.rglob(".metadata")
    directory = metadata.parent
    table = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in table.items()
        if hasattr(found, "chunks") and not key.startswith("optimizer")
    }
    assume(name not in state)
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    for file in (metadata, *directory.glob("*.distcp")):
        file.unlink()
    dcp.save({**state, name: tensor}, checkpoint_id=directory, no_dist=True)


@pytest.fixture(scope="module")
def sources(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    own = (*WRITERS, "peft")
    found = {kind: shards / kind for kind in CASES if kind not in own}
    base = open_checkpoint(shards / "base-tied")
    config, weights = AutoConfig.from_pretrained(base.path), base.read(base.tensors)
    for kind, write in WRITERS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        write(found[kind] / CASES[kind], weights, config)
    found["peft"] = write_adapter(
        tmp_path_factory.mktemp("peft") / "adapter",
        factors(base, "model.layers.0.self_attn.q_proj", 4),
    )
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(PARTS, min_size=1, max_size=4).map(".".join),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_a_tensor_in_a_random_place_is_never_lost_without_a_word(
    sources: dict[str, Path],
    shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    name: str,
    dtype: torch.dtype,
) -> None:
    root = tmp_path_factory.mktemp("lost")
    shutil.copytree(sources[kind] / CASES[kind], root / "run" / CASES[kind])
    add(root / "run", kind, name, torch.ones(3, dtype=dtype))
    content = {
        "base": str(shards / "base-tied"),
        "candidates": [str(root / "run" / CASES[kind])],
        "output": str(root / "out"),
        "method": {"operator": "task_arithmetic"},
    }
    try:
        inputs = open_inputs(parse_merge_config(content))
    except ArmRayError as error:
        told = str(error)
    else:
        told = " ".join(inputs.notes)
    shutil.rmtree(root)
    # An adapter's tensor is told by its module.
    module = name.removesuffix(".weight").removesuffix(".bias")
    assert name in told or (kind == "peft" and f"base: {module}" in told)

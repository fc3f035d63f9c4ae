"""Writes checkpoints as torchtitan and Megatron name and shard them, without these trainers.

Names, orders of rows and shards follow the formulas of their sources; torch's own library writes
the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

Weights = Mapping[str, Tensor]
# torchtitan's name -> Hugging Face's, within a layer.
_TITAN = {
    "attention.{}wq": "self_attn.q_proj",
    "attention.{}wk": "self_attn.k_proj",
    "attention.{}wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def by_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as torchtitan's Llama has them: pairs that rotate side by side."""
    width = len(rows) // heads
    halves = rows.view(heads, 2, width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def torchtitan_weights(weights: Weights, config: Any, *, new: bool = True) -> dict[str, Tensor]:
    """A Hugging Face state dict under torchtitan's names.

    Args:
        weights: The state dict.
        config: Of a Llama or Qwen3.
        new: As versions since 2026 name queries and head.
    """
    outside = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight" if new else "output.weight": "lm_head.weight",
    }
    found = {titan: weights[name] for titan, name in outside.items() if name in weights}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for titan, module in _TITAN.items():
            name = f"model.layers.{layer}.{module}.weight"
            if name not in weights:
                continue
            tensor, kind = weights[name], module.rpartition(".")[2]
            if config.model_type == "llama" and kind in heads:
                tensor = by_neighbours(tensor, heads[kind])
            found[f"layers.{layer}.{titan.format('qkv_linear.' if new else '')}.weight"] = tensor
    return found


def write_torchtitan(
    path: Path, weights: Weights, config: Any, *, new: bool = True, optimizer: bool = True
) -> Path:
    """Write `step-N`: the model's tensors at the top, the trainer's own states beside them.

    Args:
        path: The directory.
        weights: A Hugging Face state dict.
        config: Of a Llama or Qwen3.
        new: As versions since 2026 write it. Before, the last step had all below `model.`, and
            rotary frequencies among the tensors.
        optimizer: Whether the optimizer is there.
    """
    state: dict[str, Any] = dict(torchtitan_weights(weights, config, new=new))
    if not new:
        state["freqs_cis"] = torch.polar(torch.ones(4, 3), torch.ones(4, 3))
        state = {"model": state}
    if optimizer:
        names = list(torchtitan_weights(weights, config, new=new))
        state["optimizer"] = {f"state.{name}.exp_avg": torch.zeros(2) for name in names}
        state |= {"train_state": {"step": 3}, "dataloader": {"dp_rank_0": b"x"}}
        state["lr_scheduler"] = {"last_epoch": 3}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


class Shards(torch.Tensor):
    """A tensor of which one process writes several chunks, as Megatron's containers do."""

    chunks: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], chunks: Mapping[tuple[int, ...], Tensor]) -> Shards:
        first = next(iter(chunks.values()))
        made: Shards = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=first.dtype
        )
        return made

    def __init__(self, shape: Sequence[int], chunks: Mapping[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.whole, self.chunks = torch.Size(shape), dict(chunks)

    def __create_write_items__(self, name: str, _tensor: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, torch.Size(offsets), number),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offsets), chunk.size()),
                    TensorProperties.create_from_tensor(chunk),
                    self.whole,
                ),
            )
            for number, (offsets, chunk) in enumerate(self.chunks.items())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), chunk.size())
            for offsets, chunk in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.chunks[tuple(index.offset or ())]

    @classmethod
    def __torch_dispatch__(cls, *_: object, **__: object) -> Any:
        raise NotImplementedError


class _Planner(DefaultSavePlanner):
    """Keeps the plans of all ranks beside the table, as Megatron's does."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, table = super().create_global_plan(all_plans)
        table.all_local_plans = all_plans  # type: ignore[attr-defined]
        return plans, table


def megatron_weights(
    weights: Weights, config: Any, *, ranks: int = 1, rows: int | None = None
) -> list[tuple[str, int | None, int, Tensor, int]]:
    """A Hugging Face state dict as Megatron's tensor-parallel ranks have it.

    Args:
        weights: The state dict.
        config: Of a dense Llama, Qwen2 or Qwen3.
        ranks: Of tensor parallelism.
        rows: Of the padded vocabulary; None: not padded.

    Returns:
        For each shard: its name in the layer or the model; the layer; how many the shard is of, of
        those along the first dimension; the tensor; and the dimension that is cut, -1 for none.
    """
    found: list[tuple[str, int | None, int, Tensor, int]] = []

    def cut(name: str, layer: int | None, tensor: Tensor, dim: int) -> None:
        pieces = torch.chunk(tensor, ranks, dim) if dim >= 0 else (tensor,)
        found.extend((name, layer, i, piece, dim) for i, piece in enumerate(pieces))

    for name, stored in (("model.embed_tokens", "embedding.word_embeddings"),
                         ("lm_head", "output_layer")):  # fmt: skip
        tensor = weights.get(f"{name}.weight")
        if tensor is not None:
            padding = torch.full(((rows or len(tensor)) - len(tensor), tensor.shape[1]), 7.0)
            cut(f"{stored}.weight", None, torch.cat([tensor, padding.to(tensor.dtype)]), 0)
    cut("decoder.final_layernorm.weight", None, weights["model.norm.weight"], -1)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in own:
                # Each head of keys with its heads of queries before it, and its values after it.
                split = [own[f"self_attn.{each}_proj.{kind}"] for each in "qkv"]
                width = len(split[1]) // groups
                by_group = [t.view(groups, -1, width, *t.shape[1:]) for t in split]
                assert by_group[0].shape[1] == heads // groups
                fused = torch.cat(by_group, 1).flatten(0, 2)
                cut(f"self_attention.linear_qkv.{kind}", layer, fused, 0)
        plain = {
            "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", -1),
            "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
            "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", -1),
            "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", -1),
            "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", -1),
            "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
        }
        for stored, (name, dim) in plain.items():
            if name in own:
                cut(stored, layer, own[name], dim)
        # Each rank has its part of gate and of up; they are written as halves of the whole.
        cut("mlp.linear_fc1.weight_w", layer, own["mlp.gate_proj.weight"], 0)
        cut("mlp.linear_fc1.weight_v", layer, own["mlp.up_proj.weight"], 0)
    return found


def write_megatron(
    path: Path,
    weights: Weights,
    config: Any,
    *,
    ranks: int = 1,
    rows: int | None = None,
    layers: str = "stacked",
    local_norms: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a `torch_dist` checkpoint of a model.

    Args:
        path: The directory.
        weights: A Hugging Face state dict.
        config: Of a dense Llama, Qwen2 or Qwen3.
        ranks: Of tensor parallelism.
        rows: Of the padded vocabulary; None: not padded.
        layers: stacked: all layers in one tensor of each kind; single: each by itself; singleton:
            gate and up by themselves as well.
        local_norms: Whether norms are modules of their own, not those of Transformer Engine.
        more: Further entries.
    """
    shards: dict[str, tuple[list[int], dict[tuple[int, ...], Tensor]]] = {}
    count = config.num_hidden_layers
    norms = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for name, layer, rank, tensor, dim in megatron_weights(weights, config, ranks=ranks, rows=rows):
        shape, offsets = list(tensor.shape), [0] * tensor.dim()
        if dim >= 0:
            shape[dim], offsets[dim] = ranks * shape[dim], rank * shape[dim]
        stored = norms.get(name, name) if local_norms else name
        if layers != "singleton" and stored.endswith(("weight_w", "weight_v")):
            # Both halves of one tensor, all of the gate first.
            offsets[0] += shape[0] if stored.endswith("_v") else 0
            shape[0] *= 2
            stored = stored[:-2]
        chunk = tensor.contiguous()
        if layer is not None and layers == "stacked":
            stored, chunk = f"decoder.layers.{stored}", chunk[None]
            shape, offsets = [count, *shape], [layer, *offsets]
        elif layer is not None:
            stored = f"decoder.layers.{layer}.{stored}"
        shards.setdefault(stored, (shape, {}))[1][tuple(offsets)] = chunk
    state: dict[str, Any] = {name: Shards(*given) for name, given in shards.items()}
    for number in range(count):
        extra = f"self_attention.linear_qkv._extra_state/shard_{number}_{count}"
        state[f"decoder.layers.{extra}"] = {"recipe": None}
    # The optimizer's copy of the weights, flattened, in a place that nobody looks into.
    state["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"] = torch.zeros(5)
    state["chained_0.optimizer.state.fp32_param.embedding.word_embeddings.weight"] = torch.ones(2)
    state |= {"rng_state/shard_0.0_1.1": [1, 2], **(more or {})}
    writer = FileSystemWriter(path)
    planner = _Planner(flatten_state_dict=False)
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    (path / "common.pt").write_bytes(b"nobody opens this")
    (path / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    return path

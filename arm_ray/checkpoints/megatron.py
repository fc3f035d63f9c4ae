"""Megatron's distributed checkpoints (`torch_dist`): torch's (DCP), with Megatron's own names.

::

    iter_0000100/.metadata              as in `arm_ray.checkpoints.dcp`
    iter_0000100/metadata.json          the kind of the checkpoint; written last
    latest_checkpointed_iteration.txt   the newest one that is complete
    global_step_N/actor/dist_ckpt/      the same (verl), with huggingface/ beside it
    weights/iter_0000000/               the same (NeMo-RL)

The tensors of all layers are one with the layers as its first dimension, or each by itself
(`decoder.layers.7.…`). With `g` heads of keys, and `r` heads of queries for each of them:

| stored | what it is |
|---|---|
| `linear_qkv` `[g (r + 2) d, h]` | for each head of keys: its `r` of queries, itself, the values' |
| `linear_fc1` `[2 i, h]` | gate, and up below it; or both by themselves, with `_w` and `_v` |
| `word_embeddings`, `output_layer` | with rows as padding below the vocabulary's |

`common.pt` is a pickle of the trainer's objects: it is not opened, and nothing in it is needed.
Source: Megatron-LM's `core/dist_checkpointing`, `core/transformer/attention.py`, `mlp.py` and
`transformer_block.py`, of 2026-08; verl's `utils/checkpoint/megatron_checkpoint_manager.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from arm_ray.checkpoints import dcp
from arm_ray.checkpoints.huggingface import read_json
from arm_ray.checkpoints.naming import EMBEDDING, LM_HEAD, model_names
from arm_ray.checkpoints.shard_format import ShardFormat
from arm_ray.checkpoints.sharded import Part, StoredTensor, Table
from arm_ray.checkpoints.trainer_names import (
    Decoder,
    Named,
    check_layer,
    check_rows,
    decoder_of,
    unknown_tensor,
    with_names,
)
from arm_ray.errors import CorruptCheckpointError, MismatchError, NotACheckpointError
from arm_ray.storage.regular import read_text

_FAMILIES = ("llama", "qwen2", "qwen3")
_MARKER = "metadata.json"
_COMMON = "common.pt"
_BACKEND = "torch_dist"
_TRACKER = "latest_checkpointed_iteration.txt"
_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"
_LAYERS = "decoder.layers."
_IN_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXTRA_STATE = "_extra_state"
# Of the layers: what lies there as it is. Norms are a part of the layer that follows them, or not.
_PLAIN = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight_w": "mlp.gate_proj.weight",
    "mlp.linear_fc1.weight_v": "mlp.up_proj.weight",
    "mlp.linear_fc1.bias_w": "mlp.gate_proj.bias",
    "mlp.linear_fc1.bias_v": "mlp.up_proj.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}
_FUSED = re.compile(r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.(weight|bias)")


class MegatronCheckpoint(dcp.DcpCheckpoint):
    """A distributed checkpoint of Megatron."""

    kind = "megatron"


def find(path: Path) -> Path | None:
    """Where the pieces are: in the path, in `dist_ckpt` of verl, or in an iteration below it."""
    below = [path / "dist_ckpt", path / "actor" / "dist_ckpt", *_iterations(path)]
    return next((directory for directory in (path, *below) if _is_one(directory)), None)


def _iterations(path: Path) -> list[Path]:
    """The iteration that the tracker names, or the only one that is there."""
    found = sorted(path.glob("iter_*"))
    try:
        newest = int(read_text(path / _TRACKER))
    except (OSError, ValueError):
        return found if len(found) == 1 else []
    return [each for each in found if each.name == f"iter_{newest:07d}"]


def _is_one(directory: Path) -> bool:
    if not dcp.is_one(directory):
        return False
    if (directory / _COMMON).is_file() or _backend(directory) is not None:
        return True
    return any(_is_embedding(name) for name in dcp.names(directory))


def _backend(directory: Path) -> object:
    """What Megatron's marker says that the checkpoint is; None: it is not there, or another's."""
    try:
        return read_json(directory / _MARKER).get("sharded_backend")
    except (OSError, CorruptCheckpointError):
        return None


def _is_embedding(name: str) -> bool:
    return name == _EMBEDDING or name.endswith(f".{_EMBEDDING}")


def unwritten(found: Path) -> str | None:
    """What is still to come: Megatron writes its own marker last."""
    return None if _backend(found) is not None else f"no {_MARKER} that can be read"


def read_table(source: Path, _masters: bool = True) -> Table:
    """Where each tensor lies; see `ShardFormat`. The optimizer's float32 copies are not read."""
    backend = _backend(source)
    if backend not in (None, _BACKEND):
        raise NotACheckpointError(
            "a checkpoint of Megatron is of a kind that is not read",
            where=source / _MARKER,
            got=f"sharded_backend {backend!r}",
            expected=_BACKEND,
            hint="save with --ckpt-format torch_dist, or convert it to safetensors",
        )
    table = dcp.read_table(source)
    if not any(_is_embedding(name) for name in table.stored):
        raise NotACheckpointError(
            "a checkpoint of Megatron holds no weights of a model",
            where=source,
            got=", ".join(sorted(table.stored)[:4]) or "no tensors",
            expected=_EMBEDDING,
            hint="where verl saves the weights as a Hugging Face model, name its directory: "
            "huggingface, beside dist_ckpt",
        )
    stacked = any(re.match(r"(.*\.)?decoder\.layers\.[a-z]", name) for name in table.stored)
    facts = {
        **table.facts,
        "weights": "the model's; the optimizer's float32 copies are not read",
        "layers": "all in one tensor of each kind" if stacked else "each by itself",
    }
    return replace(table, facts=facts)


def rename(table: Table, config: Mapping[str, Any], path: Path) -> Table:
    """Give the tensors Hugging Face's names; see `ShardFormat`.

    Raises:
        NotACheckpointError: Nothing is known of the family.
        MismatchError: The tensors are not those of the configuration.
    """
    decoder = decoder_of(config, path, "Megatron", _FAMILIES)
    padding: list[str] = []
    names = list(_names(table, decoder, path, padding))
    return with_names(table, names, path, padding)


def _names(table: Table, decoder: Decoder, path: Path, padding: list[str]) -> Iterator[Named]:
    known = model_names(table.stored, path, others=True, embedding=_EMBEDDING)
    for old, name in known.items():
        tensor = table.stored[old]
        if name in (_EMBEDDING, _HEAD):
            part = _without_padding(old, tensor, decoder, path, padding)
            yield old, EMBEDDING if name == _EMBEDDING else LM_HEAD, part
        elif name == _FINAL_NORM:
            yield old, "model.norm.weight", None
        elif name.startswith("decoder.") and _EXTRA_STATE not in name.split("."):
            match = _IN_LAYER.fullmatch(name)
            if match is None:
                raise _unknown(old, decoder, path)
            yield from _of_layers(old, match[1], match[2], tensor, decoder, path)


def _unknown(old: str, decoder: Decoder, path: Path) -> MismatchError:
    return unknown_tensor(old, "Megatron", path, f"those of {decoder.family}, dense")


def _of_layers(
    old: str, number: str | None, name: str, tensor: StoredTensor, decoder: Decoder, path: Path
) -> Iterator[Named]:
    """The tensors of one layer, or of all, that a stored one holds."""
    is_stacked = number is None
    if is_stacked and (not tensor.shape or tensor.shape[0] != decoder.layers):
        said = f"{decoder.layers} layers"
        check_rows(old, tensor, decoder.layers, said, path)
    layers = range(decoder.layers) if number is None else [int(number)]
    check_layer(layers[-1], old, decoder, path)
    fused = _FUSED.fullmatch(name)
    if fused:
        parts = _parts(old, fused[1], fused[2], tensor, decoder, path, is_stacked)
    elif name in _PLAIN:
        parts = {_PLAIN[name]: Part()}
    else:
        raise _unknown(old, decoder, path)
    for layer in layers:
        for new, part in parts.items():
            placed = replace(part, layer=layer) if is_stacked else part
            yield old, f"model.layers.{layer}.{new}", placed if placed != Part() else None


def _parts(
    old: str,
    module: str,
    kind: str,
    tensor: StoredTensor,
    decoder: Decoder,
    path: Path,
    is_stacked: bool,
) -> dict[str, Part]:
    """The projections that lie in one tensor: Hugging Face name in a layer -> rows."""
    if module.endswith("linear_qkv"):
        each, width = decoder.heads // decoder.groups, decoder.head_dim
        split = (decoder.groups, each + 2, width)
        said = f"{decoder.groups} x ({each} + 2) heads of {width} entries"
        rows = decoder.groups * (each + 2) * width
        check_rows(old, tensor, rows, said, path, layer=is_stacked)
        ends = {"q_proj": (0, each), "k_proj": (each, each + 1), "v_proj": (each + 1, each + 2)}
        return {
            f"self_attn.{name}.{kind}": Part(None, split, 1, begin, end)
            for name, (begin, end) in ends.items()
        }
    rows = tensor.shape[is_stacked] if len(tensor.shape) > is_stacked else 0
    check_rows(old, tensor, 2 * (rows // 2), "gate and up", path, layer=is_stacked)
    halves = (2, rows // 2)
    return {
        f"mlp.{name}.{kind}": Part(None, halves, 0, index, index + 1)
        for index, name in enumerate(("gate_proj", "up_proj"))
    }


def _without_padding(
    old: str, tensor: StoredTensor, decoder: Decoder, path: Path, padding: list[str]
) -> Part | None:
    """The rows of the vocabulary. What comes after them is added to `padding`, in words."""
    rows, wanted = tensor.shape[0] if tensor.shape else 0, decoder.vocabulary
    if rows < wanted:
        check_rows(old, tensor, wanted, "the vocabulary, or more as padding", path)
    if rows == wanted:
        return None
    padding.append(f"rows {wanted} to {rows - 1} of {old}, which pad the vocabulary")
    return Part(None, (rows,), 0, 0, wanted)


FORMAT = ShardFormat(
    MegatronCheckpoint,
    mark=dcp.METADATA,
    find=find,
    read=read_table,
    absent="the directory holds no distributed checkpoint of Megatron",
    expected=f"{dcp.METADATA} and {_MARKER}, here, in dist_ckpt or in the newest iter_N below",
    beside=lambda path, found: [
        path,
        found,
        found.parent,
        found.parent / "huggingface",
        path / "huggingface",
    ],
    unwritten=unwritten,
    rename=rename,
)

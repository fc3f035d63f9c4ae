"""torchtitan's checkpoints: torch's distributed ones (DCP), with torchtitan's own names.

::

    checkpoint/step-N/.metadata         as in `arm_ray.checkpoints.dcp`

The names are those of Meta's Llama: `tok_embeddings`, `layers.N.attention.wq`, `feed_forward.w1`;
some versions have `attention.qkv_linear.wq`, and `lm_head` in place of `output`. They lie at the
top, or below `model.`.

Llama is rotated in torchtitan by pairs of neighbouring entries of a head (complex numbers), and in
transformers by pairs that are half a head apart. So the rows of its queries and keys have another
order: entry `2 i + j` of a head there is entry `j d / 2 + i` here, for `d` entries, `i < d / 2`,
`j < 2`. Qwen3 is rotated as in transformers, and keeps its order. Source: torchtitan's
`models/llama3/state_dict_adapter.py`, `models/qwen3/state_dict_adapter.py`,
`models/common/rope.py` and `components/checkpointer/dcp.py`, of 2026-08.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from arm_ray.checkpoints import dcp
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

# Family -> whether its queries and keys are rotated by neighbouring entries.
_FAMILIES = {"llama": True, "qwen3": False}
_EMBEDDING = "tok_embeddings.weight"
_FREQUENCIES = "freqs_cis"
_OUTSIDE = {
    _EMBEDDING: EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
    LM_HEAD: LM_HEAD,
}
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_NORM = "attention_norm"
_MODULES = {
    _NORM: "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


class TorchtitanCheckpoint(dcp.DcpCheckpoint):
    """A checkpoint of torchtitan."""

    kind = "torchtitan"


def find(path: Path) -> Path | None:
    """The path, if its table has torchtitan's names."""
    names = dcp.names(path)
    is_here = any(n == _EMBEDDING or n.endswith(f".{_EMBEDDING}") for n in names)
    return path if is_here and any(f".{_NORM}." in name for name in names) else None


def read_table(source: Path, masters: bool = True) -> Table:
    """Where each tensor lies; see `ShardFormat`. Rotary frequencies follow from the configuration.

    Versions before 2025-08 stored these, as complex numbers.
    """
    table = dcp.read_table(source, masters)
    derived = [name for name in table.stored if name.rpartition(".")[2] == _FREQUENCIES]
    stored = {name: tensor for name, tensor in table.stored.items() if name not in derived}
    return replace(table, stored=stored, left=(*table.left, *derived))


def rename(table: Table, config: Mapping[str, Any], path: Path) -> Table:
    """Give the tensors Hugging Face's names; see `ShardFormat`.

    Raises:
        NotACheckpointError: Nothing is known of the family.
        MismatchError: The tensors are not those of the configuration.
    """
    decoder = decoder_of(config, path, "torchtitan", tuple(_FAMILIES))
    return with_names(table, _names(table, decoder, path), path)


def _names(table: Table, decoder: Decoder, path: Path) -> Iterator[Named]:
    known = model_names(table.stored, path, others=True, embedding=_EMBEDDING)
    for old, name in known.items():
        if name in _OUTSIDE:
            yield old, _OUTSIDE[name], None
        elif name.startswith("layers."):
            match = _IN_LAYER.fullmatch(name)
            module = match and _MODULES.get(match[2].replace(".qkv_linear.", "."))
            if not match or not module:
                expected = f"those of {decoder.family}, dense"
                raise unknown_tensor(old, "torchtitan", path, expected)
            check_layer(int(match[1]), old, decoder, path)
            part = _order(old, module, table.stored[old], decoder, path)
            yield old, f"model.layers.{match[1]}.{module}.{match[3]}", part


def _order(
    old: str, module: str, tensor: StoredTensor, decoder: Decoder, path: Path
) -> Part | None:
    """How rows of the queries and keys change places; None: not at all."""
    counts = {"q_proj": decoder.heads, "k_proj": decoder.groups, "v_proj": decoder.groups}
    heads = counts.get(module.rpartition(".")[2])
    if heads is None:
        return None
    width = decoder.head_dim
    check_rows(old, tensor, heads * width, f"{heads} heads of {width} entries", path)
    if module.endswith("v_proj") or not _FAMILIES[decoder.family]:
        return None
    return Part(split=(heads, width // 2, 2), end=heads, exchanged=(1, 2))


FORMAT = ShardFormat(
    TorchtitanCheckpoint,
    mark=dcp.METADATA,
    find=find,
    read=read_table,
    absent="the directory holds no checkpoint of torchtitan",
    expected=f"{dcp.METADATA} with {_EMBEDDING} among its tensors",
    rename=rename,
)

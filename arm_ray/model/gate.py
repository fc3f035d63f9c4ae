"""Whether a family's decoder, run group by group, gives what it gives run whole: tried, not listed.

A model of the same configuration but for its sizes, with random weights, is run whole and by layer
groups of one and two layers. Every bit of its hidden states and logits must be the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arm_ray.errors import NotACheckpointError
from arm_ray.model.activations import Wanted
from arm_ray.model.architecture import Architecture, architecture_of
from arm_ray.model.group import Decoder
from arm_ray.model.layout import model_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CPU = torch.device("cpu")
_BATCH, _TOKENS, _VOCABULARY = 2, 12, 128
# At least as many layers, and at most; between them, as many as show each kind of layer.
_LAYERS, _MOST_LAYERS = 3, 8
_MOST_PARAMETERS = 20_000_000
# What settings of sizes are cut down to, under the names that families use.
_SIZES = {
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_head_dim": 32,
    "mamba_d_head": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "max_position_embeddings": 512,
}


def tiny_config(config: PretrainedConfig) -> Any:
    """The configuration of a decoder of the same kind, with small sizes and few layers.

    Args:
        config: The decoder's own: of a model with several parts, that of its text.
    """
    content = config.to_dict()
    named = getattr(config, "attribute_map", None) or {}
    num_layers = int(config.num_hidden_layers)
    lists = [v for v in content.values() if isinstance(v, list) and len(v) == num_layers]
    kept = min(num_layers, _layers_of_all_kinds(lists, num_layers))
    for key, value in content.items():
        if any(value is each for each in lists):
            content[key] = value[:kept]
        elif isinstance(value, dict) and all(str(each).isdigit() for each in value):
            content[key] = {layer: each for layer, each in value.items() if int(layer) < kept}
        elif key.endswith("token_id"):
            content[key] = None
    content[named.get("num_hidden_layers", "num_hidden_layers")] = kept
    for name, size in _SIZES.items():
        key = named.get(name, name)
        value = content.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            content[key] = min(value, size)
    heads = named.get("num_attention_heads", "num_attention_heads")
    if getattr(config, "num_key_value_heads", None) in (getattr(config, heads, None), None):
        content["num_key_value_heads"] = content.get(heads)
    if content.get("qk_rope_head_dim"):
        content["head_dim"] = content["qk_rope_head_dim"]
    elif "head_dim" in content and content["head_dim"] is None:
        content["head_dim"] = _SIZES["hidden_size"] // _SIZES["num_attention_heads"]
    _shorten_sections(content)
    for key in ("id2label", "label2id", "dtype", "torch_dtype"):
        content.pop(key, None)
    return type(config).from_dict(content)


def _layers_of_all_kinds(lists: list[list[Any]], num_layers: int) -> int:
    kinds = [tuple(str(each[layer]) for each in lists) for layer in range(num_layers)]
    seen = max(kinds.index(kind) for kind in kinds) + 1 if kinds else 1
    return min(max(_LAYERS, seen), _MOST_LAYERS)


def _shorten_sections(content: dict[str, Any]) -> None:
    """Rotary frequencies that are dealt out to several positions: as many as a head has now."""
    rotary = content.get("rope_parameters")
    if isinstance(rotary, dict) and rotary.get("mrope_section"):
        sections = rotary["mrope_section"]
        half = int(content.get("head_dim") or 16) // 2
        rest = [max(1, each * half // sum(sections)) for each in sections[1:]]
        content["rope_parameters"] = {**rotary, "mrope_section": [half - sum(rest), *rest]}


@dataclass(frozen=True)
class Tried:
    """What came of trying a family.

    Attributes:
        why_not: Why forward passes cannot be run group by group; None: they can.
        unseen: Linear modules whose inputs cannot be seen, because the layer takes their weights
            without calling them: names of weights, after the layer's own.
        transposed: Weights of experts that are `[experts, d_in, d_out]`, so called, and whether the
            outputs of each are two projections, one after the other.
    """

    why_not: str | None = None
    unseen: frozenset[str] = frozenset()
    transposed: Mapping[str, bool] = field(default_factory=dict)


def try_family(config: PretrainedConfig, class_name: str | None = None) -> Tried:
    """Try a family with random weights, in about a tenth of a second after its imports.

    Args:
        config: The configuration of a model of the family.
        class_name: transformers' class of the model; None: the family's.
    """
    try:
        tiny = tiny_model_config(config)
        architecture = architecture_of(tiny, class_name)
        outside = {name.rpartition(".")[0] for name in architecture.tail}
        if len(outside) > 1:
            return Tried(
                "its decoder has weights outside of its layers, beside the embedding and the last "
                f"norm: {', '.join(sorted(outside))}"
            )
        decoder = architecture.model.get_submodule(architecture.decoder)
        size = sum(parameter.numel() for parameter in decoder.parameters())
        if size > _MOST_PARAMETERS:
            return Tried(f"a small model of the family has {size} parameters, and is not tried")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _compare(architecture, tiny, class_name)
    except NotACheckpointError as error:
        return Tried(str(error.got))
    except Exception as error:  # whatever a family's code raises
        return Tried(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def tiny_model_config(config: PretrainedConfig) -> Any:
    """The same for a whole model: of several parts, that of its text alone is cut down."""
    text = config.get_text_config(decoder=True)
    tiny = tiny_config(text)
    if text is config:
        return tiny
    parts = {key: tiny.to_dict() for key in config.sub_configs if getattr(config, key) is text}
    content: dict[str, Any] = config.to_dict()
    content |= parts
    return type(config).from_dict(content)


@torch.no_grad()
def _compare(architecture: Architecture, config: Any, class_name: str | None) -> Tried:
    inside = f"{architecture.decoder}."
    wanted = {name for name in architecture.shapes if name.startswith(inside)}
    wanted |= set(architecture.head_tensors)
    # Numbers such that no softmax has a single winner.
    tensors = {name: 0.1 * torch.randn(architecture.shapes[name]) for name in sorted(wanted)}
    for name in tensors:
        if tensors[name].ndim == 1 and not name.endswith("bias"):
            tensors[name] += 0.5
    # A vocabulary may be smaller than that: of characters, say.
    vocabulary = min(_VOCABULARY, getattr(config, "vocab_size", None) or _VOCABULARY)
    ids = torch.randint(0, vocabulary, (_BATCH, _TOKENS))
    expected = _whole(architecture, tensors, ids)
    written = architecture.written(tensors)
    for size in (1, 2):
        shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
        layout = model_layout(config, size, shapes, class_name)
        decoder = Decoder(layout, _CPU, torch.float32)
        logits, unseen, transposed = _by_groups(decoder, layout, written, ids)
        if not torch.equal(logits, expected):
            return Tried(
                f"run by groups of {size} layers, its logits differ from the whole model's"
            )
    return Tried(
        None,
        frozenset(map(_after_layer, unseen)),
        {_after_layer(_of_any_expert(name)): halves for name, halves in transposed.items()},
    )


def _after_layer(name: str) -> str:
    """A weight's name after its layer's own."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _whole(architecture: Architecture, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of the model, made as transformers makes it, where that is small."""
    model = architecture.model
    if len(tensors) == len(architecture.shapes):
        implementation = model.config._attn_implementation
        model = (
            type(model)
            ._from_config(
                copy.deepcopy(model.config), dtype=torch.float32, attn_implementation=implementation
            )
            .eval()
        )
    else:
        # What is not run stays on `meta`.
        architecture.on(_CPU)
    kwargs = {"input_ids": ids, "use_cache": False}
    logits: Tensor = torch.func.functional_call(model, dict(tensors), kwargs=kwargs).logits
    return logits


def _of_any_expert(name: str) -> str:
    """What an expert's weight is called, without the number of the expert."""
    return re.sub(r"\[\d+\]$", "", re.sub(r"(experts\.)\d+\.", r"\1", name))


def _by_groups(
    decoder: Decoder, layout: Any, written: Mapping[str, Tensor], ids: Tensor
) -> tuple[Tensor, set[str], dict[str, bool]]:
    """Logits, the weights whose inputs were not seen, and those of experts that are transposed."""
    lengths = torch.full((_BATCH,), _TOKENS)
    rows = written[layout.embedding][ids.flatten()]
    hidden = decoder.embed(rows, (_BATCH, _TOKENS))
    unseen, transposed = set(layout.rotated), dict[str, bool]()
    for group in layout.groups:
        names = [name for name in group.tensors if layout.is_layer_tensor(name)]
        weights = decoder.form(names, lambda name, dtype: written[name].to(dtype))
        output = decoder.runner(group.index).forward(weights, hidden, lengths, Wanted())
        hidden = output.hidden
        transposed |= output.transposed
        unseen -= output.means.keys() - output.seen.keys()
        # Of a layer's experts, that no token was sent to any means that none can be seen.
        sent = {_of_any_expert(name) for name, seen in output.seen.items() if bool(seen.any())}
        unseen = {name for name in unseen if _of_any_expert(name) not in sent}
    normed = decoder.final_norm({name: written[name] for name in layout.tail}, hidden)
    logits = decoder.logits({name: written[name] for name in layout.head}, normed)
    return logits, unseen, transposed

"""Whether checkpoints have the tensors and the forward pass of one model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from arm_ray.checkpoints.fp8 import Fp8Checkpoint, Fp8Storage
from arm_ray.checkpoints.huggingface import Checkpoint, check_codes
from arm_ray.checkpoints.vocabulary import GrownBase
from arm_ray.checkpoints.weight_file import DTYPES
from arm_ray.config import StorageDType
from arm_ray.errors import (
    ArmRayError,
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
)
from arm_ray.model.architecture import has_other_head
from arm_ray.model.imports import import_model_classes
from arm_ray.model.layout import DERIVED, ModelLayout, model_layout, table_layout
from arm_ray.model.remote_code import has_code, load_trusted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Settings that change what a forward pass computes although every tensor has the same shape.
_FORWARD_SETTINGS = (
    "hidden_act",
    "hidden_activation",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "no_rope_layers",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "tie_word_embeddings",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_intermediate_size",
)
_OWN_BASE = "merge checkpoints of one training run, and its own base"


def load_config(checkpoint: Checkpoint, trusted: Collection[str] = ()) -> PretrainedConfig:
    """Read a checkpoint's configuration, with the defaults that its family fills in.

    A family that transformers does not have keeps what its file says, and nothing else, unless the
    checkpoint's own code is trusted.

    Args:
        checkpoint: The checkpoint.
        trusted: Families whose code may be run.

    Raises:
        NotACheckpointError: The weights are quantised, or no family is named.
        CorruptCheckpointError: The family refuses its settings.
    """
    where, family = checkpoint.config_directory / "config.json", checkpoint.config.get("model_type")
    if checkpoint.config.get("quantization_config") is not None:
        raise NotACheckpointError(
            "the checkpoint is quantised",
            where=where,
            expected="weights in float32, bfloat16 or float16",
            hint="merge the full-precision checkpoints, and quantise the result; FP8 with a scale "
            "for each block (weight_block_size) is read",
        )
    if not isinstance(family, str):
        raise NotACheckpointError(
            "the configuration names no family of models",
            where=where,
            got=f"model_type {family!r}",
            expected='such as "model_type": "qwen2"',
            hint="restore config.json from the training run",
        )
    import_model_classes()
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    try:
        if runs_own_code(checkpoint, trusted):
            return load_trusted(checkpoint.config_directory)
        if family not in CONFIG_MAPPING:
            return PretrainedConfig.from_dict(dict(checkpoint.config))
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.config_directory, trust_remote_code=False
        )
        # A base whose vocabulary has grown says so itself, not in its file.
        # What was quantised is read as it was before.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        told, text = checkpoint.config, config.get_text_config(decoder=True)
        told = told.get("text_config") or told
        if "vocab_size" in told:
            text.vocab_size = int(told["vocab_size"])
    except ArmRayError:
        raise
    except Exception as error:  # each family validates in its own way
        raise _bad_config(checkpoint, error) from None
    return config


def runs_own_code(checkpoint: Checkpoint, trusted: Collection[str]) -> bool:
    """Whether the model's classes are taken from the checkpoint, and not from transformers."""
    from transformers import CONFIG_MAPPING

    family = checkpoint.config.get("model_type")
    return family in trusted and family not in CONFIG_MAPPING and has_code(checkpoint.config)


def _bad_config(checkpoint: Checkpoint, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "the configuration of a checkpoint is refused by its family",
        where=checkpoint.config_directory / "config.json",
        got=" ".join(str(error).split())[:300],
        hint="restore config.json from the training run",
    )


def layout_of(
    checkpoint: Checkpoint, layers_per_group: int = 1, trusted: Collection[str] = ()
) -> ModelLayout:
    """The layout of a base, from what transformers knows of its family, or from its tables alone.

    Args:
        checkpoint: The base; without tensors, they are as transformers would write them.
        layers_per_group: Decoder layers of a group.
        trusted: Families whose own code in the checkpoint may be run.

    Raises:
        NotACheckpointError: Nothing is known of the family, and there are no tensors either.
        CorruptCheckpointError: The configuration is wrong.
    """
    config, classes = load_config(checkpoint, trusted), checkpoint.config.get("architectures")
    stored = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    name = classes[0] if isinstance(classes, list) and classes else None
    _check_layers(config, checkpoint)
    try:
        layout = model_layout(config, layers_per_group, stored or None, name)
        missing = [head for head in layout.head if head not in stored]
        if not stored or not missing or not has_other_head(name):
            own = runs_own_code(checkpoint, trusted)
            return replace(layout, code=checkpoint.config_directory) if own else layout
        why = f"{name} has no head over the vocabulary"
    except NotACheckpointError as error:
        if not stored:
            raise
        why = error.got or error.what
    except ArmRayError:
        raise
    except Exception as error:  # the same
        if not (stored and runs_own_code(checkpoint, trusted)):
            raise _bad_config(checkpoint, error) from None
        why = f"its own code fails: {type(error).__name__}: {error}"
    if runs_own_code(checkpoint, trusted):
        # Nothing of that code is needed, and no shard would have it.
        config = load_config(checkpoint)
    layout = table_layout(config, layers_per_group, stored, why)
    # Counters and the like are no weights.
    return layout.carrying({n for n in layout.shapes if checkpoint.tensors[n].code not in DTYPES})


# Of a model that is told by its configuration alone; the deepest that is known has about 130.
_MOST_LAYERS = 10_000


def _check_layers(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a number of layers that cannot be, before the layers are built."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    # A layer has a tensor at least.
    most = len(checkpoint.tensors) or _MOST_LAYERS
    if isinstance(count, int) and not 1 <= count <= most:
        raise CorruptCheckpointError(
            "the configuration has an impossible number of layers",
            where=checkpoint.config_directory / "config.json",
            got=f"num_hidden_layers {count}",
            expected=f"1 to {most}, the number of tensors in the files"
            if checkpoint.tensors
            else f"1 to {most}",
            hint="restore config.json from the training run",
        )


def check_layout(layout: ModelLayout, checkpoint: Checkpoint, label: str) -> None:
    """Check that a checkpoint has the tensors and the forward pass of `layout`.

    Args:
        layout: From the base.
        checkpoint: The base itself, or a candidate.
        label: How the configuration calls it, for messages.

    Raises:
        MismatchError: A setting, a tensor or a shape differs; names the first.
    """
    where = f"{label}: {checkpoint.path}"
    family, expected_family = checkpoint.config.get("model_type"), layout.config.model_type
    if family != expected_family:
        raise _mismatch("the architecture differs from the base's", where, family, expected_family)
    known = layout.text_config
    if layout.code is None:
        config = load_config(checkpoint)
    else:  # the base's code reads all of them
        config = type(layout.config).from_dict(dict(checkpoint.config))
    text = config.get_text_config(decoder=True)
    for key in _SIZES:
        hint = _OWN_BASE
        if key == "vocab_size" and getattr(text, key, 0) > getattr(known, key, 0):
            hint = (
                "if tokens were added to all candidates, set vocabulary to common: the rows in "
                "common are merged, the others are the candidates' mean"
            )
        _check_setting(key, text, known, where, hint)
    check_tensors(layout, checkpoint, where)
    for key in _FORWARD_SETTINGS:
        _check_setting(key, text, known, where)
        _check_setting(key, config, layout.config, where)


def derived_tensors(checkpoint: Checkpoint) -> list[str]:
    """Names of the stored buffers that follow from the configuration, and are not merged."""
    return sorted(name for name in checkpoint.tensors if DERIVED.search(name))


def check_tensors(
    layout: ModelLayout,
    checkpoint: Checkpoint,
    where: str,
    hint: str = _OWN_BASE,
) -> None:
    """Check that a directory of weight files has the tensors of `layout`, whatever they mean.

    Args:
        layout: From the base.
        checkpoint: The directory.
        where: How messages call it.
        hint: What to do where they differ.

    Raises:
        MismatchError: A tensor or a shape differs; names the first.
    """
    names = {name for name in checkpoint.tensors if not DERIVED.search(name)}
    for name, shape in layout.shapes.items():
        if name not in names:
            got = f"no {name}{_instead(name, names - layout.shapes.keys())}"
            raise _mismatch("a tensor is missing", where, got, f"{name} {list(shape)}", hint)
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise _mismatch(f"the shape of {name} differs", where, list(found), list(shape), hint)
    check_codes(checkpoint.tensors[name] for name in layout.shapes)


def _instead(name: str, others: Collection[str]) -> str:
    """What may be there in place of a tensor, among those that the model does not have."""
    longer = [other for other in sorted(others) if other.endswith(f".{name}")]
    near = longer[:1] or difflib.get_close_matches(name, sorted(others), n=1, cutoff=0.8)
    return f", but {near[0]}" if near else ""


def _check_setting(key: str, config: Any, expected: Any, where: str, hint: str = _OWN_BASE) -> None:
    found, wanted = getattr(config, key, None), getattr(expected, key, None)
    if found != wanted:
        raise _mismatch(f"{key} differs from the base's", where, str(found), str(wanted), hint)


def _mismatch(
    what: str, where: str, got: object, expected: object, hint: str = _OWN_BASE
) -> MismatchError:
    return MismatchError(what, where=where, got=got, expected=expected, hint=hint)


def base_dtype(layout: ModelLayout, base: Checkpoint) -> torch.dtype:
    """The dtype that most of the base's rotated weights are stored in."""
    return main_dtype(layout, lambda name: DTYPES[base.tensors[name].code])


def fp8_storage(base: Checkpoint, storage: StorageDType) -> Fp8Storage | None:
    """How the base stores weights in FP8, where the merged model is to do so too.

    Args:
        base: The base, perhaps with rows that its candidates have added.
        storage: `precision.storage_dtype`.

    Raises:
        ConfigError: It is asked for, and the base has none.
    """
    if storage != "float8_e4m3fn":
        return None
    stored = base.base if isinstance(base, GrownBase) else base
    if not isinstance(stored, Fp8Checkpoint) or not stored.quantised:
        raise ConfigError(
            "the base has no weights in FP8, so it is not known which ones are to be quantised",
            where="precision.storage_dtype",
            got=f"float8_e4m3fn, with the base {base.path}",
            expected="a base with quant_method fp8 and weight_block_size in its config.json",
            hint="set it to auto, and quantise the merged model (transformers: "
            "FineGrainedFP8Config; or llm-compressor)",
        )
    return stored.storage


def storage_dtypes(
    layout: ModelLayout, base: Checkpoint, storage: StorageDType
) -> dict[str, torch.dtype]:
    """Name -> dtype that the final model is written in.

    Weights that become FP8 are written in float32 at first, so that they are rounded once.

    Raises:
        ConfigError: As `fp8_storage`.
    """
    fp8 = fp8_storage(base, storage)
    if fp8 is None and storage != "auto":
        return dict.fromkeys(layout.shapes, getattr(torch, storage))
    low = frozenset[str]() if fp8 is None else fp8.names
    return {
        name: torch.float32 if name in low else DTYPES[base.tensors[name].code]
        for name in layout.shapes
    }


def main_dtype(layout: ModelLayout, of: Callable[[str], torch.dtype]) -> torch.dtype:
    """The dtype of most bytes of the rotated weights, or of all tensors where there are none."""
    sizes = Counter[torch.dtype]()
    for name in layout.rotated or layout.shapes:
        sizes[of(name)] += prod(layout.shapes[name]) * of(name).itemsize
    return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)))

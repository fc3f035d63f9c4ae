"""What tensors a model has, which of them are rotated, and in which layer group each one is."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arm_ray.checkpoints import naming
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.weight_file import DTYPES
from arm_ray.errors import CorruptCheckpointError, MismatchError, NotACheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Families whose decoder gives the same bits run group by group as run whole
# (tests/model/test_group.py). Others scale embeddings or share weights between layers, and are
# refused until they are tested.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

EMBEDDING, LM_HEAD = naming.EMBEDDING, naming.LM_HEAD
FINAL_NORM = "model.norm.weight"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Buffers that older versions of transformers stored; they follow from the configuration.
_DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
# Settings that change what a forward pass computes although every tensor has the same shape.
_FORWARD_SETTINGS = (
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "layer_types",
    "sliding_window",
    "tie_word_embeddings",
)
_OWN_BASE = "merge checkpoints of one training run, and its own base"


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive decoder layers, with the embedding or the head where they belong.

    Attributes:
        index: Position in the model, 0-based.
        first_layer: First decoder layer.
        end_layer: One past the last.
        tensors: Names of all tensors of the group, in the model's order.
        num_bytes: Their size in float32.
    """

    index: int
    first_layer: int
    end_layer: int
    tensors: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class ModelLayout:
    """The tensors of a model, from its configuration alone.

    Attributes:
        config: The model's configuration.
        shapes: Name -> shape, in the model's order; a tied `lm_head` is left out.
        rotated: Names of the 2-D weights of linear modules inside the decoder layers.
        groups: The layer groups, in order.
    """

    config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    rotated: frozenset[str]
    groups: tuple[LayerGroup, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.groups[-1].end_layer


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read a checkpoint's configuration, with the defaults that its family fills in.

    Raises:
        NotACheckpointError: The family is not supported.
    """
    family = checkpoint.config.get("model_type")
    if family not in FAMILIES:
        raise NotACheckpointError(
            "the model's family is not supported",
            where=checkpoint.config_directory / "config.json",
            got=f"model_type {family!r}",
            expected=", ".join(FAMILIES),
        )
    if checkpoint.config.get("quantization_config") is not None:
        raise NotACheckpointError(
            "the checkpoint is quantised",
            where=checkpoint.config_directory / "config.json",
            expected="weights in float32, bfloat16 or float16",
            hint="merge the full-precision checkpoints, and quantise the result",
        )
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.config_directory, trust_remote_code=False
        )
        # A base whose vocabulary has grown says so itself, not in its file.
        config.vocab_size = int(checkpoint.config.get("vocab_size", config.vocab_size))
    except Exception as error:  # each family validates in its own way
        raise _bad_config(checkpoint, error) from None
    return config


def _bad_config(checkpoint: Checkpoint, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "the configuration of a checkpoint is refused by its family",
        where=checkpoint.config_directory / "config.json",
        got=" ".join(str(error).split())[:300],
        hint="restore config.json from the training run",
    )


def model_layout(config: PretrainedConfig, layers_per_group: int = 1) -> ModelLayout:
    """List a model's tensors by building it on the `meta` device, which holds no data."""
    # Seconds of imports, which only the driver needs.
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rotated = frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _LAYER.match(name)
    )
    groups = _groups(shapes, int(config.num_hidden_layers), layers_per_group)
    return ModelLayout(config, shapes, rotated, groups)


def _groups(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, layers_per_group: int
) -> tuple[LayerGroup, ...]:
    starts = list(range(0, num_layers, layers_per_group))
    members: list[list[str]] = [[] for _ in starts]
    for name in shapes:
        layer = _LAYER.match(name)
        if layer:
            members[int(layer[1]) // layers_per_group].append(name)
        else:
            members[0 if name == EMBEDDING else -1].append(name)
    return tuple(
        LayerGroup(
            index,
            start,
            min(start + layers_per_group, num_layers),
            tuple(names),
            sum(4 * prod(shapes[name]) for name in names),
        )
        for index, (start, names) in enumerate(zip(starts, members, strict=True))
    )


def is_layer_tensor(name: str) -> bool:
    """Whether a tensor belongs to a decoder layer."""
    return layer_number(name) is not None


def layer_number(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, 0-based; None: to none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def layer_of(name: str, num_layers: int) -> int:
    """The decoder layer that a tensor is nearest to: its own, the first, or the last."""
    number = layer_number(name)
    if number is not None:
        return number
    return 0 if name == EMBEDDING else num_layers - 1


def check_layout(layout: ModelLayout, checkpoint: Checkpoint, label: str) -> None:
    """Check that a checkpoint has the tensors and the forward pass of `layout`.

    Args:
        layout: From the base.
        checkpoint: The base itself, or a candidate.
        label: How the configuration calls it, for messages.

    Raises:
        MismatchError: A setting, a tensor or a shape differs; names the first.
        NotACheckpointError: The family is not supported.
    """
    where = f"{label}: {checkpoint.path}"
    family, expected_family = checkpoint.config.get("model_type"), layout.config.model_type
    if family != expected_family:
        raise _mismatch("the architecture differs from the base's", where, family, expected_family)
    config = load_config(checkpoint)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        hint = _OWN_BASE
        if key == "vocab_size" and config.vocab_size > layout.config.vocab_size:
            hint = (
                "if tokens were added to all candidates, set vocabulary to common: the rows in "
                "common are merged, the others are the candidates' mean"
            )
        _check_setting(key, config, layout.config, where, hint)
    check_tensors(layout, checkpoint, where, tied=bool(config.tie_word_embeddings))
    for key in _FORWARD_SETTINGS:
        _check_setting(key, config, layout.config, where)


def derived_tensors(checkpoint: Checkpoint) -> list[str]:
    """Names of the stored buffers that follow from the configuration, and are not merged."""
    return sorted(name for name in checkpoint.tensors if _DERIVED.search(name))


def check_tensors(
    layout: ModelLayout,
    checkpoint: Checkpoint,
    where: str,
    *,
    tied: bool,
    hint: str = _OWN_BASE,
) -> None:
    """Check that a directory of weight files has the tensors of `layout`, whatever they mean.

    Args:
        layout: From the base.
        checkpoint: The directory.
        where: How messages call it.
        tied: Whether a copy of the head is tolerated.
        hint: What to do where they differ.

    Raises:
        MismatchError: A tensor or a shape differs; names the first.
    """
    names = {
        name
        for name in checkpoint.tensors
        if not _DERIVED.search(name) and not (tied and name == LM_HEAD)
    }
    for name, shape in layout.shapes.items():
        if name not in names:
            got = f"no {name}{_instead(name, names - layout.shapes.keys())}"
            raise _mismatch("a tensor is missing", where, got, f"{name} {list(shape)}", hint)
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise _mismatch(f"the shape of {name} differs", where, list(found), list(shape), hint)
    extra = sorted(names - set(layout.shapes))
    if extra:
        raise _mismatch(
            "a tensor is there that the model does not have",
            where,
            extra[0],
            "the base's tensors",
            hint,
        )


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
    sizes: dict[str, int] = {}
    for name in layout.rotated:
        entry = base.tensors[name]
        sizes[entry.code] = sizes.get(entry.code, 0) + entry.num_bytes
    return DTYPES[max(sizes, key=lambda code: (sizes[code], code))]

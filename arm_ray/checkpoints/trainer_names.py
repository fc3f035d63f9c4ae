"""What trainers with names of their own are told about a model, and what they are asked back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn import functional

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.sharded import Part, StoredTensor, Table
from arm_ray.errors import CorruptCheckpointError, MismatchError, NotACheckpointError

# Format -> whose names it has.
_TRAINERS = {"megatron": "Megatron", "torchtitan": "torchtitan"}
_NORM = "model.norm.weight"
_QUERIES = "model.layers.0.self_attn.q_proj.weight"
# Name in the files, Hugging Face name, and what of the stored tensor it is.
Named = tuple[str, str, Part | None]


@dataclass(frozen=True)
class Decoder:
    """What `config.json` says of a dense decoder, as far as names and rows depend on it.

    Attributes:
        family: Its `model_type`.
        layers: Decoder layers.
        heads: Heads of the queries.
        groups: Heads of the keys and of the values; each serves `heads / groups` of the queries'.
        head_dim: Width of a head.
        vocabulary: Rows of the embedding.
    """

    family: str
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int


def decoder_of(
    config: Mapping[str, Any], path: Path, trainer: str, families: Sequence[str]
) -> Decoder:
    """Read what names and rows depend on.

    Args:
        config: Content of `config.json`: the checkpoint's own, or the base's.
        path: For messages, as is `trainer`.
        trainer: Whose names they are.
        families: Whose tensors are known by them.

    Raises:
        NotACheckpointError: It is another family's, or names none.
        CorruptCheckpointError: A setting is missing, or no number.
    """
    family = config.get("model_type")
    if family not in families:
        raise NotACheckpointError(
            f"it is not known how {trainer} stores the tensors of this family",
            where=path,
            got=f"model_type {family!r}, from config.json",
            expected=" or ".join(families),
            hint="convert the checkpoint to safetensors with the trainer's own tool; if it is of "
            "one of these families, put its config.json beside it",
        )
    heads = _number(config, "num_attention_heads", path)
    groups = heads
    if config.get("num_key_value_heads") is not None:
        groups = _number(config, "num_key_value_heads", path)
    if config.get("head_dim") is not None:
        width = _number(config, "head_dim", path)
    else:
        width = _number(config, "hidden_size", path) // heads
    if heads % groups or not width:
        raise CorruptCheckpointError(
            "the configuration has heads of queries that cannot be shared out to those of keys",
            where=path,
            got=f"num_attention_heads {heads}, num_key_value_heads {groups}, head_dim {width}",
            hint="restore config.json from the training run",
        )
    layers, rows = (_number(config, key, path) for key in ("num_hidden_layers", "vocab_size"))
    return Decoder(str(family), layers, heads, groups, width, rows)


def _number(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptCheckpointError(
            "a setting of the configuration is missing, or no number",
            where=path,
            got=f"{key}: {value!r}, from config.json",
            expected="a whole number of at least 1",
            hint="restore config.json from the training run",
        )
    return value


def with_names(table: Table, names: Iterable[Named], path: Path, left: Iterable[str] = ()) -> Table:
    """A table with Hugging Face's names.

    Args:
        table: With the trainer's.
        names: Of the model's tensors.
        path: For messages.
        left: What else is left out, in words, beside the tensors that `names` does not have.

    Raises:
        MismatchError: Two tensors get the same name.
    """
    stored: dict[str, StoredTensor] = {}
    origins: dict[str, str] = {}
    for old, new, part in names:
        if new in origins:
            raise MismatchError(
                "two tensors of a checkpoint have the same name",
                where=path,
                got=f"{origins[new]} and {old}",
                expected=f"one {new}",
            )
        origins[new] = old
        stored[new] = replace(table.stored[old], part=part)
    others = sorted(table.stored.keys() - set(origins.values()))
    return replace(table, stored=stored, left=(*left, *others, *table.left))


def check_layer(number: int, name: str, decoder: Decoder, path: Path) -> None:
    """Refuse a layer that the configuration does not have.

    Raises:
        MismatchError: Names the tensor.
    """
    if number >= decoder.layers:
        raise _differs("layers", path, f"{name}, of layer {number}", f"{decoder.layers} layers")


def check_rows(
    name: str, tensor: StoredTensor, rows: int, said: str, path: Path, *, layer: bool = False
) -> None:
    """Refuse a tensor whose rows are not those that follow from the configuration.

    Args:
        name: In the files.
        tensor: What is stored.
        rows: How many there should be.
        said: What follows from the configuration, in words.
        path: For messages.
        layer: Whether its first dimension is that of the layers.

    Raises:
        MismatchError: There are more or less.
    """
    shape = tensor.shape[layer:]
    if not shape or shape[0] != rows:
        raise _differs("rows", path, f"{name} {list(tensor.shape)}", f"{rows} rows: {said}")


def unknown_tensor(name: str, trainer: str, path: Path, expected: str) -> MismatchError:
    """The error for a tensor of a decoder layer that the dense families do not have."""
    return MismatchError(
        f"a tensor of a layer has a name that is not known of {trainer}",
        where=path,
        got=name,
        expected=expected,
        hint="mixtures of experts and other kinds of attention are not read in this form: convert "
        "the checkpoint to safetensors with the trainer's own tool",
    )


def check_conventions(checkpoint: Checkpoint, base: Checkpoint, where: object) -> None:
    """Refuse a checkpoint that stores what no name or shape tells in another way than it is read.

    Two settings of trainers do that: rotary pairs that lie side by side or half a head apart, and
    norms less one. Training moves weights little, so the base's show it: of the first layer's
    queries and the last norm, what is read must be nearer to the base than what the other way
    would give.

    Args:
        checkpoint: A candidate; those that have Hugging Face's names in their files are passed
            over.
        base: The base.
        where: For the message.

    Raises:
        MismatchError: The other way is nearer.
    """
    if checkpoint.kind not in _TRAINERS or base.kind == checkpoint.kind:
        return
    trainer = _TRAINERS[checkpoint.kind]
    names = [name for name in (_NORM, _QUERIES) if name in base.tensors]
    own, theirs = checkpoint.read(names), base.read(names)
    if _NORM in names:
        norm, expected = (float(each[_NORM].float().mean()) for each in (own, theirs))
        if abs(norm + 1 - expected) < abs(norm - expected):
            raise _otherwise(
                "norms",
                where,
                f"a mean of {norm:.3f} in {_NORM}",
                f"about {expected:.3f}, as in the base",
                f"{trainer} stores them less one (--apply-layernorm-1p)",
            )
    if _QUERIES not in names:
        return
    rows, expected_rows = own[_QUERIES].double(), theirs[_QUERIES].double()
    decoder = decoder_of(
        checkpoint.config, checkpoint.path, trainer, [str(base.config["model_type"])]
    )
    heads, half = decoder.heads, decoder.head_dim // 2
    likeness = {
        split: float(functional.cosine_similarity(given.flatten(), expected_rows.flatten(), dim=0))
        for split, given in {
            (): rows,
            (half, 2): Part(None, (heads, half, 2), 0, 0, heads, (1, 2)).of(rows),
            (2, half): Part(None, (heads, 2, half), 0, 0, heads, (1, 2)).of(rows),
        }.items()
    }
    best = max(likeness.values())
    if best > 2 * abs(likeness[()]) and best > 0.5:
        raise _otherwise(
            "rows of the queries",
            where,
            f"a cosine of {likeness[()]:.3f} between {_QUERIES} and the base's",
            f"about {best:.3f}, which another order of the rows of each head gives",
            f"{trainer} rotates other pairs (--rotary-interleaved), or the model is not of the "
            f"base's family",
        )


def _otherwise(what: str, where: object, got: str, expected: str, reason: str) -> MismatchError:
    return MismatchError(
        f"the {what} of a checkpoint are stored otherwise than they are read",
        where=where,
        got=got,
        expected=expected,
        hint=f"{reason}: convert the checkpoint to safetensors with the trainer's own tool",
    )


def _differs(what: str, path: Path, got: str, expected: str) -> MismatchError:
    return MismatchError(
        f"the {what} of a checkpoint are not those of its configuration",
        where=path,
        got=got,
        expected=expected,
        hint="if the checkpoint has no config.json of its own, it takes the base's: name the base "
        "that the training began with, or put the right config.json beside the checkpoint",
    )

"""PEFT LoRA adapters as checkpoints: the base's weights plus `s B A`, formed when they are read.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`, or, as some
trainers leave it, `adapter_model.bin`. Of a module with
weight `W` `[d_out, d_in]` the file has `A` `[r, d_in]` and `B` `[d_out, r]`, and the adapted weight
is

    W + s B A,      s = α / r, or α / √r (rsLoRA)

with `r` and `α` perhaps the module's own (`rank_pattern`, `alpha_pattern`). DoRA (Liu et al., 2024)
gives each row a length of its own, a vector `m` `[d_out]` in the file:

    m (W + s B A) / ‖W + s B A‖

with the norm of each row. Biases and other tensors that are stored whole take the place of the
base's. Only what can be computed exactly is read; everything else is refused and named.

One module, because what is read and what is refused are two sides of one list.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json
from arm_ray.checkpoints.naming import EMBEDDING, LM_HEAD
from arm_ray.checkpoints.peft_file import (
    FACTOR,
    WEIGHTS_NAME,
    check_written,
    read_own,
    read_stored,
    weights_file,
)
from arm_ray.checkpoints.weight_file import TensorEntry
from arm_ray.errors import (
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
)
from arm_ray.storage.mirror import present

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
# A whole tensor instead of the base's: a trained copy, or an embedding saved along.
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# Settings that make an adapter something else than the formulas above, when they say anything.
_REFUSED = {
    "use_qalora": "QALoRA pools the inputs of A",
    "lora_bias": "the low-rank part has a bias",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts parameters that are not modules' weights",
    "alora_invocation_tokens": "it is active for some tokens only",
    "arrow_config": "it chooses among adapters for each token",
}
# Of patterns of modules: a repeated group may take for ever to be matched.
_REPEATED, _LONGEST_PATTERN = re.compile(r"\)[*+{]"), 500
# Which biases were trained.
_BIASES = ("none", "all", "lora_only")
# Initialisations that leave the base as it is. Others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) train
# against a base from which the initial low-rank part was taken away.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRankUpdate:
    """What is added to one weight.

    Attributes:
        a: Name of `A` `[r, d_in]` in the adapter's file.
        b: Name of `B` `[d_out, r]`.
        scaling: `s`.
        transposed: Whether the weight is stored as `[d_in, d_out]`, so that `s (B A)ᵀ` is added.
        magnitude: Name of `m` `[d_out]` (DoRA); None: rows keep the length of the sum.
    """

    a: str
    b: str
    scaling: float
    transposed: bool
    magnitude: str | None = None

    @property
    def parts(self) -> list[str]:
        """Names in the adapter's file of all that it is made of."""
        return [self.a, self.b, *([] if self.magnitude is None else [self.magnitude])]


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """An adapter over its base, to be read like a checkpoint. Holds no weights.

    `path` is the adapter's directory and `config` the base's. In `tensors`, what the adapter adds
    to is float32 in the adapter's file, from byte 0: nothing is stored in that form.

    Attributes:
        base: What the adapter was trained on.
        adapter_config: Content of `adapter_config.json`.
        stored: The tensors of the adapter's file.
        replaced: Name of a weight -> name in the adapter's file of what takes its place.
        updates: Name of a weight -> what is added to it.
    """

    kind = "peft"
    base: Checkpoint
    adapter_config: Mapping[str, Any]
    stored: Mapping[str, TensorEntry]
    replaced: Mapping[str, str]
    updates: Mapping[str, LowRankUpdate]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors: adapted ones in float32, others in the dtype of their file."""
        names = list(names)
        plain = self.base.read(name for name in names if name not in self.replaced)
        updates = {name: self.updates[name] for name in names if name in self.updates}
        wanted = [self.replaced[name] for name in names if name in self.replaced]
        wanted += [part for update in updates.values() for part in update.parts]
        own = read_own(self.stored, wanted)
        result: dict[str, Tensor] = {}
        for name in names:
            weight = own[self.replaced[name]] if name in self.replaced else plain.pop(name)
            update = updates.get(name)
            if update is not None:
                a, b = own[update.a].float(), own[update.b].float()
                left, right = (a.T, b.T) if update.transposed else (b, a)
                weight = torch.addmm(weight.float(), left, right, alpha=update.scaling)
                if update.magnitude is not None:
                    lengths = torch.linalg.norm(weight, dim=1)
                    weight *= (own[update.magnitude].float() / lengths)[:, None]
            result[name] = weight
        return result

    def files(self, names: Iterable[str]) -> set[Path]:
        """The adapter's file, and those of the base that hold the tensors."""
        directory = present(self.path)
        own = {directory / entry.file.name for entry in self.stored.values()}
        return own | self.base.files(name for name in names if name not in self.replaced)

    @property
    def is_local(self) -> bool:
        """Whether the base is."""
        return self.base.is_local

    @property
    def is_laid_out(self) -> bool:
        """What the adapter adds to is stored nowhere."""
        return False

    @property
    def config_directory(self) -> Path:
        """The base's."""
        return self.base.config_directory

    @property
    def fingerprint(self) -> str:
        """A digest of the base's, the adapter's settings and table of tensors, and its file."""
        digest = hashlib.sha256(self.base.fingerprint.encode())
        digest.update(json.dumps(self.adapter_config, sort_keys=True).encode())
        status = weights_file(self.path).stat()
        digest.update(f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
        for name, entry in sorted(self.stored.items()):
            digest.update(f"{name}\0{entry.code}\0{entry.shape}\0{entry.begin}\0".encode())
        return digest.hexdigest()


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    models = (path / SINGLE_NAME, path / INDEX_NAME)
    return (path / CONFIG_NAME).is_file() and not any(file.exists() for file in models)


def open_adapter(path: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """Read an adapter's settings and header, and check them against the base.

    Reads weights only where the model ties its head to the embedding and the adapter stores one of
    them whole.

    Raises:
        NotACheckpointError: It is an adapter of a kind that is not added exactly, or cannot be
            read.
        PickleRefusedError: Its weights are a pickle that holds more than tensors.
        CorruptCheckpointError: A file is missing, truncated or contradicts another.
        MismatchError: It does not fit the base; names the module.
    """
    try:
        config = read_json(path / CONFIG_NAME)
        _check_kind(path, config)
        stored = read_stored(path)
        check_written(path, stored)
    except OSError as error:
        raise NotACheckpointError(
            "an adapter cannot be read",
            where=path,
            got=error,
            hint="check the file, and its permissions",
        ) from None
    factors, replaced = _sort(path, stored)
    if not factors and not replaced:
        raise CorruptCheckpointError(
            "an adapter holds no tensors",
            where=path,
            expected="lora_A and lora_B of some module",
            hint="save the adapter again with PEFT's save_pretrained",
        )
    _check_biases(path, config, base, replaced)
    updates = {name: _update(path, config, name, pair, stored) for name, pair in factors.items()}
    opened = AdaptedCheckpoint(
        path, base.config, base.tensors, base, config, stored, replaced, updates
    )
    is_tied = base.config.get("tie_word_embeddings", LM_HEAD not in base.tensors)
    if is_tied:
        _check_tied(opened)
        replaced.pop(LM_HEAD, None)
    tensors = dict(base.tensors)
    if is_tied:
        # The base's copy is none of the adapter's embedding.
        tensors.pop(LM_HEAD, None)
    for name, own in replaced.items():
        _check_shape(opened, name, stored[own].shape)
        tensors[name] = stored[own]
    for name, update in updates.items():
        rows, columns = stored[update.b].shape[0], stored[update.a].shape[1]
        shape = (columns, rows) if update.transposed else (rows, columns)
        _check_shape(opened, name, shape)
        tensors[name] = TensorEntry(name, "F32", shape, stored[update.a].file, 0, 4 * prod(shape))
    return replace(opened, tensors=tensors)


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    def refuse(what: str, got: object, expected: object, hint: str | None = None) -> None:
        raise NotACheckpointError(
            f"the adapter is none that can be added exactly: {what}",
            where=path / CONFIG_NAME,
            got=got,
            expected=expected,
            hint=hint
            or "merge it into its base with PEFT (merge_and_unload), and merge the result",
        )

    if str(config.get("peft_type")).upper() != "LORA":
        refuse("it is of another type", f"peft_type {config.get('peft_type')!r}", "LORA")
    for key, why in _REFUSED.items():
        if config.get(key):
            refuse(why, f"{key} {config[key]!r}", f"no {key}")
    if config.get("fan_in_fan_out"):
        # PEFT switches it off itself for nn.Linear, which all modules of these families are.
        refuse(
            "its weights are said to be stored as [inputs, outputs]",
            "fan_in_fan_out true",
            "fan_in_fan_out false: the modules are nn.Linear",
            "if PEFT trained it on this base, it ignored the setting: set it to false",
        )
    if config.get("bias", "none") not in _BIASES:
        refuse("its biases are of a kind that is not known", f"bias {config['bias']!r}",
               ", ".join(map(repr, _BIASES)))  # fmt: skip
    initial = config.get("init_lora_weights", True)
    if not any(initial is known or initial == known for known in _INITIALISATIONS):
        refuse(
            "its initialisation took something away from the base",
            f"init_lora_weights {initial!r}",
            ", ".join(map(str, _INITIALISATIONS)),
            "save it with path_initial_model_for_weight_conversion, or merge it with PEFT",
        )


def _check_biases(
    path: Path, config: Mapping[str, Any], base: Checkpoint, replaced: Mapping[str, str]
) -> None:
    """Refuse an adapter that lacks the biases that it says were trained."""
    trained = config.get("bias", "none") != "none"
    has_some = any(name.endswith(".bias") for name in base.tensors)
    if trained and has_some and not any(name.endswith(".bias") for name in replaced):
        raise CorruptCheckpointError(
            "an adapter lacks the biases that were trained",
            where=path / WEIGHTS_NAME,
            got="no bias",
            expected=f"biases, as bias {config['bias']!r} of {CONFIG_NAME} says",
            hint="save the adapter again with PEFT's save_pretrained",
        )


def _sort(
    path: Path, stored: Mapping[str, TensorEntry]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Name of a weight -> names of its factors, by kind; and -> name of its replacement."""
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in stored:
        plain = name.removeprefix(PREFIX)
        factor, whole = FACTOR.fullmatch(plain), _WHOLE.fullmatch(plain)
        magnitude = _MAGNITUDE.fullmatch(plain)
        if magnitude:
            known, key = factors.setdefault(f"{magnitude[1]}.weight", {}), "magnitude"
        elif factor:
            known = factors.setdefault(f"{factor[1]}.weight", {})
            key = (factor[2] or "") + factor[3]
        elif whole and "lora_" not in plain and "original_module" not in plain:
            known, key = replaced, f"{whole[1]}.{whole[2]}"
        else:
            raise NotACheckpointError(
                f"the adapter holds a tensor that is no part of a LoRA: {name}",
                where=path / WEIGHTS_NAME,
                expected="lora_A, lora_B, and whole weights of saved modules",
                hint="merge it into its base with PEFT (merge_and_unload), and merge the result",
            )
        if key in known:
            raise CorruptCheckpointError(
                "an adapter holds a tensor twice",
                where=path / WEIGHTS_NAME,
                got=f"{known[key]} and {name}",
            )
        known[key] = name
    return factors, replaced


def _update(
    path: Path,
    config: Mapping[str, Any],
    name: str,
    factors: Mapping[str, str],
    stored: Mapping[str, TensorEntry],
) -> LowRankUpdate:
    module = name.removesuffix(".weight")
    embedding, magnitude = "embedding_A" in factors, factors.get("magnitude")
    if set(factors) - {"magnitude"} not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise CorruptCheckpointError(
            f"an adapter lacks one of the two factors of {module}",
            where=path / WEIGHTS_NAME,
            got=", ".join(factors.values()),
            expected="lora_A and lora_B",
        )
    a, b = (factors["embedding_" * embedding + side] for side in "AB")
    rank = _number(path, config, "r", "rank_pattern", module)
    alpha = _number(path, config, "lora_alpha", "alpha_pattern", module)
    first, second = stored[a].shape, stored[b].shape
    if len(first) != 2 or len(second) != 2 or (first[0], second[1]) != (rank, rank):
        raise CorruptCheckpointError(
            f"the factors of {module} do not have the rank that the adapter's settings say",
            where=path / WEIGHTS_NAME,
            got=f"A {list(first)}, B {list(second)}",
            expected=f"A [{rank:g}, inputs], B [outputs, {rank:g}]",
            hint=f"{CONFIG_NAME} and {WEIGHTS_NAME} are probably of two adapters",
        )
    _check_magnitude(path, config, module, factors, stored)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # PEFT keeps A of an embedding as [r, tokens], B as [dimensions, r].
    return LowRankUpdate(a, b, scaling, embedding, magnitude)


def _check_magnitude(
    path: Path,
    config: Mapping[str, Any],
    module: str,
    factors: Mapping[str, str],
    stored: Mapping[str, TensorEntry],
) -> None:
    """Refuse rows' lengths (DoRA) that do not fit the settings, or the module."""
    magnitude, is_dora = factors.get("magnitude"), bool(config.get("use_dora"))
    if is_dora and "embedding_A" in factors:
        raise NotACheckpointError(
            f"the adapter is none that can be added exactly: DoRA of an embedding, {module}",
            where=path / CONFIG_NAME,
            hint="merge it into its base with PEFT (merge_and_unload), and merge the result",
        )
    if is_dora != (magnitude is not None):
        raise CorruptCheckpointError(
            f"an adapter's settings and its tensors of {module} are not of one kind",
            where=path / WEIGHTS_NAME,
            got=f"use_dora {is_dora}, and {magnitude or 'no lora_magnitude_vector'}",
            expected="a lora_magnitude_vector for each module with use_dora, else none",
            hint=f"{CONFIG_NAME} and {WEIGHTS_NAME} are probably of two adapters",
        )
    if magnitude is not None and stored[magnitude].shape != stored[factors["B"]].shape[:1]:
        raise CorruptCheckpointError(
            f"the lengths of {module}'s rows are not as many as it has",
            where=path / WEIGHTS_NAME,
            got=f"{magnitude} {list(stored[magnitude].shape)}",
            expected=list(stored[factors["B"]].shape[:1]),
        )


def _number(path: Path, config: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """A module's rank or alpha: of the first pattern that fits its name's end, or the usual."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise _bad_setting(path, pattern, repr(patterns)[:200], "an object: module to number")
    costly = next((e for e in patterns if len(e) > _LONGEST_PATTERN or _REPEATED.search(e)), None)
    if costly is not None:
        expected = "names of modules, without a group that is repeated"
        raise _bad_setting(path, pattern, repr(costly)[:200], expected)
    value, where = config.get(key), key
    try:
        for expression in patterns:
            if re.fullmatch(rf"(.*\.)?({expression})", module):
                value, where = patterns[expression], f"{pattern}.{expression}"
                break
    except (re.error, TypeError) as error:
        raise _bad_setting(path, pattern, error, "regular expressions of modules") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _bad_setting(path, where, repr(value), "a number above 0")
    return float(value)


def _bad_setting(path: Path, key: str, got: object, expected: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"an adapter's setting cannot be used: {key}",
        where=path / CONFIG_NAME,
        got=got,
        expected=expected,
    )


def _check_shape(opened: AdaptedCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    known = opened.base.tensors.get(name)
    if known is None or known.shape != shape:
        module = name.rpartition(".")[0]
        raise MismatchError(
            f"the adapter does not fit the base: {module}",
            where=opened.path / WEIGHTS_NAME,
            got=list(shape),
            expected=f"{name} {list(known.shape)}" if known else "a module of the base",
            hint="name the base that the adapter was trained on: "
            f"{opened.adapter_config.get('base_model_name_or_path')}",
        )


def _check_tied(opened: AdaptedCheckpoint) -> None:
    """Refuse an adapter that makes the head differ from the embedding it is tied to.

    PEFT adapts one of the two and leaves the other, so that the model no longer has one tensor.

    Raises:
        NotACheckpointError: They would differ.
    """
    pair = [name for name in (EMBEDDING, LM_HEAD) if name in opened.replaced]
    untied = [name for name in (EMBEDDING, LM_HEAD) if name in opened.updates]
    if pair and not untied:
        own = read_own(opened.stored, [opened.replaced[name] for name in pair])
        first, *others = own.values()
        second = others[0] if others else opened.base.read([EMBEDDING])[EMBEDDING]
        untied = [] if torch.equal(first, second.to(first.dtype)) else pair
    if untied:
        raise NotACheckpointError(
            "the adapter unties the head from the embedding, which in the base are one tensor",
            where=opened.path / WEIGHTS_NAME,
            got=", ".join(untied),
            expected="neither adapted, or both stored whole and equal",
            hint="leave embed_tokens and lm_head out of target_modules and modules_to_save",
        )

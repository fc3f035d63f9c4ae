"""What a plan reads: configurations and headers. Weights that are not there yet are assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from arm_ray.calibration.stream import mean_tokens
from arm_ray.checkpoints.formats import (
    FormatOrAuto,
    find_format,
    open_given,
    open_source,
    split_source,
)
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.states import has_tokenizer
from arm_ray.checkpoints.vocabulary import with_grown_base
from arm_ray.checkpoints.weight_file import DTYPES, TensorEntry
from arm_ray.config import MergeConfig
from arm_ray.errors import ArmRayError, ConfigError, CorruptCheckpointError, NotACheckpointError
from arm_ray.hardware import Units
from arm_ray.model.checks import base_dtype, layout_of, storage_dtypes
from arm_ray.model.layout import ModelLayout
from arm_ray.model.unknown import check_all
from arm_ray.planning.workload import Workload
from arm_ray.schedule import BASE, INITIAL, candidate_name
from arm_ray.steps import step_samples
from arm_ray.storage.regular import json_in
from arm_ray.storage.urls import is_url

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt")


def open_workload(
    config: MergeConfig, tokens_per_sample: int | None = None, units: Units | None = None
) -> tuple[Workload, list[str]]:
    """Open the checkpoints of a merge as far as they are there.

    Args:
        config: The configuration.
        tokens_per_sample: None takes the mean of a mini-batch where data and tokenizer are at hand,
            else `calibration.max_length`, the most there can be.
        units: Of the devices, for `precision.compute_dtype: auto`; None: they have all.

    Returns:
        The workload, and what was assumed for it, one sentence each.

    Raises:
        CheckpointError: The base's `config.json` is missing or wrong, or a checkpoint that is
            there cannot be merged.
        ConfigError: `tokens_per_sample` is below 1.
    """
    notes: list[str] = []
    masters = config.precision.masters
    kind, place = split_source(config.base)
    path = None if is_url(place) else _find(place)
    if path is None and not is_url(place):
        raise NotACheckpointError(
            "base: there is no such directory, and no downloaded model of that name",
            where=config.base,
            expected="a directory with config.json at least; the weights may be missing",
            hint="for a model of the Hugging Face hub, download its config.json alone: "
            f"hf download {place} config.json --local-dir DIR, and set base=DIR",
        )
    if path is None:
        base = _open_url(config.base, BASE, config)
        layout = layout_of(base, config.runtime.layers_per_group, config.trust_remote_code)
    else:
        layout, base = _open_base(path, kind, config, notes)
    checkpoints = {BASE: base}
    others = {candidate_name(i): given for i, given in enumerate(config.candidates)}
    if config.initial_state is not None:
        others[INITIAL] = config.initial_state
    for label, given in others.items():
        kind, place = split_source(given)
        if is_url(place):
            checkpoints[label] = _open_url(given, label, config, base)
            continue
        found = _find(place)
        if found is None or not _has_weights(found):
            notes.append(f"{label}: no weights at {given} yet; taken to be stored as the base is")
            checkpoints[label] = base
            continue
        checkpoints[label] = _open(found, label, kind, masters, base)
    if config.vocabulary == "common":
        checkpoints = with_grown_base(checkpoints, layout.embedding, layout.token_rows)
    if checkpoints[BASE] is not base:
        layout = layout_of(
            checkpoints[BASE], config.runtime.layers_per_group, config.trust_remote_code
        )
    layout, checkpoints, unknown = check_all(layout, checkpoints, config)
    notes += unknown
    return workload_of(config, layout, checkpoints, tokens_per_sample, units, notes), notes


def workload_of(
    config: MergeConfig,
    layout: ModelLayout,
    checkpoints: Mapping[str, Checkpoint],
    tokens_per_sample: int | None = None,
    units: Units | None = None,
    notes: list[str] | None = None,
) -> Workload:
    """The workload of checkpoints that are open.

    Args:
        config: The configuration.
        layout: The model.
        checkpoints: State name (`base`, `candidate-1`, …) -> checkpoint.
        tokens_per_sample: As for `open_workload`.
        units: The same.
        notes: Where what was assumed is added, one sentence each.

    Raises:
        ConfigError: `tokens_per_sample` is below 1.
    """
    notes = [] if notes is None else notes
    dtypes = {
        label: {name: DTYPES[c.tensors[name].code] for name in layout.shapes}
        for label, c in checkpoints.items()
    }
    storage = config.precision.storage_dtype
    if storage == "float8_e4m3fn":
        notes.append(
            "precision.storage_dtype: weights that become FP8 are written in float32 at first, and "
            "count so"
        )
    directories = [d for c in checkpoints.values() for d in (c.path, c.config_directory)]
    samples, tokens = _calibration(config, tokens_per_sample, directories, notes)
    if not config.method.is_plain_sum:
        notes.append(
            f"{config.method.operator}: time is that of a plain sum; what the operator computes, "
            f"and its rounds over the model, are not in it"
        )
    return Workload(
        layout,
        dtypes,
        storage_dtypes(layout, checkpoints[BASE], storage),
        _compute_dtype(config, base_dtype(layout, checkpoints[BASE]), units, notes),
        config.schedule,
        samples,
        tokens,
        config.runtime.micro_batch_tokens,
        *_step_samples(config),
        _compared_samples(config, notes),
        frozenset(label for label, c in checkpoints.items() if not c.is_laid_out),
        config.compares_losses and config.runtime.residency != "disk",
    )


def _compute_dtype(
    config: MergeConfig, stored: torch.dtype, units: Units | None, notes: list[str]
) -> torch.dtype:
    """Of the forward pass, of a base that is stored in a format; as the merge will take it."""
    asked = config.precision.compute_dtype
    if asked != "auto":
        return _dtype(asked)
    if units is None:
        return stored
    chosen, why = units.choose(str(stored).removeprefix("torch."))
    if _dtype(chosen) != stored and config.method.needs_calibration:
        notes.append(f"the forward pass is in {chosen}: {why}")
    return _dtype(chosen)


def _calibration(
    config: MergeConfig,
    tokens_per_sample: int | None,
    directories: Sequence[Path],
    notes: list[str],
) -> tuple[int, int]:
    """Samples of an iteration, and tokens of each."""
    if config.calibration is None or not config.runs_forward:
        return 0, 1
    samples = config.calibration.batch_size if config.method.needs_calibration else 0
    if tokens_per_sample is None:
        tokenizer = next(filter(has_tokenizer, directories), None)
        seen = mean_tokens(config.calibration, tokenizer) if tokenizer is not None else None
        tokens = config.calibration.max_length if seen is None else seen
        where = (
            f"{tokens} tokens (calibration.max_length), the most there can be"
            if seen is None
            else f"{tokens} tokens, the mean of a mini-batch of calibration.path"
        )
        notes.append(f"every sample has {where}; --tokens-per-sample says otherwise")
        return samples, tokens
    if tokens_per_sample < 1:
        raise ConfigError("--tokens-per-sample is below 1", got=tokens_per_sample)
    return samples, min(tokens_per_sample, config.calibration.max_length)


def _step_samples(config: MergeConfig) -> tuple[int, int]:
    """Samples that choose a step, and those that check it."""
    if config.calibration is None or not config.schedule.searches_step:
        return 0, 0
    return step_samples(config.calibration.batch_size)


def _compared_samples(config: MergeConfig, notes: list[str]) -> tuple[int, int]:
    """Samples that models are compared on, and samples of the final losses."""
    if config.calibration is None or not config.compares_losses:
        return 0, 0
    samples, final = config.select.sizes(4 * 128)
    notes.append(f"models are compared on {samples} samples, and {final} more at the end (select)")
    return samples, final


def _find(path_or_id: str) -> Path | None:
    """The directory, or what the hub's cache on this machine has of a model. Downloads nothing."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path.resolve()
    if path.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path_or_id, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _has_weights(path: Path) -> bool:
    if find_format(path)[0] != "hf":
        return True
    return any(next(path.glob(pattern), None) for pattern in _WEIGHTS)


def _open_base(
    path: Path, kind: FormatOrAuto, config: MergeConfig, notes: list[str]
) -> tuple[ModelLayout, Checkpoint]:
    layers_per_group, trusted = config.runtime.layers_per_group, config.trust_remote_code
    if not (path / "config.json").is_file() or _has_weights(path):
        # With its own words for what is missing.
        base = _open(path, BASE, kind, config.precision.masters)
        return layout_of(base, layers_per_group, trusted), base
    try:
        content = json_in(path / "config.json")
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(
            "base: config.json cannot be read", where=path / "config.json", got=error
        ) from None
    layout = layout_of(Checkpoint(path, content, {}), layers_per_group, trusted)
    name = content.get("dtype") or content.get("torch_dtype") or "bfloat16"
    code = _CODES.get(str(name), "BF16")
    notes.append(f"base: no weights at {path.name}; taken to be stored in {_name(code)}")
    entries = {
        tensor: TensorEntry(tensor, code, shape, path, 0, DTYPES[code].itemsize * prod(shape))
        for tensor, shape in layout.shapes.items()
    }
    return layout, Checkpoint(path, content, entries)


def _open_url(
    given: str, label: str, config: MergeConfig, base: Checkpoint | None = None
) -> Checkpoint:
    try:
        return open_given(given, base, config.precision.masters, config.runtime.scratch_path)
    except ArmRayError as error:
        raise error.of(label) from None


def _open(
    path: Path, label: str, kind: FormatOrAuto, masters: bool, base: Checkpoint | None = None
) -> Checkpoint:
    try:
        return open_source(path, base, kind, masters)
    except ArmRayError as error:
        raise error.of(label) from None


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(code: str) -> str:
    return str(DTYPES[code]).removeprefix("torch.")

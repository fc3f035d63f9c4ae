"""What a directory is, as a checkpoint: its format and step, whether it is whole, what is in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.formats import find_format, missing_of, one_line, open_source
from arm_ray.checkpoints.fp8 import Fp8Checkpoint
from arm_ray.checkpoints.huggingface import Checkpoint, open_tensors, read_json
from arm_ray.checkpoints.naming import Format, FormatOrAuto
from arm_ray.checkpoints.peft import CONFIG_NAME
from arm_ray.checkpoints.peft_file import read_stored
from arm_ray.checkpoints.sharded import ShardedCheckpoint
from arm_ray.checkpoints.urls import open_url
from arm_ray.checkpoints.weight_file import TensorEntry
from arm_ray.errors import ArmRayError, CheckpointError, NotACheckpointError
from arm_ray.storage.mirror import mirror, with_adapter
from arm_ray.storage.regular import json_in
from arm_ray.storage.store import Store
from arm_ray.storage.urls import parse_url

_STEP = re.compile(
    r"(?:best_)?(?:checkpoint-|global_step_?|step[-_]|iter_)(\d+)(?:_hf|_universal)?"
)
_ADAPTER_KEYS = ("r", "lora_alpha", "base_model_name_or_path")


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, described.

    Attributes:
        path: The directory.
        format: How it is read.
        found_by: What showed the format; `forced` where the caller named it.
        step: Of the training; None where nothing says it.
        complete: Whether every weight is there.
        reason: What is missing; empty where it is complete.
        config: The `config.json` that describes the model; None where there is none.
        model_type: Of the configuration.
        num_tensors: As a `state_dict` counts them.
        num_parameters: Numbers in them; tied tensors count once.
        dtypes: Dtype as safetensors spells it -> tensors of it.
        file_bytes: Size of the files that the weights are in.
        details: What else the format says.
    """

    path: str
    format: Format
    found_by: str
    step: int | None
    complete: bool
    reason: str
    config: str | None = None
    model_type: str | None = None
    num_tensors: int = 0
    num_parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def inspect_checkpoint(path: Path, format: FormatOrAuto = "auto") -> Inspection:  # noqa: A002
    """Describe a checkpoint. Reads headers and tables, and no weights.

    Args:
        path: The directory.
        format: How to read it; auto: as it looks.

    Returns:
        What it is; one that is damaged or not whole has a reason, and what could be read of it.

    Raises:
        NotACheckpointError: There is no such directory.
    """
    if not path.is_dir():
        raise NotACheckpointError(
            "a checkpoint is not a directory",
            where=path,
            got="a file" if path.exists() else "nothing there",
            hint="check the path",
        )
    found_by = "forced"
    kind: Format
    if format == "auto":
        kind, found_by = find_format(path)
    else:
        kind = format
    opened, details, reason = None, dict[str, Any](), ""
    try:
        opened, details = _open(path, kind)
        reason = missing_of(path, kind) or ""
    except ArmRayError as error:
        reason = one_line(error)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    step = _step(path, details.pop("step", None))
    config = _config(path if opened is None else opened.config_directory)
    if config is None and kind == "hf" and not reason:
        reason = "no config.json"
    found = Inspection(path=str(path), format=kind, found_by=found_by, step=step,
                       complete=not reason, reason=reason, details=details)  # fmt: skip
    if opened is None:
        return found
    counted = _once(opened)
    files = {entry.file for entry in opened.tensors.values()}
    if isinstance(opened, ShardedCheckpoint):
        files = {piece.file for tensor in opened.stored.values() for piece in tensor.pieces}
    return Inspection(
        **{
            **asdict(found),
            "config": None if config is None else str(config),
            "model_type": opened.config.get("model_type"),
            "num_tensors": len(opened.tensors),
            "num_parameters": sum(prod(entry.shape) for entry in counted),
            "dtypes": dict(Counter(entry.code for entry in opened.tensors.values())),
            "file_bytes": sum(file.stat().st_size for file in files if file.exists()),
        }
    )


def inspect_url(given: str, format: FormatOrAuto, scratch: Path) -> Inspection:  # noqa: A002
    """The same for a safetensors model or an adapter at a URL.

    Args:
        given: The URL.
        format: How to read it; auto: as it looks.
        scratch: Directory for the local copy of its configuration.

    Raises:
        StorageError: There is nothing at the URL, or it cannot be read.
    """
    # An adapter needs no base to be described: only its own files are looked at.
    store = Store(given)
    if format == "peft" or (format == "auto" and CONFIG_NAME in store.files()):
        local = mirror(store, scratch, with_adapter)
        return replace(inspect_checkpoint(local, "peft"), path=given)
    url = parse_url(given)
    found_by = "forced" if format == "hf" else "config.json"
    step = _step(Path(url.name), None)
    found = Inspection(given, "hf", found_by, step, complete=True, reason="")
    try:
        opened = open_url(given, None, format, scratch)
    except CheckpointError as error:
        return replace(found, complete=False, reason=one_line(error))
    if isinstance(opened, Fp8Checkpoint):
        opened = opened.source
    files = store.files()
    return replace(
        found,
        config=f"{given}/config.json",
        model_type=opened.config.get("model_type"),
        num_tensors=len(opened.tensors),
        num_parameters=sum(prod(entry.shape) for entry in opened.tensors.values()),
        dtypes=dict(Counter(entry.code for entry in opened.tensors.values())),
        file_bytes=sum(
            files[name].num_bytes for name in {e.file.name for e in opened.tensors.values()}
        ),
    )


def _open(path: Path, kind: Format) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint, also without its configuration or base, and what else its format says."""
    if kind == "peft":
        settings = read_json(path / CONFIG_NAME)
        details = {key: settings.get(key) for key in _ADAPTER_KEYS}
        return Checkpoint(path, {}, read_stored(path)), details
    if kind == "hf":
        opened = open_tensors(path)
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        return Checkpoint(path, config, opened.tensors), {}
    # In place of a base: nothing.
    sharded = open_source(path, Checkpoint(path, {}, {}), kind)
    assert isinstance(sharded, ShardedCheckpoint)
    return sharded, dict(sharded.facts)


def _once(opened: Checkpoint) -> list[TensorEntry]:
    """The tensors, without second names of the same pieces."""
    if not isinstance(opened, ShardedCheckpoint):
        return list(opened.tensors.values())
    first = {(tensor.pieces, tensor.part): name for name, tensor in opened.stored.items()}
    return [opened.tensors[name] for name in first.values()]


def _config(path: Path) -> Path | None:
    file = path / "config.json"
    return file if file.is_file() else None


def _step(path: Path, known: Any) -> int | None:
    """From the trainer's own record, the files, or the directory's name, whatever there is."""
    for directory in (path, path.parent):
        try:
            state = json_in(directory / "trainer_state.json")
            return int(state["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        # The directory above is the same checkpoint's only below checkpoint-N and the like.
        if not _STEP.fullmatch(path.parent.name):
            break
    if isinstance(known, int):
        return known
    for name in (path.name, path.parent.name):
        if match := _STEP.fullmatch(name):
            return int(match[1])
    return None

"""What kind of checkpoint a directory holds, opening any of them, and whether it is all there."""

from __future__ import annotations

from pathlib import Path

from arm_ray.checkpoints import dcp, fsdp, megatron, torchtitan, universal, zero
from arm_ray.checkpoints.fp8 import read_as_bfloat16
from arm_ray.checkpoints.huggingface import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_checkpoint,
    open_tensors,
    resolve_path,
)
from arm_ray.checkpoints.naming import FORMATS, Format, FormatOrAuto, split_source
from arm_ray.checkpoints.peft import CONFIG_NAME, is_adapter, open_adapter
from arm_ray.checkpoints.peft_file import read_stored
from arm_ray.checkpoints.shard_format import ShardFormat
from arm_ray.checkpoints.urls import open_url
from arm_ray.checkpoints.validation import check_zero_padding
from arm_ray.config import scratch_path
from arm_ray.errors import ArmRayError, NotACheckpointError
from arm_ray.storage.urls import is_url

__all__ = [
    "FORMATS",
    "Format",
    "FormatOrAuto",
    "find_format",
    "missing",
    "open_given",
    "open_source",
    "split_source",
]
# In this order: what is exported is preferred to shards, a trainer's own files to others made of
# them, and names that are known to those that are taken as they are.
_SHARDED: dict[Format, ShardFormat] = {
    "zero": zero.FORMAT,
    "universal": universal.FORMAT,
    "fsdp": fsdp.FORMAT,
    "megatron": megatron.FORMAT,
    "torchtitan": torchtitan.FORMAT,
    "dcp": dcp.FORMAT,
}


def find_format(path: Path) -> tuple[Format, str]:
    """What a directory holds, and by which file that was found.

    Returns:
        The format, `hf` where there is nothing of any, and the file, or empty.
    """
    if is_adapter(path):
        return "peft", CONFIG_NAME
    for name in (SINGLE_NAME, INDEX_NAME):
        if (path / name).exists():
            return "hf", name
    stray = next(iter(sorted(path.glob("*.safetensors"))), None)
    if stray is not None:
        return "hf", stray.name
    for kind, shards in _SHARDED.items():
        found = shards.find(path)
        if found is not None:
            return kind, shards.mark if found == path else f"{found.name}/{shards.mark}"
    return "hf", ""


def open_source(
    path: Path,
    base: Checkpoint | None = None,
    format: FormatOrAuto = "auto",  # noqa: A002 - the user's word for it
    masters: bool = True,
) -> Checkpoint:
    """Open a checkpoint of any format. Reads tables and headers, and no weights.

    Args:
        path: The directory.
        base: What adapters are added to, and whose configuration is taken by checkpoints that have
            none.
        format: How to read it; auto: as `find_format` says.
        masters: Read float32 where a trainer's shards hold it; else the weights in the model's own
            dtype.

    Raises:
        CheckpointError: Any of its kinds.
    """
    if not path.is_dir():
        return open_checkpoint(path)  # which says so
    try:
        kind = find_format(path)[0] if format == "auto" else format
        if kind == "hf":
            return read_as_bfloat16(open_checkpoint(path, base))
        if kind != "peft":
            return _SHARDED[kind].open(path, base, masters)
        if base is None:
            raise NotACheckpointError(
                "the path holds an adapter, and there is no base to add it to",
                where=path,
                got=CONFIG_NAME,
                expected="a whole model",
                hint="name the model that it was trained on as the base",
            )
        return open_adapter(path, base)
    except OSError as error:
        raise NotACheckpointError(
            "a checkpoint cannot be read",
            where=path,
            got=error,
            hint="check the file, and its permissions",
        ) from None


def open_given(
    given: str,
    base: Checkpoint | None = None,
    masters: bool = True,
    scratch: Path | None = None,
) -> Checkpoint:
    """Open what a user named: a directory, hub id or URL, perhaps with `FORMAT:` before it.

    Args:
        given: What the user wrote.
        base: As for `open_source`, as is `masters`.
        masters: Of a trainer's shards.
        scratch: Directory for local copies of what is at a URL; None: the default one.

    Raises:
        CheckpointError: Any of its kinds.
        StorageError: A URL cannot be read.
    """
    kind, path = split_source(given)
    if is_url(path):
        return open_url(path, base, kind, scratch or scratch_path(None))
    return open_source(resolve_path(path), base, kind, masters)


def missing(path: Path) -> str | None:
    """What is missing of a checkpoint's weight files, in a line; None where they are whole.

    It reads headers and tables, and raises nothing: the directory may be written or removed
    meanwhile.
    """
    try:
        return missing_of(path, find_format(path)[0])
    except ArmRayError as error:
        return one_line(error)
    except Exception as error:  # whatever half a file leads to
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def missing_of(path: Path, kind: Format) -> str | None:
    """The same for a known format.

    Raises:
        CheckpointError: A file is damaged, or such that is not read.
        OSError: A file cannot be read, or vanished.
    """
    if kind == "peft":
        read_stored(path)
    elif kind == "hf":
        opened: Checkpoint = open_tensors(path)
        check_zero_padding({"it": opened})
    else:
        return _SHARDED[kind].missing(path)
    return None


def one_line(error: ArmRayError) -> str:
    """An error in a line: what, and what was found instead of what."""
    text = error.what
    if error.got is not None:
        text += f": {error.got}"
    if error.expected is not None:
        text += f" (expected {error.expected})"
    return " ".join(text.split())

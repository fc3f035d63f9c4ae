"""torch's distributed checkpoints (DCP), and those of accelerate and transformers with FSDP.

::

    <directory>/.metadata               which piece of which tensor is where; written last
    <directory>/__R_i.distcp            pieces, one after another, each as torch.save writes it
    checkpoint-N/pytorch_model_fsdp_0/  such a directory (transformers, accelerate)

`.metadata` is a plain pickle of a few of torch's classes. Stand-ins are made for them, so that a
file that says otherwise does not change torch's own; other classes are refused.
"""

from __future__ import annotations

import functools
import math
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.naming import Format
from arm_ray.checkpoints.shard_format import ShardFormat
from arm_ray.checkpoints.sharded import (
    CODES,
    Box,
    Key,
    ShardedCheckpoint,
    StoredTensor,
    Table,
    check_covered,
)
from arm_ray.errors import ArmRayError, CorruptCheckpointError, NotACheckpointError
from arm_ray.storage.regular import open_regular

METADATA = ".metadata"
_PIECES = "__*_*.distcp"
_ACCELERATE = "pytorch_model_fsdp_0"
_TORCH = "torch.distributed.checkpoint"
_RECORDS = (
    f"{_TORCH}.metadata.Metadata",
    f"{_TORCH}.metadata.TensorStorageMetadata",
    f"{_TORCH}.metadata.BytesStorageMetadata",
    f"{_TORCH}.metadata.ChunkStorageMetadata",
    f"{_TORCH}.metadata.TensorProperties",
    f"{_TORCH}.metadata._MEM_FORMAT_ENCODING",
    f"{_TORCH}.metadata.MetadataIndex",
    f"{_TORCH}.metadata.StorageMeta",
    f"{_TORCH}.filesystem._StorageInfo",
    f"{_TORCH}.filesystem._StoragePrefix",
    f"{_TORCH}.filesystem.SerializationFormat",
    # Megatron keeps the plans of all ranks beside the table.
    f"{_TORCH}.planner.SavePlan",
    f"{_TORCH}.planner.WriteItem",
    f"{_TORCH}.planner.WriteItemType",
    f"{_TORCH}.planner.TensorWriteData",
    f"{_TORCH}.planner.BytesIOWriteData",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
)
# What a trainer saves beside the model, when the model's tensors have no prefix of their own.
_OTHERS = re.compile(r"(chained_\d+\.)?(optimizer|optim|lr_scheduler|dataloader|train_state)\.")


class DcpCheckpoint(ShardedCheckpoint):
    """A distributed checkpoint of torch."""

    kind: ClassVar[Format] = "dcp"

    def load(self, file: Path, key: Key) -> Any:
        """The piece at a place in a file: its first byte, and their number."""
        offset, length = (int(part) for part in key)
        with open_regular(file) as opened:
            opened.seek(offset)
            return pickles.load_bytes(opened.read(length), file)


def find(path: Path) -> Path | None:
    """Where the pieces are: in the path, or where accelerate puts them below it."""
    return next((each for each in (path, path / _ACCELERATE) if is_one(each)), None)


def is_one(directory: Path) -> bool:
    """Whether a directory holds a distributed checkpoint, whole or not, whoever wrote it."""
    return (directory / METADATA).is_file() or next(directory.glob(_PIECES), None) is not None


def names(directory: Path) -> Collection[str]:
    """Names of everything in a directory's table; empty where there is none that can be read."""
    try:
        return list(_table_of(directory / METADATA).state_dict_metadata)
    except (OSError, ArmRayError, AttributeError, TypeError):
        return ()


def _table_of(file: Path) -> Any:
    status = file.stat()
    return _unpickled(file, status.st_ino, status.st_size, status.st_mtime_ns)


# It is asked for what it is, whose it is, and where the tensors are, one after another.
@functools.lru_cache(maxsize=2)
def _unpickled(file: Path, _inode: int, _size: int, _changed: int) -> Any:
    return pickles.unpickle(file, _known())


def read_table(source: Path, _masters: bool = True) -> Table:
    """Where each tensor lies; see `ShardFormat`. Masters are not told apart: it is as it is."""
    file = source / METADATA
    if not file.is_file():
        raise CorruptCheckpointError(
            "a distributed checkpoint has no table of its tensors",
            where=source,
            got=", ".join(sorted(p.name for p in source.glob(_PIECES))[:4]),
            expected=METADATA,
            hint="torch writes it last: wait until the checkpoint is complete",
        )
    metadata = _table_of(file)
    try:
        entries = {
            name: found
            for name, found in metadata.state_dict_metadata.items()
            if not _OTHERS.match(name)
        }
        places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if getattr(index, "offset", None) is not None
        }
        stored = {
            name: _tensor(source, name, found, places)
            for name, found in entries.items()
            if hasattr(found, "chunks")
        }
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(
            "the table of a distributed checkpoint is not what torch writes",
            where=file,
            got="something else"
            if not hasattr(metadata, "state_dict_metadata")
            else "records that do not fit each other",
            hint="save the checkpoint again",
        ) from error
    files = {piece.file for tensor in stored.values() for piece in tensor.pieces}
    _check_sizes(stored, files)
    ranks = {piece.name.removeprefix("__").partition("_")[0] for piece in files}
    facts = {"ranks": len(ranks), "weights": "as the trainer holds them"}
    left = tuple(sorted(entries.keys() - stored.keys()))
    return Table(stored, facts, holds_others=True, left=left)


def _tensor(
    source: Path, name: str, found: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]
) -> StoredTensor:
    shape, dtype = tuple(found.size), found.properties.dtype
    code = CODES.get(dtype)
    boxes = []
    for chunk in found.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if not math.prod(sizes):
            continue
        info = places[name, offsets]
        if getattr(info, "transform_descriptors", None):
            raise NotACheckpointError(
                f"{name} is stored compressed or transformed",
                where=source,
                got=info.transform_descriptors,
                expected="plain tensors",
            )
        # A name such as ../x or /x would make us read outside of what the user pointed at.
        if Path(info.relative_path).name != info.relative_path:
            raise CorruptCheckpointError(
                "the table names a file outside its directory",
                where=source / METADATA,
                got=info.relative_path,
            )
        key = (int(info.offset), int(info.length))
        if min(key) < 0:
            raise CorruptCheckpointError(
                f"the table says that {name} lies before the beginning of a file",
                where=source / METADATA,
                got=f"byte {key[0]}, {key[1]} bytes",
            )
        boxes.append(Box(source / info.relative_path, key, offsets, sizes))
    # Optimizers count in whole numbers: those fall away with the other tensors.
    tensor = StoredTensor(shape, code or str(dtype), tuple(boxes))
    return check_covered(name, tensor, source)


def _check_sizes(stored: Mapping[str, StoredTensor], files: set[Path]) -> None:
    sizes = {file: file.stat().st_size if file.is_file() else -1 for file in files}
    for name, tensor in stored.items():
        for piece in tensor.pieces:
            end = sum(int(part) for part in piece.key)
            if sizes[piece.file] < end:
                raise CorruptCheckpointError(
                    "a file of a distributed checkpoint is missing or truncated",
                    where=piece.file,
                    got="no such file" if sizes[piece.file] < 0 else f"{sizes[piece.file]} bytes",
                    expected=f"at least {end} bytes, for {name}",
                    hint="copy or save the checkpoint again",
                )


class _Record:
    """Takes the place of a record of torch's: its fields, and nothing else."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            # torch's properties of a tensor, the only ones that are kept in this form.
            state = {"dtype": state[0]}
        for key, value in dict(state).items():
            object.__setattr__(self, str(key), value)


def _known() -> dict[str, Any]:
    # New classes each time: what a file does to them ends with it.
    known: dict[str, Any] = {
        name: type(name.rsplit(".", 1)[-1], (_Record,), {}) for name in _RECORDS
    }
    known |= {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    known |= {
        "torch.Size": torch.Size,
        "torch.serialization._get_layout": pickles.StandIn,
        "collections.OrderedDict": OrderedDict,
        "pathlib.PosixPath": pickles.StandIn,
        "pathlib._local.PosixPath": pickles.StandIn,
    }
    return known


FORMAT = ShardFormat(
    DcpCheckpoint,
    mark=METADATA,
    find=find,
    read=read_table,
    absent="the directory holds no distributed checkpoint of torch",
    expected=METADATA,
)

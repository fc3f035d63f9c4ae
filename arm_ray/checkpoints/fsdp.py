"""verl's FSDP checkpoints: each rank's own part of a sharded `state_dict`, as `DTensor`s.

::

    global_step_N/actor/model_world_size_W_rank_R.pt        or in global_step_N itself
    global_step_N/actor/huggingface/                        configuration and tokenizer

A `DTensor` knows the whole tensor's shape, how the ranks are arranged (the mesh), and along which
dimension each axis of the mesh cuts it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.shard_format import ShardFormat
from arm_ray.checkpoints.sharded import (
    Box,
    Key,
    ShardedCheckpoint,
    StoredTensor,
    Table,
    check_covered,
    code_of,
)
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError

_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_SHARDS = "model_world_size_*_rank_*.pt"


class FsdpCheckpoint(ShardedCheckpoint):
    """A checkpoint in FSDP's shards, as verl saves them."""

    kind = "fsdp"

    def load(self, file: Path, key: Key) -> Any:
        """The tensor of a rank, or its part of a `DTensor`."""
        _know_dtensors()
        content = super().load(file, key)
        return getattr(content, "_local_tensor", content)


def _know_dtensors() -> None:
    """Have torch put `DTensor` on its list of classes that are read, and not warn for each mesh."""
    import torch.distributed.tensor  # noqa: F401

    logging.getLogger("torch.distributed.device_mesh").addFilter(_is_no_warning)


def _is_no_warning(record: logging.LogRecord) -> bool:
    """Leave out that a mesh has no process group: there are no processes, and none are needed."""
    return "unpickling of the DeviceMesh" not in record.getMessage()


def find(path: Path) -> Path | None:
    """Where the shards are: in the path, or in `actor` below."""
    for directory in (path, path / "actor"):
        if next(directory.glob(_SHARDS), None) is not None:
            return directory
    return None


def read_table(source: Path, _masters: bool = True) -> Table:
    """Where each tensor lies; see `ShardFormat`. Masters are not told apart: it is as it is."""
    _know_dtensors()
    files = _rank_files(source)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    boxes: dict[str, list[Box]] = {}
    left: set[str] = set()
    for rank, file in enumerate(files):
        content = pickles.load(file)
        if not isinstance(content, dict):
            raise CorruptCheckpointError(
                "a file is no FSDP shard",
                where=file,
                got=type(content).__name__,
                expected="a state_dict",
            )
        for name, value in content.items():
            if not isinstance(value, Tensor):
                left.add(name)  # PyTorch's extra states
                continue
            local, box = _box(file, name, value, rank)
            known = (tuple(value.shape), code_of(local.dtype, name, file))
            if shapes.setdefault(name, known) != known:
                raise _contradiction(name, file, known, shapes[name])
            if box is not None:
                boxes.setdefault(name, []).append(box)
    stored = {
        name: check_covered(name, StoredTensor(shape, code, tuple(boxes.get(name, ()))), source)
        for name, (shape, code) in shapes.items()
    }
    facts = {"ranks": len(files), "weights": "as the trainer holds them"}
    return Table(stored, facts, left=tuple(sorted(left)))


def _rank_files(source: Path) -> list[Path]:
    """Every rank's file, by rank."""
    found: dict[int, dict[int, Path]] = {}
    for file in source.glob(_SHARDS):
        if match := _SHARD.fullmatch(file.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = file
    if len(found) != 1:
        raise CorruptCheckpointError(
            "the directory holds FSDP shards of different numbers of ranks",
            where=source,
            got=", ".join(f"world size {world}" for world in sorted(found)),
            expected="one",
            hint="remove those of the run that was replaced",
        )
    [(world, files)] = found.items()
    lacking = next((rank for rank in range(world) if rank not in files), None)
    if lacking is not None:
        raise CorruptCheckpointError(
            "FSDP shards are missing",
            where=source,
            got=f"{len(files)} of {world} files",
            expected=f"model_world_size_{world}_rank_{lacking}.pt",
            hint="wait until the checkpoint is complete, or take another one",
        )
    return [files[rank] for rank in range(world)]


def _contradiction(name: str, file: Path, got: object, expected: object) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"FSDP shards contradict each other about {name}",
        where=file,
        got=got,
        expected=expected,
        hint="the files are probably of two checkpoints",
    )


def _box(file: Path, name: str, value: Tensor, rank: int) -> tuple[Tensor, Box | None]:
    """The stored tensor of a rank, and the part of the whole that it is; None: another's copy."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        # Every rank has all of it.
        whole = Box(file, (name,), (0,) * value.dim(), tuple(value.shape))
        return value, whole if rank == 0 else None
    local: Tensor = value._local_tensor
    mesh = value.device_mesh.mesh
    at: list[int] = (mesh == rank).nonzero().flatten().tolist()
    if len(at) != mesh.dim():
        raise _contradiction(name, file, f"a mesh {mesh.tolist()}", f"one with rank {rank}")
    found = part_of(tuple(value.shape), value.placements, tuple(mesh.shape), at)
    if found is None:
        raise NotACheckpointError(
            f"{name} is sharded in a way that is not put together",
            where=file,
            got=", ".join(map(str, value.placements)),
            expected="Shard(dim) and Replicate()",
            hint="for tensor parallelism with FSDP, merge the shards with the trainer's own tool "
            "(verl.model_merger)",
        )
    offsets, sizes, is_first = found
    if tuple(local.shape) != sizes and local.numel():
        raise _contradiction(name, file, list(local.shape), list(sizes))
    return local, Box(file, (name,), offsets, sizes) if is_first and local.numel() else None


def part_of(
    shape: tuple[int, ...],
    placements: Sequence[Any],
    mesh: Sequence[int],
    at: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """Which part of a tensor a rank has.

    Args:
        shape: Of the tensor.
        placements: For each axis of the mesh, what it does.
        mesh: Length of each axis.
        at: The rank's place on each axis.

    Returns:
        Where its part begins, the part's shape, and whether it is the first of those who have the
        same; None where the placements are not known.
    """
    from torch.distributed.tensor import Replicate, Shard

    offsets, sizes, is_first = [0] * len(shape), list(shape), True
    for placement, count, index in zip(placements, mesh, at, strict=True):
        if isinstance(placement, Replicate):
            is_first = is_first and index == 0
        elif type(placement) is Shard:
            # As torch.chunk cuts: the last ones get less, or nothing.
            dim = placement.dim
            step = -(-sizes[dim] // count)
            begin = min(index * step, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(step, sizes[dim] - begin)
        else:
            return None
    return tuple(offsets), tuple(sizes), is_first


FORMAT = ShardFormat(
    FsdpCheckpoint,
    mark=_SHARDS,
    find=find,
    read=read_table,
    absent="the directory holds no FSDP shards",
    expected=_SHARDS,
    beside=lambda path, found: [found, found / "huggingface", path, path / "huggingface"],
)

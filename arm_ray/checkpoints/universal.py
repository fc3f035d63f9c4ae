"""DeepSpeed universal checkpoints: each parameter in float32 in a file of its own.

::

    <tag>/zero/<parameter>/fp32.pt      the weight: {"param": tensor}; of stage 3 a flat tensor
    <tag>/*_model_states.pt             names and shapes of the parameters
    latest_universal                    beside <tag>: its name
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from arm_ray.checkpoints import pickles, zero
from arm_ray.checkpoints.shard_format import ShardFormat, find_named
from arm_ray.checkpoints.sharded import (
    Box,
    ShardedCheckpoint,
    StoredTensor,
    Table,
    check_covered,
    code_of,
)
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError

_MODEL_FILES = "*_model_states.pt"
_WEIGHT = "fp32.pt"


class UniversalCheckpoint(ShardedCheckpoint):
    """A checkpoint in DeepSpeed's universal form."""

    kind = "universal"


def find(path: Path) -> Path | None:
    """Where the parameters are: in the path, in what `latest_universal` names, or the only one."""
    return find_named(path, "latest_universal", "*", _has_parameters)


def _has_parameters(path: Path) -> bool:
    return next(path.glob(f"zero/*/{_WEIGHT}"), None) is not None


def read_table(source: Path, _masters: bool = True) -> Table:
    """Where each parameter lies; see `ShardFormat`. All of it is float32."""
    files = sorted(source.glob(_MODEL_FILES))
    if not files:
        raise CorruptCheckpointError(
            "a universal checkpoint has no shapes of its parameters",
            where=source,
            expected=f"a file {_MODEL_FILES}",
            hint="ds_to_universal writes it last: wait until it is done",
        )
    parallel = next(iter(sorted(source.glob("*mp_rank_01*"))), None)
    if parallel is not None:
        raise NotACheckpointError(
            "the universal checkpoint is of a model with tensor parallelism",
            where=parallel,
            expected="one mp_rank_00",
            hint="export it to safetensors with the trainer's own tool",
        )
    model = pickles.load(files[0])
    if not isinstance(model, dict) or not isinstance(model.get("param_shapes"), list):
        raise CorruptCheckpointError(
            "a universal checkpoint has no shapes of its parameters",
            where=files[0],
            expected="param_shapes",
        )
    module = {k: v for k, v in (model.get("module") or {}).items() if isinstance(v, Tensor)}
    shapes: dict[str, Sequence[int]] = {
        name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()
    }
    shared: Mapping[str, str] = model.get("shared_params") or {}
    known = shapes.keys() | shared.keys()
    rest = {n: t for n, t in module.items() if n not in known and t.numel()}
    # Parameters that were not trained have a directory too; buffers have none.
    frozen_here = {n for n in rest if (source / "zero" / n).is_dir() and "/" not in n}
    shapes |= {name: tuple(rest.pop(name).shape) for name in sorted(frozen_here)}
    stored = {n: _parameter(source, n, s) for n, s in shapes.items() if n not in shared}
    stored |= zero.of_module(files[0], rest)
    # Stage 3 leaves what was not trained in the files of the model.
    ranked = zero.ranked(source, _MODEL_FILES)
    frozen = zero.frozen([pickles.load(file) for file in ranked], ranked, stage=3)
    stored |= {name: tensor for name, tensor in frozen.items() if name not in stored}
    stored |= {name: stored[owner] for name, owner in shared.items() if owner in stored}
    codes = {name: code_of(t.dtype, name, files[0]) for name, t in module.items() if name in stored}
    facts: dict[str, Any] = {"step": model.get("global_steps"), "weights": "float32 masters"}
    return Table(stored, facts, codes)


def _parameter(source: Path, name: str, shape: Sequence[int]) -> StoredTensor:
    file = source / "zero" / name / _WEIGHT
    # A parameter's name is a file's: it must not lead elsewhere.
    if "/" in name or name in (".", "..") or not file.is_file():
        raise CorruptCheckpointError(
            f"a universal checkpoint lacks the parameter {name}",
            where=source,
            expected=f"zero/{name}/{_WEIGHT}",
            hint="wait until the checkpoint is complete, or convert it again",
        )
    content = pickles.load(file)
    key: tuple[str, ...] = ()
    if isinstance(content, dict):
        content, key = content.get("param"), ("param",)
    if not isinstance(content, Tensor):
        raise CorruptCheckpointError(
            "a file holds no parameter",
            where=file,
            got="nothing" if content is None else type(content).__name__,
            expected="a tensor",
        )
    # Stage 3 leaves them flat.
    sizes = tuple(shape) if content.numel() == math.prod(shape) else tuple(content.shape)
    box = Box(file, key, (0,) * len(sizes), sizes)
    code = code_of(content.dtype, name, file)
    return check_covered(name, StoredTensor(tuple(shape), code, (box,)), source)


FORMAT = ShardFormat(
    UniversalCheckpoint,
    mark=f"zero/*/{_WEIGHT}",
    find=find,
    read=read_table,
    absent="the directory is no universal checkpoint of DeepSpeed",
    expected=f"zero/<parameter>/{_WEIGHT}",
    hint="of several directories, name one",
)

"""DeepSpeed ZeRO checkpoints: float32 weights that lie in pieces over the files of all ranks.

::

    checkpoint-N/latest                                     names the directory below
    checkpoint-N/global_stepN/*_model_states.pt             names and shapes of the parameters
    checkpoint-N/global_stepN/*_optim_states.pt             each rank's part of the float32 weights

Stages 1 and 2 keep the 16-bit model as well, whole, in `mp_rank_00_model_states.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.shard_format import ShardFormat, find_named
from arm_ray.checkpoints.sharded import (
    Box,
    Key,
    Run,
    ShardedCheckpoint,
    StoredTensor,
    Table,
    check_covered,
    code_of,
)
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError

_OPTIMIZER_FILES = "*_optim_states.pt"
_MODEL_FILES = "*_model_states.pt"
_FLAT = {3: "fp32_flat_groups"}
_FLAT_BELOW_3 = "single_partition_of_fp32_groups"
# A flat tensor of a rank, or the part of one: file, key, number of elements, dtype's code.
_Flat = tuple[Path, Key, int, str]


class ZeroCheckpoint(ShardedCheckpoint):
    """A checkpoint in DeepSpeed's shards."""

    kind = "zero"


def find(path: Path) -> Path | None:
    """Where the shards are: in the path, in what `latest` names, or in the only one below."""
    return find_named(path, "latest", "global_step*", _has_shards)


def _has_shards(path: Path) -> bool:
    if any(path.glob(_OPTIMIZER_FILES)):
        return True
    # DeepSpeed's universal checkpoints have such files, too, beside `zero/`.
    return any(path.glob(_MODEL_FILES)) and not (path / "zero").is_dir()


def _unwritten(source: Path) -> str | None:
    if not any(source.glob(_OPTIMIZER_FILES)):
        # Without ZeRO, the optimizer is beside the model; else its files are still to come.
        models = ranked(source, _MODEL_FILES)
        if _load(models[0]).get("optimizer") is None:
            return f"no {_OPTIMIZER_FILES}"
    return None


def read_table(source: Path, masters: bool) -> Table:
    """Where each parameter lies; see `ShardFormat`."""
    _check_parallelism(source)
    model_files, optimizer_files = (
        ranked(source, pattern) for pattern in (_MODEL_FILES, _OPTIMIZER_FILES)
    )
    models = [_load(file) for file in model_files]
    if not models:
        raise _without_shapes(source)
    module = {
        name: value
        for name, value in (models[0].get("module") or {}).items()
        if isinstance(value, Tensor)
    }
    facts: dict[str, Any] = {"step": models[0].get("global_steps")}
    shared: Mapping[str, str] = models[0].get("shared_params") or {}
    if not optimizer_files:
        facts |= {"weights": "the model's own: there is no optimizer beside it"}
        return Table(of_module(model_files[0], module), facts)
    optimizers = [_optimizer(file) for file in optimizer_files]
    # DeepSpeed's optimizer for bfloat16 with float32 gradients does not say that it is stage 1.
    stage = int(optimizers[0].get("zero_stage", 1))
    _check_count(source, optimizers[0], len(optimizers))
    facts |= {"stage": stage, "ranks": len(optimizers)}
    if "param_shapes" not in models[0]:
        raise _without_shapes(source)
    if stage == 3 and len(models) != len(optimizers):
        raise _missing(source, f"{len(models)} files {_MODEL_FILES}", len(optimizers))
    if stage < 3 and not masters:
        return Table(of_module(model_files[0], module), {**facts, "weights": "the 16-bit model"})
    shapes: Sequence[Mapping[str, Sequence[int]]] = models[0]["param_shapes"]
    ranks = [
        _flat_groups(file, state, _FLAT.get(stage, _FLAT_BELOW_3))
        for file, state in zip(optimizer_files, optimizers, strict=True)
    ]
    if stage == 3:
        found = _of_stage_3({name: s for group in shapes for name, s in group.items()}, ranks)
    else:
        found = _of_stage_2(shapes, ranks, optimizers[0].get("param_alignment_paddings"))
    found |= frozen(models, model_files, stage)
    # Buffers, and whatever else lies there: at stage 3 what is empty is a parameter.
    known = found.keys() | shared.keys()
    rest = {n: t for n, t in module.items() if n not in known and t.numel()}
    found |= of_module(model_files[0], rest)
    found = {name: check_covered(name, tensor, source) for name, tensor in found.items()}
    # A tied head is written once; a state_dict has it under both names.
    found |= {name: found[owner] for name, owner in shared.items() if owner in found}
    codes = {name: code_of(t.dtype, name, source) for name, t in module.items() if name in found}
    return Table(found, {**facts, "weights": "float32 masters"}, codes)


def _load(file: Path) -> Mapping[str, Any]:
    content = pickles.load(file)
    if not isinstance(content, dict):
        raise _no_shard(file, type(content).__name__)
    return content


def _optimizer(file: Path) -> Mapping[str, Any]:
    state = _load(file).get("optimizer_state_dict")
    if not isinstance(state, dict) or not {"zero_stage", _FLAT_BELOW_3} & state.keys():
        raise _no_shard(file, "no optimizer_state_dict with a zero_stage")
    return state


def _no_shard(file: Path, got: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a file is no ZeRO shard", where=file, got=got, expected="a file that DeepSpeed has saved"
    )


def _without_shapes(source: Path) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a ZeRO checkpoint has no shapes of its parameters",
        where=source,
        expected=f"param_shapes in a file {_MODEL_FILES}",
        hint="wait until the checkpoint is complete, or take another one",
    )


def _missing(source: Path, got: str, count: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "ZeRO shards are missing",
        where=source,
        got=got,
        expected=f"{count}, one of each rank",
        hint="wait until the checkpoint is complete, or take another one",
    )


def _check_count(source: Path, state: Mapping[str, Any], found: int) -> None:
    count = state["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != found:
        raise _missing(source, f"{found} files {_OPTIMIZER_FILES}", count)


def _check_parallelism(source: Path) -> None:
    """Refuse shards of tensors or of layers, which take more than the files to put together."""
    for pattern, what in (
        ("*mp_rank_01*", "tensor parallelism"),
        ("layer_*-model_*states.pt", "pipeline parallelism"),
        ("*expp_rank_*", "expert parallelism"),
    ):
        file = next(iter(sorted(source.glob(pattern))), None)
        if file is not None:
            raise NotACheckpointError(
                f"the ZeRO shards are of a model with {what}",
                where=file,
                expected="shards of data parallelism alone: one mp_rank_00",
                hint="export it to safetensors with the trainer's own tool",
            )


def ranked(source: Path, pattern: str) -> list[Path]:
    """Files in the order of the ranks in their names."""

    def numbers(file: Path) -> list[int]:
        digits = "".join(c if c.isdigit() else " " for c in file.name)
        return [int(part) for part in digits.split()]

    return sorted(source.glob(pattern), key=numbers)


def of_module(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors that lie whole in a file of the model.

    Raises:
        CorruptCheckpointError: They are empty, as those of stage 3 are.
    """
    found = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise CorruptCheckpointError(
                f"the ZeRO shards do not hold {name}",
                where=file,
                got="an empty tensor",
                expected=f"the model, or files {_OPTIMIZER_FILES} beside it",
                hint="wait until the checkpoint is complete, or take another one",
            )
        shape = tuple(tensor.shape)
        box = Box(file, ("module", name), (0,) * len(shape), shape)
        found[name] = StoredTensor(shape, code_of(tensor.dtype, name, file), (box,))
    return found


def frozen(
    models: Sequence[Mapping[str, Any]], files: Sequence[Path], stage: int
) -> dict[str, StoredTensor]:
    """Parameters that were not trained, which the optimizer does not have."""
    found = {}
    shapes: Mapping[str, Sequence[int]] = models[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        key, left, pieces = ("frozen_param_fragments", name), math.prod(shape), []
        for model, file in zip(models, files, strict=True):
            part = model["frozen_param_fragments"][name]
            if left:
                pieces.append(Run(file, key, 0, min(left, part.numel())))
                left -= pieces[-1].end
            if stage < 3:
                break
        code = code_of(models[0]["frozen_param_fragments"][name].dtype, name, files[0])
        found[name] = StoredTensor(tuple(shape), code, tuple(pieces))
    return found


def _flat_groups(file: Path, state: Mapping[str, Any], name: str) -> list[_Flat]:
    """Flat tensors of a rank, one for each group."""
    value = state.get(name)
    key: Key = ("optimizer_state_dict", name)
    if isinstance(value, Tensor):
        return [(file, key, value.numel(), code_of(value.dtype, name, file))]
    if not isinstance(value, list) or not all(isinstance(flat, Tensor) for flat in value):
        raise _no_shard(file, f"no tensors {name}")
    return [
        (file, (*key, index), flat.numel(), code_of(flat.dtype, name, file))
        for index, flat in enumerate(value)
    ]


def _of_stage_3(
    shapes: Mapping[str, Sequence[int]], ranks: Sequence[Sequence[_Flat]]
) -> dict[str, StoredTensor]:
    """Each parameter is cut into one equal piece for each rank, filled up at the end."""
    found = {}
    # A rank's groups follow each other, and a piece may go over the end of one.
    ends = [0]
    for _, _, size, _ in ranks[0]:
        ends.append(ends[-1] + size)
    offset = 0
    for name, shape in shapes.items():
        left = math.prod(shape)
        size = math.ceil(left / len(ranks))
        pieces = []
        for groups in ranks:
            for (file, key, _, _), first, last in zip(groups, ends, ends[1:], strict=False):
                begin, end = max(offset, first), min(offset + size, last)
                end = min(end, begin + left)
                if begin < end:
                    pieces.append(Run(file, key, begin - first, end - first))
                    left -= end - begin
        found[name] = StoredTensor(tuple(shape), ranks[0][0][3], tuple(pieces))
        offset += size
    return found


def _of_stage_2(
    shapes: Sequence[Mapping[str, Sequence[int]]],
    ranks: Sequence[Sequence[_Flat]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, StoredTensor]:
    """Each group's parameters lie one after another in a flat tensor, which the ranks share."""
    found = {}
    for number, group in enumerate(shapes):
        parts = [rank[number] for rank in ranks]
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            size, pieces, first = math.prod(shape), [], 0
            for file, key, length, _ in parts:
                last = first + length
                begin, end = max(offset, first), min(offset + size, last)
                if begin < end:
                    pieces.append(Run(file, key, begin - first, end - first))
                first = last
            found[name] = StoredTensor(tuple(shape), parts[0][3], tuple(pieces))
            offset += size + (paddings[number][index] if paddings else 0)
    return found


FORMAT = ShardFormat(
    ZeroCheckpoint,
    mark="*_states.pt",
    find=find,
    read=read_table,
    absent="the directory holds no ZeRO shards",
    expected=f"{_OPTIMIZER_FILES}, or a file `latest` beside directories with them",
    # OpenRLHF has the export, with its configuration, beside the shards or beside `_actor`.
    beside=lambda path, found: [
        path,
        found,
        found.parent,
        *(above / f"{found.name}_hf" for above in found.parents[:2]),
    ],
    hint="of several global_step directories, name one",
    unwritten=_unwritten,
)

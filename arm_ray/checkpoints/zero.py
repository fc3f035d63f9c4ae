"""DeepSpeed ZeRO checkpoints: float32 weights that lie in pieces over the files of all ranks.

::

    checkpoint-N/latest                                     names the directory below
    checkpoint-N/global_stepN/*_model_states.pt             names and shapes of the parameters
    checkpoint-N/global_stepN/*_optim_states.pt             each rank's part of the float32 weights

The files are pickles. They are read by torch's restricted unpickler, which makes tensors and plain
containers; the few DeepSpeed objects beside them are taken for stand-ins that do nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import write_json, write_weight_file
from arm_ray.errors import (
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    PickleRefusedError,
)

_OPTIMIZER_FILES = "*_optim_states.pt"
_MODEL_FILES = "*_model_states.pt"
# Source of a consolidated checkpoint; written last.
RECORD = "zero_source.json"
_MAX_FILE_BYTES = 5 * 10**9


class _StandIn:
    """Takes the place of a DeepSpeed object whose content is not needed."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _Stage(int):
    """Takes the place of DeepSpeed's enumeration of ZeRO stages."""


# Class in the file -> what is made instead. Everything else but tensors and containers is refused.
_STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _StandIn,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _StandIn,
    "deepspeed.utils.tensor_fragment.fragment_address": _StandIn,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
}


@dataclass(frozen=True)
class _Parameter:
    """Where a parameter lies: for each piece the rank's flat tensor, first and last element."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Tensor, int, int], ...]

    def gathered(self) -> Tensor:
        parts = [flat[begin:end] for flat, begin, end in self.pieces]
        return torch.cat(parts)[: math.prod(self.shape)].reshape(self.shape)


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a directory's weights are ZeRO shards alone, without an export to safetensors."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return False
    return _shard_directory(path) is not None


def consolidate(path: Path, output: Path, base: Path) -> Path:
    """Write a ZeRO checkpoint's float32 weights as a model that everything here can read.

    One parameter is in memory at a time. A result that is there is used again, also when the shards
    are gone by now; a changed source is an error.

    Args:
        path: Directory with ZeRO shards of stage 1, 2 or 3.
        output: The directory to make; appears as a whole.
        base: Directory whose configuration and tokenizer are taken where the checkpoint has none.

    Returns:
        `output`.

    Raises:
        NotACheckpointError: There are no shards.
        CorruptCheckpointError: Files are missing, or do not fit each other.
        PickleRefusedError: A file holds other objects than ZeRO checkpoints do.
        MismatchError: `output` was made from other shards.
    """
    source = _shard_directory(path)
    record = output / RECORD
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if source is not None and known["digest"] != _digest(source):
            raise MismatchError(
                "the ZeRO shards are others than those that the run began with",
                where=path,
                got="other files, sizes or times",
                expected=f"what {output} was made from",
                hint="use another output directory, or the checkpoint as it was",
            )
        return output
    if source is None:
        raise NotACheckpointError(
            "the directory holds no ZeRO shards", where=path, expected=_OPTIMIZER_FILES
        )
    digest = _digest(source)
    with _restricted():
        parameters = _parameters(source)
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(parameters, partial)
    described = path if (path / "config.json").is_file() else base
    content = json.loads((described / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in content else "torch_dtype"
    states.write_companions(partial, {**content, key: "float32"}, described)
    if not states.has_tokenizer(partial):
        states.copy_companions(partial, base)
    write_json(partial / RECORD, {"source": str(path), "digest": digest})
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return output


def _shard_directory(path: Path) -> Path | None:
    """Where the shards are: in the path, in what `latest` names, or in the only one below."""
    if any(path.glob(_OPTIMIZER_FILES)):
        return path
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = path / (path / "latest").read_text(encoding="utf-8").strip()
        if named.parent == path and any(named.glob(_OPTIMIZER_FILES)):
            return named
    found = [p for p in sorted(path.glob("global_step*")) if any(p.glob(_OPTIMIZER_FILES))]
    return found[0] if len(found) == 1 else None


def _digest(source: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(source.glob("*.pt")):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _restricted() -> Iterator[None]:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    with torch.serialization.safe_globals(allowed):
        yield


def _load(file: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise PickleRefusedError(
            "a ZeRO shard holds objects that are not read",
            where=file,
            got=" ".join(str(error).split())[:400],
            expected="tensors, and what DeepSpeed itself puts beside them",
            hint="pickles may run code; convert it where you trust it, with DeepSpeed's "
            "zero_to_fp32.py --safe_serialization",
        ) from None
    except Exception as error:  # zip, storage and format errors of many types
        raise CorruptCheckpointError(
            "a ZeRO shard cannot be read", where=file, got=f"{type(error).__name__}: {error}"
        ) from None
    if not isinstance(content, dict):
        raise _no_shard(file, type(content).__name__)
    return content


def _no_shard(file: Path, got: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a file is no ZeRO shard", where=file, got=got, expected="a file that DeepSpeed has saved"
    )


def _ranked(source: Path, pattern: str) -> list[Path]:
    """Files in the order of the ranks in their names."""

    def numbers(file: Path) -> list[int]:
        digits = "".join(c if c.isdigit() else " " for c in file.name)
        return [int(part) for part in digits.split()]

    return sorted(source.glob(pattern), key=numbers)


def _parameters(source: Path) -> dict[str, _Parameter]:
    optimizers = []
    for file in _ranked(source, _OPTIMIZER_FILES):
        state = _load(file).get("optimizer_state_dict")
        if not isinstance(state, dict) or "zero_stage" not in state:
            raise _no_shard(file, "no optimizer_state_dict with a zero_stage")
        optimizers.append(state)
    count = optimizers[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(optimizers):
        raise CorruptCheckpointError(
            "ZeRO shards are missing",
            where=source,
            got=f"{len(optimizers)} files {_OPTIMIZER_FILES}",
            expected=f"{count}, one of each rank",
            hint="wait until the checkpoint is complete, or take another one",
        )
    models = [_load(file) for file in _ranked(source, _MODEL_FILES)]
    if not models or "param_shapes" not in models[0]:
        raise CorruptCheckpointError(
            "a ZeRO checkpoint has no shapes of its parameters",
            where=source,
            expected=f"param_shapes in a file {_MODEL_FILES}",
        )
    shapes: Sequence[Mapping[str, Sequence[int]]] = models[0]["param_shapes"]
    stage = int(optimizers[0]["zero_stage"])
    if stage == 3:
        ranks = [_flat_groups(state["fp32_flat_groups"]) for state in optimizers]
        found = _of_stage_3({name: s for group in shapes for name, s in group.items()}, ranks)
    else:
        ranks = [_flat_groups(state["single_partition_of_fp32_groups"]) for state in optimizers]
        found = _of_stage_2(shapes, ranks)
    frozen: Mapping[str, Sequence[int]] = models[0].get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        fragments = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
        pieces = [(part, 0, part.numel()) for part in (fragments if stage == 3 else fragments[:1])]
        found[name] = _checked(name, shape, pieces)
    adapters = [name for name in found if ".lora_" in name or name.startswith("base_model.")]
    if adapters:
        raise NotACheckpointError(
            "the ZeRO shards are of a model with adapters",
            where=source,
            got=adapters[0],
            expected="the parameters of a whole model",
            hint="name the adapter that the trainer has saved (adapter_model.safetensors)",
        )
    return found


def _flat_groups(value: Any) -> list[Tensor]:
    """Flat tensors of a rank, one for each group."""
    return [value.reshape(-1)] if isinstance(value, Tensor) else [t.reshape(-1) for t in value]


def _of_stage_3(
    shapes: Mapping[str, Sequence[int]], ranks: Sequence[Sequence[Tensor]]
) -> dict[str, _Parameter]:
    """Each parameter is cut into one equal piece for each rank, filled up at the end."""
    found = {}
    # A rank's groups follow each other, and a piece may go over the end of one.
    ends = [0]
    for flat in ranks[0]:
        ends.append(ends[-1] + flat.numel())
    offset = 0
    for name, shape in shapes.items():
        size = math.ceil(math.prod(shape) / len(ranks))
        pieces = []
        for groups in ranks:
            for flat, first, last in zip(groups, ends, ends[1:], strict=False):
                begin, end = max(offset, first), min(offset + size, last)
                if begin < end:
                    pieces.append((flat, begin - first, end - first))
        found[name] = _checked(name, shape, pieces)
        offset += size
    return found


def _of_stage_2(
    shapes: Sequence[Mapping[str, Sequence[int]]], ranks: Sequence[Sequence[Tensor]]
) -> dict[str, _Parameter]:
    """Each group's parameters lie one after another in a flat tensor, which the ranks share."""
    found = {}
    for number, group in enumerate(shapes):
        parts = [rank[number] for rank in ranks]
        offset = 0
        for name, shape in group.items():
            size, pieces, first = math.prod(shape), [], 0
            for part in parts:
                last = first + part.numel()
                begin, end = max(offset, first), min(offset + size, last)
                if begin < end:
                    pieces.append((part, begin - first, end - first))
                first = last
            found[name] = _checked(name, shape, pieces)
            offset += size
    return found


def _checked(
    name: str, shape: Sequence[int], pieces: Sequence[tuple[Tensor, int, int]]
) -> _Parameter:
    present = sum(end - begin for _, begin, end in pieces)
    if present < math.prod(shape):
        raise CorruptCheckpointError(
            f"the ZeRO shards do not hold all of {name}",
            got=f"{present} numbers",
            expected=f"{math.prod(shape)}, shape {tuple(shape)}",
        )
    return _Parameter(tuple(shape), tuple(pieces))


def _write(parameters: Mapping[str, _Parameter], directory: Path) -> None:
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    dtypes = dict.fromkeys(shapes, torch.float32)
    files = states.plan_export(shapes, dtypes, _MAX_FILE_BYTES)
    for file in files:
        tensors = (parameters[spec.name].gathered().float() for spec in file.specs)
        write_weight_file(directory / file.name, file.specs, tensors)
    states.write_export_index(directory, files)

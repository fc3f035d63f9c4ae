"""The file of a PEFT adapter: its table of tensors, and the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.sharded import code_of
from arm_ray.checkpoints.validation import tail_is_zero
from arm_ray.checkpoints.weight_file import DTYPES, TensorEntry, read_header, read_tensors
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError
from arm_ray.storage.mirror import present

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
# One of the two matrices whose product is added to a weight.
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")


def read_stored(path: Path) -> dict[str, TensorEntry]:
    """The table of the adapter's tensors.

    Raises:
        CheckpointError: There are no weights, or they are damaged.
    """
    file = path / WEIGHTS_NAME
    if file.exists():
        stored = read_header(file)
        for entry in stored.values():
            if entry.code not in DTYPES:
                raise NotACheckpointError(
                    f"the tensor {entry.name} is stored in a number format that is not merged",
                    where=file,
                    got=entry.code,
                    expected=", ".join(DTYPES),
                )
        return stored
    if (path / _PICKLE_NAME).exists():
        return _read_pickle(path / _PICKLE_NAME)
    raise CorruptCheckpointError(
        "an adapter has no weights",
        where=path,
        expected=WEIGHTS_NAME,
        hint="copy the adapter again; if a run is still writing it, wait",
    )


def _read_pickle(file: Path) -> dict[str, TensorEntry]:
    """The table of an adapter that torch has saved; nothing in it lies at the bytes it says."""
    content = pickles.load(file)
    if not isinstance(content, dict):
        raise CorruptCheckpointError(
            "a file holds no adapter",
            where=file,
            got=type(content).__name__,
            expected="a state_dict",
        )
    for name in content:
        if not isinstance(name, str):
            raise CorruptCheckpointError(
                "a tensor of an adapter has no name", where=file, got=repr(name), expected="text"
            )
    return {
        name: TensorEntry(
            name, code_of(tensor.dtype, name, file), tuple(tensor.shape), file, 0, tensor.nbytes
        )
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }


def weights_file(path: Path) -> Path:
    """The file of an adapter's directory."""
    file = path / WEIGHTS_NAME
    return file if file.exists() else path / _PICKLE_NAME


def read_own(stored: Mapping[str, TensorEntry], names: list[str]) -> dict[str, Tensor]:
    """Read some tensors of the adapter's file."""
    if not names:
        return {}
    file = stored[names[0]].file
    # An adapter of a URL is copied to each node that reads it.
    file = present(file.parent) / file.name
    if file.name != _PICKLE_NAME:
        return read_tensors(file, names)
    content = pickles.load_kept(file)
    return {name: content[name] for name in names}


def check_written(path: Path, stored: Mapping[str, TensorEntry]) -> None:
    """Refuse a file that ends in zeros where tensors of the same kind before it do not."""
    if any(entry.file.name == _PICKLE_NAME for entry in stored.values()):
        return  # torch's files end in their table
    last = max(stored.values(), key=lambda entry: entry.end, default=None)
    factor = FACTOR.fullmatch(last.name) if last else None
    if last is None or factor is None or not tail_is_zero(last):
        return
    for entry in stored.values():
        other = FACTOR.fullmatch(entry.name)
        if other and other[3] == factor[3] and not tail_is_zero(entry):
            raise CorruptCheckpointError(
                "an adapter's file ends in zeros: it was probably still being written",
                where=path / WEIGHTS_NAME,
                got=f"zeros at the end of {last.name}",
                expected=f"numbers, as in {entry.name}",
                hint="wait for the run to finish the checkpoint, or copy it again",
            )

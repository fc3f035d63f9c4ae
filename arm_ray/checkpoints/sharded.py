"""Checkpoints whose tensors lie in pieces over a trainer's files, read tensor by tensor.

A format's own module finds out where the pieces are. Here they are put together, when a tensor is
read, and only those of that tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.huggingface import Checkpoint, read_json
from arm_ray.checkpoints.naming import model_names
from arm_ray.checkpoints.validation import check_no_adapter
from arm_ray.checkpoints.weight_file import DTYPES, STORED_DTYPES, TensorEntry
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError

CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}
_BY_CONFIG = {"bfloat16": "BF16", "float16": "F16"}
# What finds a stored tensor in the content of its file; each format has its own.
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Run:
    """Consecutive numbers of a flat stored tensor; those of a tensor's runs follow each other."""

    file: Path
    key: Key
    begin: int
    end: int


@dataclass(frozen=True)
class Box:
    """A stored tensor that is a part of another one: where it begins there, and its shape."""

    file: Path
    key: Key
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a tensor of the model is of a stored one: some of its rows, perhaps in another order.

    The rows are counted by several numbers, `split`, as the digits of a number are. Of one of them
    a range is taken, and two of them may be exchanged.

    Attributes:
        layer: Which entry of the stored tensor's first dimension is meant, where trainers store the
            tensors of all layers as one; None: all of it.
        split: How the rows are counted, the slowest first; empty: all rows, as they are.
        axis, begin, end: The range that is taken, of which of these numbers.
        exchanged: Two of these numbers that change places.
    """

    layer: int | None = None
    split: tuple[int, ...] = ()
    axis: int = 0
    begin: int = 0
    end: int = 0
    exchanged: tuple[int, int] | None = None

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a stored tensor."""
        whole = tuple(stored if self.layer is None else stored[1:])
        if not self.split:
            return whole
        counts = [*self.split[: self.axis], self.end - self.begin, *self.split[self.axis + 1 :]]
        return (math.prod(counts), *whole[1:])

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a stored tensor, or of the layer that is meant; shares no memory with it."""
        if not self.split:
            return tensor
        rows = tensor.reshape((*self.split, *tensor.shape[1:]))
        rows = rows.narrow(self.axis, self.begin, self.end - self.begin)
        if self.exchanged is not None:
            rows = rows.transpose(*self.exchanged)
        found = rows.flatten(0, len(self.split) - 1)
        # A view would keep all of the stored tensor in memory.
        shares = found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return found.clone() if shares else found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in pieces, all of them runs or all of them boxes.

    Attributes:
        shape: Of the whole.
        code: The dtype of all pieces, as safetensors spells it.
        pieces: Where they are.
        part: What the tensor is of what the pieces make up; None: all of it.
    """

    shape: tuple[int, ...]
    code: str
    pieces: tuple[Run, ...] | tuple[Box, ...]
    part: Part | None = None

    @property
    def made_shape(self) -> tuple[int, ...]:
        """Shape of what is read."""
        return self.shape if self.part is None else self.part.shape(self.shape)


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A checkpoint in a trainer's own files. Holds no weights.

    In `tensors`, `file` is that of the first piece, and the bytes are counted from 0: nothing is
    stored in that form. A tensor whose dtype there is not the stored one is rounded when it is
    read.

    Attributes:
        stored: Name -> pieces.
        described: The directory whose `config.json` describes the model.
        masters: Whether float32 is read as it is.
        facts: What else is known of the checkpoint, for people: stage, ranks, …
        left: Names of what lies in the files too, and is not the model's.
    """

    stored: Mapping[str, StoredTensor]
    described: Path
    masters: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors into host memory. One in a single piece stays in its file, mapped.

        Raises:
            CorruptCheckpointError: A file is gone, or not what it was.
            PickleRefusedError: A file holds something else by now.
        """
        names = list(names)
        # Queries, keys and values may be parts of one stored tensor, which is read once for them.
        sharing: dict[object, list[str]] = {}
        for name in names:
            part = self.stored[name].part
            key = name if part is None else (self.stored[name].pieces, part.layer)
            sharing.setdefault(key, []).append(name)
        found: dict[str, Tensor] = {}
        for members in sharing.values():
            whole = self._whole(members[0])
            for name in members:
                part = self.stored[name].part
                found[name] = whole if part is None else part.of(whole)
        return {name: found[name] for name in names}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of what lies in the files too, and is not the model's."""
        return self.left

    def under(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names for some of its tensors: new -> present."""
        stored = {n: each for n, each in self.stored.items() if n not in names.values()}
        stored |= {name: self.stored[old] for name, old in names.items()}
        renamed = super().under(names)
        assert isinstance(renamed, ShardedCheckpoint)
        return replace(renamed, stored=stored)

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that the pieces of some tensors lie in."""
        return {piece.file for name in names for piece in self.stored[name].pieces}

    def _whole(self, name: str) -> Tensor:
        """What a tensor is a part of: the stored tensor, or its layer."""
        stored, wanted = self.stored[name], STORED_DTYPES[self.tensors[name].code]
        if stored.part is not None and stored.part.layer is not None:
            return self._layer(name, stored.part.layer).to(wanted)
        if len(stored.pieces) == 1:
            [only] = stored.pieces
            return self._part(name, only).reshape(stored.shape).to(wanted)
        whole = torch.empty(stored.shape, dtype=wanted)
        flat, position = whole.view(-1), 0
        for piece in stored.pieces:
            part = self._part(name, piece)
            if isinstance(piece, Run):
                flat[position : position + len(part)] = part
                position += len(part)
            else:
                at = [slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True)]
                whole[tuple(at)] = part
        return whole

    def _layer(self, name: str, layer: int) -> Tensor:
        """One entry of a stored tensor's first dimension; only pieces that lie in it are read."""
        stored = self.stored[name]
        whole = torch.empty(stored.shape[1:], dtype=STORED_DTYPES[stored.code])
        for piece in stored.pieces:
            assert isinstance(piece, Box), "only boxes are of several layers"
            index = layer - piece.offsets[0]
            if 0 <= index < piece.sizes[0]:
                ends = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
                whole[tuple(slice(o, o + s) for o, s in ends)] = self._part(name, piece)[index]
        return whole

    def _part(self, name: str, piece: Run | Box) -> Tensor:
        try:
            found = self.load(piece.file, piece.key)
        except OSError as error:
            raise CorruptCheckpointError(
                f"a file of a checkpoint cannot be read, for {name}",
                where=piece.file,
                got=error,
                hint="a trainer may have removed it: copy checkpoints that are to be merged",
            ) from None
        stored = self.stored[name]
        if isinstance(found, Tensor) and found.dtype == STORED_DTYPES[stored.code]:
            found = found.detach()  # some are saved as parameters
            if isinstance(piece, Run):
                part = found.reshape(-1)[piece.begin : piece.end]
                if len(part) == piece.end - piece.begin:
                    return part
            elif found.numel() == math.prod(piece.sizes):
                return found.reshape(piece.sizes)
        raise CorruptCheckpointError(
            f"a file does not hold the piece of {name} that it did",
            where=piece.file,
            got=f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found),
            expected=f"{STORED_DTYPES[stored.code]}, {piece}",
            hint="the checkpoint was written again meanwhile: run it anew",
        )

    def load(self, file: Path, key: Key) -> Any:
        """The stored tensor that a key names; by default, step by step in a pickle's content."""
        try:
            content = pickles.load_kept(file)
            for step in key:
                content = content[step]
        except (KeyError, IndexError, TypeError):
            return None
        return content

    @property
    def is_laid_out(self) -> bool:
        """Nothing is stored as `tensors` says."""
        return False

    @property
    def config_directory(self) -> Path:
        """The checkpoint's, one beside it, or the base's."""
        return self.described

    @property
    def fingerprint(self) -> str:
        """A digest of configuration, table of pieces, file sizes and times: cheap, no data."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        files = {piece.file for tensor in self.stored.values() for piece in tensor.pieces}
        for file in sorted(files):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        for name, tensor in sorted(self.stored.items()):
            digest.update(f"{name}\0{self.tensors[name].code}\0{tensor.shape}\0".encode())
            if tensor.part is not None:
                digest.update(f"{tensor.part}\0".encode())
            for piece in tensor.pieces:
                at = (piece.begin, piece.end) if isinstance(piece, Run) else piece.offsets
                digest.update(f"{piece.file.name}\0{piece.key}\0{at}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Table:
    """What a format's module found in a trainer's files.

    Attributes:
        stored: Name in the files -> pieces.
        facts: For people.
        codes: Name in the files -> dtype of the model itself, where the files say it.
        left: Names of entries that are no tensors.
        holds_others: Whether tensors that are not the model's may be among them.
    """

    stored: Mapping[str, StoredTensor]
    facts: Mapping[str, Any]
    codes: Mapping[str, str] = field(default_factory=dict)
    holds_others: bool = False
    left: tuple[str, ...] = ()


# Table with a trainer's own names, content of `config.json`, path for messages -> table with
# Hugging Face's names.
Rename = Callable[[Table, Mapping[str, Any], Path], Table]


def assemble(
    kind: type[ShardedCheckpoint],
    path: Path,
    table: Table,
    base: Checkpoint | None,
    masters: bool,
    beside: Sequence[Path],
    rename: Rename | None = None,
) -> ShardedCheckpoint:
    """Make a checkpoint of what was found.

    Args:
        kind: The format's class.
        path: The directory that the user named.
        table: What its files hold.
        base: Whose configuration is taken where there is none of its own.
        masters: Whether float32 stays; else it is rounded to the model's dtype, which is what the
            files say, or the configuration.
        beside: Directories that the configuration may be in.
        rename: For trainers with names of their own; without any configuration, as when a
            checkpoint is only described, they stay.

    Raises:
        NotACheckpointError: There is no configuration, or there are adapters.
        MismatchError: It is not clear which tensors are the model's, or how.
        CorruptCheckpointError: The configuration is malformed.
    """
    check_no_adapter(table.stored, path)
    found = next((d for d in beside if (d / "config.json").is_file()), None)
    if found is not None:
        config: Mapping[str, Any] = read_json(found / "config.json")
    elif base is not None:
        config, found = base.config, base.config_directory
    else:
        raise NotACheckpointError(
            "the checkpoint has no configuration, and there is no base to take it from",
            where=path,
            expected=f"config.json in {' or '.join(map(str, dict.fromkeys(beside)))}",
            hint="copy config.json and the tokenizer of the model that the training began with "
            "into it",
        )
    if rename is not None and config:
        table = rename(table, config, path)
        named = {name: name for name in table.stored}
    else:
        named = model_names(table.stored, path, others=table.holds_others)
    usual = _BY_CONFIG.get(str(config.get("dtype") or config.get("torch_dtype")))
    stored, tensors = {}, {}
    for old, name in named.items():
        tensor = table.stored[old]
        code = tensor.code
        file = tensor.pieces[0].file if tensor.pieces else path
        if code not in STORED_DTYPES:
            raise _not_merged(name, file, code)
        if not masters and code == "F32":
            code = table.codes.get(old) or usual or code
        shape = tensor.made_shape
        size = math.prod(shape) * STORED_DTYPES[code].itemsize
        stored[name] = tensor
        tensors[name] = TensorEntry(name, code, shape, file, 0, size)
    left = (*table.left, *sorted(table.stored.keys() - named.keys()))
    return kind(path, config, tensors, stored, found, masters, table.facts, left)


def code_of(dtype: torch.dtype, name: str, file: Path) -> str:
    """A dtype as safetensors spells it.

    Raises:
        NotACheckpointError: It is none that is merged.
    """
    if dtype not in CODES:
        raise _not_merged(name, file, str(dtype))
    return CODES[dtype]


def _not_merged(name: str, file: Path, dtype: str) -> NotACheckpointError:
    return NotACheckpointError(
        f"the tensor {name} is stored in a number format that is not merged",
        where=file,
        got=dtype.removeprefix("torch."),
        expected=", ".join(DTYPES),
    )


def check_covered(name: str, tensor: StoredTensor, where: Path) -> StoredTensor:
    """The tensor, if its pieces are all there.

    Raises:
        CorruptCheckpointError: Some are not.
    """
    present = sum(
        piece.end - piece.begin if isinstance(piece, Run) else math.prod(piece.sizes)
        for piece in tensor.pieces
    )
    if present != math.prod(tensor.shape):
        raise CorruptCheckpointError(
            f"the shards do not hold all of {name}",
            where=where,
            got=f"{present} numbers",
            expected=f"{math.prod(tensor.shape)}, shape {list(tensor.shape)}",
            hint="wait until the checkpoint is complete, or take another one",
        )
    return tensor

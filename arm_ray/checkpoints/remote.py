"""Checkpoints whose weight files are not on this node's disks, and copies of a part of them.

A remote checkpoint is opened by its configuration and the headers of its weight files; tensors are
fetched by their range of bytes. A layer shard fetches its own tensors once, layer group by layer
group, into a file on its node's disk, and maps them from there as it maps any checkpoint's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import (
    Checkpoint,
    read_entries,
    read_json,
)
from arm_ray.checkpoints.weight_file import (
    DTYPES,
    STORED_DTYPES,
    TensorEntry,
    TensorSpec,
    parse_header,
    read_tensors,
    write_weight_file,
)
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError
from arm_ray.storage.store import StoredFile


class RangeReader(Protocol):
    """Gives bytes of a directory's files. It is pickled to the layer shards; threads share it."""

    def read(self, name: str, begin: int, end: int) -> bytes | bytearray:
        """Bytes of a file, from one position to before another."""

    def __str__(self) -> str:
        """What the directory is called in errors."""


class RemoteDirectory(RangeReader, Protocol):
    """A directory elsewhere."""

    def files(self) -> Mapping[str, StoredFile]:
        """Its files by their names; those of directories in it are left out."""


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint in a remote directory. Holds no weights.

    `path` is a local directory with its configuration and tokenizer, and without weights.

    Attributes:
        directory: Where it is.
        digest: Of where it is, and of names, sizes and versions of its weight files.
    """

    directory: RangeReader
    digest: str

    @property
    def is_local(self) -> bool:
        """Whether the weight files can be opened here."""
        return False

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Fetch some tensors into host memory.

        Raises:
            CorruptCheckpointError: The file is shorter than it was.
        """
        return {name: self._fetch(self.tensors[name]) for name in names}

    def _fetch(self, entry: TensorEntry) -> Tensor:
        data = self.directory.read(entry.file.name, entry.begin, entry.end)
        if len(data) != entry.num_bytes:
            raise CorruptCheckpointError(
                f"a weight file ended before {entry.name}",
                where=f"{self.directory}/{entry.file.name}",
                got=f"{len(data)} bytes",
                expected=f"{entry.num_bytes} bytes",
                hint="the file was replaced meanwhile; run again",
            )
        if not data:
            return torch.empty(entry.shape, dtype=STORED_DTYPES[entry.code])
        writable = data if isinstance(data, bytearray) else bytearray(data)
        return torch.frombuffer(writable, dtype=STORED_DTYPES[entry.code]).reshape(entry.shape)

    @property
    def fingerprint(self) -> str:
        """A digest of configuration, tables of tensors, file sizes and versions."""
        return self.digest


def open_remote(directory: RemoteDirectory, local: Path) -> RemoteCheckpoint:
    """Read a remote checkpoint's configuration and headers.

    Args:
        directory: Where it is.
        local: Local directory with copies of its configuration, index and tokenizer.

    Raises:
        CheckpointError: Any of its kinds, as `open_checkpoint`.
    """
    files = directory.files()
    if "config.json" not in files:
        names = sorted(files)
        raise NotACheckpointError(
            "there is no model",
            where=directory,
            got=", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing",
            expected="config.json and .safetensors files",
            hint="name the checkpoint's directory itself; other formats are read from disks only",
        )

    def header(name: str) -> dict[str, TensorEntry]:
        return parse_header(
            Path(f"{directory}/{name}"),
            files[name].num_bytes,
            lambda begin, end: bytes(directory.read(name, begin, end)),
        )

    entries = read_entries(local, files.keys(), header)
    used = {entry.file.name for entry in entries.values()}
    digest = hashlib.sha256((local / "config.json").read_bytes())
    # Checkpoints of one run are alike but for their numbers, and stores tell times to the second.
    digest.update(f"{directory}\0".encode())
    for name in sorted(used):
        digest.update(f"{name}\0{files[name].num_bytes}\0{files[name].version}\0".encode())
    return RemoteCheckpoint(
        local, read_json(local / "config.json"), entries, directory, digest.hexdigest()
    )


@dataclass(frozen=True)
class LocalCopy(Checkpoint):
    """A checkpoint of which a shard's own tensors are copied to its node when they are first read.

    Attributes:
        source: Where they are fetched from.
        copies: Directory of the copies, of this checkpoint alone.
        group_tensors: Names of the tensors of each layer group, by its index.
        fetched: Called with the bytes that were fetched.
    """

    source: Checkpoint
    copies: Path
    group_tensors: tuple[tuple[str, ...], ...]
    fetched: Callable[[int], None]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors, mapped from the copies, which are made where they are missing."""
        wanted = set(names)
        found: dict[str, Tensor] = {}
        for index, members in enumerate(self.group_tensors):
            chosen = [name for name in members if name in wanted]
            if chosen:
                found |= self._read_copy(index, chosen)
        return found

    def _read_copy(self, group: int, names: list[str]) -> dict[str, Tensor]:
        file = self._copied(group)
        try:
            return read_tensors(file, names)
        except CorruptCheckpointError:
            if file.exists():
                raise
        # Another merge that used the same copies has just ended.
        return read_tensors(self._copied(group), names)

    def files(self, names: Iterable[str]) -> set[Path]:  # noqa: ARG002 -- those of a checkpoint
        """None that must be there: copies are made where they are missing."""
        return set()

    def _copied(self, group: int) -> Path:
        file = self.copies / f"group-{group:05d}.safetensors"
        if not file.exists():
            self.copies.mkdir(parents=True, exist_ok=True)
            names = self.group_tensors[group]
            entries = {name: self.tensors[name] for name in names}
            specs = [TensorSpec(n, DTYPES[e.code], e.shape) for n, e in entries.items()]
            fetched = (self.source.read([name])[name] for name in names)
            write_weight_file(file, specs, fetched)
            self.fetched(sum(spec.num_bytes for spec in specs))
        return file


def local_copy(
    source: Checkpoint,
    copies: Path,
    group_tensors: tuple[tuple[str, ...], ...],
    fetched: Callable[[int], None],
) -> LocalCopy:
    """A copy of parts of a checkpoint, in a directory of its own below `copies`."""
    own = copies / source.fingerprint[:32]
    return LocalCopy(
        source.path, source.config, source.tensors, source, own, group_tensors, fetched
    )

"""Hugging Face checkpoint directories: safetensors, single or sharded, and hub ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from arm_ray.checkpoints.naming import Format, model_names
from arm_ray.checkpoints.weight_file import DTYPES, TensorEntry, read_header, read_tensors
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError, PickleRefusedError
from arm_ray.storage.mirror import present
from arm_ray.storage.regular import json_in
from arm_ray.storage.urls import is_url, parse_url, plain_path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Code of the model's own is copied along, and run only where it is trusted.
_HUB_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.py",
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its configuration, and where each tensor lies. Holds no weights.

    Attributes:
        path: The directory.
        config: Content of `config.json`.
        tensors: Name -> place in a weight file.
    """

    kind: ClassVar[Format] = "hf"
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors into host memory, in the checkpoint's own dtype."""
        by_file: dict[Path, dict[str, str]] = {}
        for name in names:
            entry = self.tensors[name]
            by_file.setdefault(entry.file, {})[entry.stored or name] = name
        result: dict[str, Tensor] = {}
        for file, members in by_file.items():
            found = read_tensors(file, members)
            result.update({members[stored]: tensor for stored, tensor in found.items()})
        return result

    @property
    def renamed(self) -> str | None:
        """How tensors are called in the files, where that is not their name; with an example."""
        for name, entry in self.tensors.items():
            if entry.stored is not None:
                return (
                    f"its names are read without what a wrapper, or another version of "
                    f"transformers, put into them: {entry.stored} as {name}"
                )
        return None

    def under(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names for some of its tensors: new -> present."""
        tensors = {n: entry for n, entry in self.tensors.items() if n not in names.values()}
        for name, old in names.items():
            entry = self.tensors[old]
            tensors[name] = replace(entry, name=name, stored=entry.stored or old)
        return replace(self, tensors=tensors)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of what lies in the files too, and is not the model's."""
        return ()

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that some tensors are read from."""
        return {self.tensors[name].file for name in names}

    @property
    def is_laid_out(self) -> bool:
        """Whether each tensor lies in its file at the bytes that `tensors` says."""
        return True

    @property
    def is_local(self) -> bool:
        """Whether the weight files can be opened on the node that opened the checkpoint."""
        return True

    @property
    def config_directory(self) -> Path:
        """The directory whose `config.json` describes the model."""
        return self.path

    @property
    def fingerprint(self) -> str:
        """A digest of configuration, tables of tensors, file sizes and times: cheap, no data."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({entry.file for entry in self.tensors.values()}):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        for name, entry in sorted(self.tensors.items()):
            digest.update(f"{name}\0{entry.code}\0{entry.shape}\0{entry.begin}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class BareCheckpoint(Checkpoint):
    """Weight files without a configuration, which another checkpoint's describes.

    Attributes:
        described: The directory whose `config.json` describes the model.
    """

    described: Path

    @property
    def config_directory(self) -> Path:
        """The other's."""
        return self.described


def resolve_path(path_or_id: str) -> Path:
    """Return a local directory for a path or a Hugging Face hub id, downloading the latter.

    Raises:
        NotACheckpointError: Neither a directory nor a model that the hub can give.
        StorageError: It is a local copy that this node lacks, and its URL cannot be read.
    """
    path_or_id = plain_path(path_or_id)
    if is_url(path_or_id):
        raise NotACheckpointError(
            "a URL is not read here",
            where=parse_url(path_or_id),
            expected="a directory, or a model on the hub",
            hint="copy it to a disk that all nodes see; see docs/storage.md",
        )
    try:
        path = present(Path(path_or_id).expanduser())
        if path.exists():
            return path.resolve()
    except (OSError, RuntimeError) as error:  # no such user, too long, or a closed parent
        raise NotACheckpointError(
            "a checkpoint path cannot be read", where=path_or_id, got=error, hint="check the path"
        ) from None
    looks_like_path = path.is_absolute() or path_or_id.startswith((".", "~"))
    if looks_like_path or path_or_id.count("/") > 1:
        raise NotACheckpointError(
            "a checkpoint directory does not exist", where=path_or_id, hint="check the path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # network, authentication and name errors, of many types
        raise NotACheckpointError(
            "not a local directory, and the Hugging Face hub does not give it either",
            where=path_or_id,
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="an existing directory, or the id of a model on the hub",
            hint="check the path; for the hub, the name, the network and your token",
        ) from None


def open_checkpoint(path: Path, base: Checkpoint | None = None) -> Checkpoint:
    """Read the configuration and the headers of a checkpoint directory.

    Args:
        path: The directory.
        base: Whose configuration is taken where weight files have none, as the last step of
            torchtitan.

    Raises:
        NotACheckpointError: It is no directory, cannot be read, or holds no model.
        PickleRefusedError: Its weights are pickles.
        CorruptCheckpointError: A file is missing, truncated or malformed, or the index points
            outside the directory.
    """
    is_bare = (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()
    if base is not None and base.config and is_bare and not (path / "config.json").exists():
        opened = open_tensors(path)
        return BareCheckpoint(path, base.config, opened.tensors, base.config_directory)
    return _open(path, _read_config)


def open_tensors(path: Path) -> Checkpoint:
    """The same for a directory of weight files that is no model and has no configuration.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    return _open(path, lambda _path: {})


def _open(path: Path, read_config: Callable[[Path], dict[str, Any]]) -> Checkpoint:
    if not path.is_dir():
        raise NotACheckpointError(
            "a checkpoint is not a directory",
            where=path,
            got="a file" if path.exists() else "nothing there",
            expected="a directory with .safetensors files",
        )
    try:
        config = read_config(path)
        names = {file.name for file in path.iterdir()}
        entries = read_entries(path, names, lambda name: read_header(path / name))
    except OSError as error:
        raise NotACheckpointError(
            "a checkpoint cannot be read",
            where=path,
            got=error,
            hint="check the file, and its permissions",
        ) from None
    return Checkpoint(path, config, entries)


def check_codes(entries: Iterable[TensorEntry]) -> None:
    """Refuse tensors in a number format that is not merged.

    Raises:
        NotACheckpointError: Names the first.
    """
    for entry in entries:
        if entry.code not in DTYPES:
            raise NotACheckpointError(
                f"the tensor {entry.name} is stored in a number format that is not merged",
                where=entry.file,
                got=entry.code,
                expected=", ".join(DTYPES),
                hint="dequantise the checkpoint to bf16 first",
            )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        names = sorted(p.name for p in path.iterdir())
        raise NotACheckpointError(
            "the directory is not a model directory",
            where=path,
            got=", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "an empty directory",
            expected="config.json and .safetensors files",
            hint="name the checkpoint directory itself, for example …/checkpoint-40",
        )
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptCheckpointError: It is malformed, or holds something else.
        OSError: It cannot be read.
    """
    try:
        content = json_in(file)
    except ValueError as error:
        raise CorruptCheckpointError("a JSON file is malformed", where=file, got=error) from None
    if not isinstance(content, dict):
        raise CorruptCheckpointError(
            "a JSON file does not hold an object",
            where=file,
            got="nothing" if content is None else f"a {type(content).__name__}",
        )
    return content


def read_entries(
    path: Path, names: Collection[str], read_header: Callable[[str], dict[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    """Where each tensor of a model directory lies.

    Args:
        path: The directory, which the index is read from.
        names: The files of the checkpoint; weight files need not be in `path` itself.
        read_header: Name of a weight file -> its tensors.

    Raises:
        CheckpointError: Any of its kinds.
    """
    # Where both are there, transformers takes the single file, and so do we.
    if SINGLE_NAME in names:
        return _plain(path, read_header(SINGLE_NAME))
    if INDEX_NAME in names:
        return _plain(path, _read_indexed(path, names, read_header))
    stray = sorted(name for name in names if name.endswith(".safetensors"))
    if stray:
        raise CorruptCheckpointError(
            "there are weight files but no index",
            where=path,
            got=", ".join(stray[:4]),
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} beside the files it names",
            hint="the checkpoint may still be being written, or is an adapter",
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise PickleRefusedError(
            "the weights are pickles, which can run code when they are read",
            where=path,
            got=", ".join(pickles[:4]),
            expected=".safetensors files",
            hint="if you trust them, convert: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR) writes safetensors",
        )
    raise NotACheckpointError(
        "the directory holds no weights", where=path, expected=f"{SINGLE_NAME} or {INDEX_NAME}"
    )


def _plain(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The same under the names that transformers gives them; see `model_names`."""
    return {
        name: entries[stored]
        if stored == name
        else replace(entries[stored], name=name, stored=stored)
        for stored, name in model_names(entries, path).items()
    }


def _read_indexed(
    path: Path, names: Collection[str], read_header: Callable[[str], dict[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    index = path / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(
            "the index has no weight_map",
            where=index,
            got=type(weight_map).__name__,
            expected="an object: name of a tensor to name of a file",
            hint="copy or save the checkpoint again",
        )
    entries: dict[str, TensorEntry] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        # A name such as ../x or /x would make us read outside of what the user pointed at.
        if os.path.basename(file_name) != file_name or file_name in ("", ".", ".."):
            raise CorruptCheckpointError(
                "the index names a file outside its directory", where=index, got=file_name
            )
        if file_name not in names:
            raise CorruptCheckpointError(
                "the index names a file that does not exist",
                where=index,
                got=file_name,
                hint="copy the checkpoint again; if a run is still writing it, wait",
            )
        header = read_header(file_name)
        named = [name for name, owner in weight_map.items() if owner == file_name]
        for name in named:
            if name not in header:
                raise CorruptCheckpointError(
                    f"the index says that {name} is in a file that lacks it",
                    where=path / file_name,
                )
            entries[name] = header[name]
    return entries

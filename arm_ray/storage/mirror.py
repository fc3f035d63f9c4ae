"""Local copies of small directories behind URLs: configurations, tokenizers, adapters.

A copy lies at `SCRATCH/urls/SCHEME/BUCKET/KEY/files`, so that its path says where it is from, and
a node that does not have it can make it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from arm_ray.errors import StorageError
from arm_ray.storage.atomic import remove_abandoned
from arm_ray.storage.room import locked
from arm_ray.storage.store import Store, StoredFile, require
from arm_ray.storage.urls import SCHEMES, Url

_ROOT = "urls"
_LEAF = "files"
# Larger files beside the weights are not what describes a model.
_MAX_COMPANION_BYTES = 256 << 20
_COMPANIONS = (".json", ".jinja", ".model", ".txt")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def mirror_path(url: Url, scratch: Path) -> Path:
    """Where the copy of a directory lies."""
    return scratch.absolute() / _ROOT / url.scheme / url.path / _LEAF


def origin(path: Path) -> Url | None:
    """The URL that a path is the local copy of; None where it is no such path."""
    parts = path.parts
    if not parts or parts[-1] != _LEAF:
        return None
    for index in range(len(parts) - 4, 0, -1):
        if parts[index] == _ROOT and parts[index + 1] in SCHEMES:
            return Url(parts[index + 1], "/".join(parts[index + 2 : -1]))
    return None


def is_companion(name: str, file: StoredFile) -> bool:
    """Whether a file describes a model, and does not hold its weights."""
    return name.endswith(_COMPANIONS) and file.num_bytes <= _MAX_COMPANION_BYTES


def mirror(
    store: Store, scratch: Path, wanted: Callable[[str, StoredFile], bool] = is_companion
) -> Path:
    """Copy files of a directory here, those that are not here yet; remove what it has no more.

    Args:
        store: The directory.
        scratch: Directory for local copies.
        wanted: Which of its files.

    Returns:
        The copy's directory.

    Raises:
        StorageError: There is no such directory, or it or the scratch directory cannot be used.
        DiskSpaceError: There is no room.
    """
    files = store.files()
    require(files, store.url)
    target = mirror_path(store.url, scratch)
    chosen = {name: file for name, file in files.items() if wanted(name, file)}
    try:
        with locked(target):
            _update(store, target, chosen)
    except OSError as error:
        raise StorageError(
            "a local copy cannot be written",
            where=target,
            got=error,
            hint="set runtime.scratch to a directory that can be",
        ) from None
    return target


def _update(store: Store, target: Path, chosen: Mapping[str, StoredFile]) -> None:
    remove_abandoned(target)
    for name, file in chosen.items():
        if not _is_current(target / name, file):
            store.download(name, target / name, file)
    for found in target.iterdir():
        if found.is_file() and found.name not in chosen and not found.name.startswith("."):
            found.unlink(missing_ok=True)


def _is_current(local: Path, file: StoredFile) -> bool:
    with contextlib.suppress(OSError):
        status = local.stat()
        return status.st_size == file.num_bytes and status.st_mtime_ns == file.time_ns
    return False


def present(path: str | Path) -> Path:
    """A path; the local copy of a URL is made where this node does not have it.

    Raises:
        StorageError: It cannot be.
    """
    path = Path(path)
    url = origin(path)
    if url is not None and not path.exists():
        scratch = path.parents[len(url.path.split("/")) + 2]
        mirror(Store(url), scratch, with_adapter)
    return path


def with_adapter(name: str, file: StoredFile) -> bool:
    """Of an adapter also its weights, and not those of a model."""
    return is_companion(name, file) or name in ADAPTER_WEIGHTS

"""Files and directories that are there whole, or not at all. Imports nothing heavy.

What has its final name is on disk: contents are synced before names are given, so that neither the
end of the process nor that of the machine leaves something that looks whole and is not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from arm_ray.storage.regular import open_regular

_COPY_BYTES = 1 << 24
# Bytes: less is not worth a request to the disk of its own.
_LEAST_WRITE_BACK = 1 << 17
# Random digits in the name of a file that others may be writing as well.
_OWN = 12
_ABANDONED = re.compile(rf"\.(.+)\.[0-9a-f]{{{_OWN}}}\.partial", re.DOTALL)


@contextlib.contextmanager
def atomic_file(
    path: Path, *, is_read_again: bool = True, may_race: bool = False
) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is whole and on disk.

    Args:
        path: The file.
        is_read_again: Whether it stays in the page cache.
        may_race: Whether another process may be writing the same file: one on a node that was
            given up, say, on storage that all nodes see. What killed ones have left of this
            file is removed.
    """
    if may_race:
        remove_abandoned(path.parent, path.name)
        partial, opened = _open_own(path)
    else:
        partial = path.with_name(f".{path.name}.partial")
        opened = partial.open("wb")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not is_read_again and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            # While it is held, or somebody might take it for abandoned.
            partial.replace(path)
    except BaseException:
        # A disk that takes no writes may let nothing be removed either; that is not what to tell.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def start_write_back(descriptor: int, begin: int, end: int) -> None:
    """Let the disk take bytes that were just written, while others compute.

    Else all of them would wait for the file's `fsync`. They stay in the page cache: the advice
    drops only what is on the disk already. A page that is not whole waits for its other half.

    Args:
        descriptor: Of the open file.
        begin: The first of the bytes.
        end: One past the last.
    """
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last - first >= _LEAST_WRITE_BACK and hasattr(os, "posix_fadvise"):
        # Where there is no such advice, nothing is lost but time.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)


def _open_own(path: Path) -> tuple[Path, IO[bytes]]:
    """Open a file of a name that nobody else has, locked, so that it is not taken for abandoned."""
    while True:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:_OWN]}.partial")
        file = partial.open("wb")
        # Where there are no locks, nobody gets one to remove it either.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return partial, file
        # Before it was locked, it was removed.
        file.close()


def remove_abandoned(directory: Path, name: str | None = None) -> None:
    """Remove what processes that were killed have left of files that may be written at once.

    What a living process is writing, it holds locked. Nothing is an error: what cannot be removed
    takes room, and no more.

    Args:
        directory: Where the files are.
        name: Of the file; None: of all.
    """
    with contextlib.suppress(OSError):
        for partial in list(directory.iterdir()):
            match = _ABANDONED.fullmatch(partial.name)
            if match is None or name not in (None, match[1]) or not partial.is_file():
                continue
            with contextlib.suppress(OSError), open_regular(partial) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str, *, may_race: bool = False) -> None:
    """Write a text in UTF-8, whole or not at all; `may_race` as for `atomic_file`."""
    with atomic_file(path, may_race=may_race) as file:
        file.write(text.encode())


def copy_file(source: Path, target: Path, *, keeps_times: bool = False) -> None:
    """Copy a file, whole or not at all.

    Args:
        source: The file.
        target: Its copy; an older one is replaced.
        keeps_times: Whether the copy has the source's times and permissions, too.

    Raises:
        OSError: The source is no regular file, which may have no end, or something cannot be done.
    """
    with open_regular(source) as reader, atomic_file(target) as writer:
        shutil.copyfileobj(reader, writer, _COPY_BYTES)
        if keeps_times:
            writer.flush()
            shutil.copystat(source, writer.name)


def copy_tree(source: Path, target: Path, copy: Callable[[Path, Path], object] = copy_file) -> None:
    """Copy a directory and all below it, links as what they lead to; ends with the first error.

    `shutil.copytree` goes on to the end, and then says nothing of what kind the errors were.

    Args:
        source: The directory.
        target: Its copy; what is there already stays.
        copy: Copies one file.

    Raises:
        OSError: A link leads back to a directory that it is in, or as by `copy`.
    """
    _copy_tree(source, target, copy, frozenset())


def _copy_tree(
    source: Path, target: Path, copy: Callable[[Path, Path], object], above: frozenset[str]
) -> None:
    # Two links of this kind in a directory would make 2^40 copies before names get too long.
    real = os.path.realpath(source)
    if real in above:
        raise OSError(errno.ELOOP, "it leads back to a directory that it is in", str(source))
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _copy_tree(entry, target / entry.name, copy, above | {real})
        else:
            copy(entry, target / entry.name)


def put_file(partial: Path, target: Path) -> None:
    """Give a file that somebody else has written whole its final name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def put_directory(partial: Path, target: Path) -> None:
    """Give a finished directory, whose files are on disk, its final name."""
    sync_directory(partial)
    partial.rename(target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

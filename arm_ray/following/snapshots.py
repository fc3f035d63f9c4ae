"""Holds a run's checkpoint by links of our own, so that its removal cannot pull it away.

A snapshot is a directory `step-000120/` with the files that a merge needs, hard-linked, or copied
where linking is not possible, and `snapshot.json`, which says what they are. A link takes no room,
but it is the same file: a trainer that writes into the file instead of replacing it writes into the
snapshot. `changed` finds that out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.following.layouts import Found, Identity, RunWatcher
from arm_ray.storage.atomic import put_directory
from arm_ray.storage.regular import json_in, open_regular

RECORD = "snapshot.json"
_PREFIX = "step-"
_CHUNK = 1 << 24
# Of smaller files the content is known as well; of weights, size and time have to do.
_LARGEST_DIGESTED = 1 << 20
# How a file says that it is gone; the last one on network file systems.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is held.

    Attributes:
        step: Of the training.
        path: Ours.
        source: The trainer's, which may be gone.
        version: `Found.version`.
        linked: Whether all files are links.
        num_bytes: Size of the files.
        files: Name -> inode (of ours), size and time of the last change when it was taken.
        digests: Name -> SHA-256 of the content, of small files.
    """

    step: int
    path: Path
    source: Path
    version: str
    linked: bool
    num_bytes: int
    files: Mapping[str, Identity]
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def taken_at(self) -> float:
        """When it was taken, in seconds since 1970.

        Raises:
            OSError: It is there no more.
        """
        return (self.path / RECORD).stat().st_mtime


def take(
    found: Found,
    watcher: RunWatcher,
    directory: Path,
    *,
    copy: bool = False,
    bytes_per_s: float | None = None,
    pause: Callable[[], None] = lambda: None,
) -> tuple[Snapshot | None, str]:
    """Take a snapshot of a complete checkpoint.

    Afterwards it looks at the checkpoint again: one that changed or vanished meanwhile is no
    snapshot, and nothing of it stays.

    Args:
        found: The checkpoint.
        watcher: Who found it.
        directory: Where snapshots are.
        copy: Whether to copy instead of linking.
        bytes_per_s: Most that is copied in a second.
        pause: Called before each file; what it raises ends the taking.

    Returns:
        The snapshot and an empty text, or None and why there is none.
    """
    target = directory / _free_name(directory, found)
    partial = directory / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        linked = True
        names = list(found.files)
        for name in names:
            pause()
            new = partial / name
            new.parent.mkdir(parents=True, exist_ok=True)
            is_linked = not copy and _link(found.path / name, new)
            if not is_linked:
                _copy(found.path / name, new, bytes_per_s, pause)
            linked = linked and is_linked
        pause()
        problem = watcher.again(found)
        if problem is not None:
            return None, problem
        files = {name: _identity(partial / name) for name in names}
        size = sum(identity[1] for identity in files.values())
        digests = {n: _digest(partial / n) for n in names if files[n][1] <= _LARGEST_DIGESTED}
        made = Snapshot(found.step, target, found.path, found.version, linked, size, files, digests)
        problem = next((text for name in names if (text := _differs(name, files, found))), None)
        if problem is not None:
            return None, problem
        record = {**asdict(made), "path": target.name, "source": str(found.path)}
        write_json(partial / RECORD, record)
        put_directory(partial, target)
        return made, ""
    except OSError as error:
        if error.errno in _GONE:
            return None, f"{error.filename} vanished"
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def changed(snapshot: Snapshot) -> str | None:
    """What of a snapshot is no longer as it was taken, because the trainer wrote into it."""
    for name, known in snapshot.files.items():
        path = snapshot.path / name
        try:
            now = _identity(path)
        except OSError as error:
            return f"{name}: {error.strerror}"
        # The time may be set back, or be too coarse to tell.
        is_same = now == known and snapshot.digests.get(name) in (None, _digest(path))
        if not is_same:
            return f"the trainer wrote into {name}"
    return None


def snapshots(directory: Path) -> list[Snapshot]:
    """All snapshots in a directory, by step and age; what was cut off is removed."""
    found = []
    for path in sorted(directory.glob(f".{_PREFIX}*.partial")):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        try:
            record = json_in(path / RECORD)
            files = {name: (a, b, c) for name, (a, b, c) in record["files"].items()}
            found.append(
                Snapshot(
                    int(record["step"]),
                    path,
                    Path(record["source"]),
                    str(record["version"]),
                    bool(record["linked"]),
                    int(record["num_bytes"]),
                    files,
                    {str(name): str(text) for name, text in record.get("digests", {}).items()},
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda s: (s.step, _age(s.path)))


def remove(snapshot: Snapshot) -> None:
    """Let go of a snapshot; nobody sees half of it."""
    hidden = snapshot.path.with_name(f".{snapshot.path.name}.partial")
    try:
        snapshot.path.rename(hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _free_name(directory: Path, found: Found) -> str:
    """`step-000120`, or `step-000120.2` for one that was written again."""
    name = f"{_PREFIX}{found.step:06d}"
    number = 1
    while (directory / (name if number == 1 else f"{name}.{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}.{number}"


def _age(path: Path) -> int:
    number = path.name.partition(".")[2]
    return int(number) if number.isdigit() else 1


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _differs(name: str, files: Mapping[str, Identity], found: Found) -> str | None:
    """Whether what we hold is another file than the one that was found."""
    ours, theirs = files[name], found.files[name]
    return None if ours[1] == theirs[1] and ours[2] == theirs[2] else f"{name} changed meanwhile"


def _link(source: Path, target: Path) -> bool:
    """Link a file; False where that cannot be done."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in _GONE:
            raise
        # Another file system, one without links, or a file of somebody else's.
        return False
    return True


def _copy(source: Path, target: Path, bytes_per_s: float | None, pause: Callable[[], None]) -> None:
    started, copied = time.monotonic(), 0
    with open_regular(source) as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            pause()
            writer.write(chunk)
            copied += len(chunk)
            if bytes_per_s is not None:
                ahead = copied / bytes_per_s - (time.monotonic() - started)
                if ahead > 0.0:
                    time.sleep(ahead)
        writer.flush()
        os.fsync(writer.fileno())
    status = source.stat()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

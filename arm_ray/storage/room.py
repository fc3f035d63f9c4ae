"""Room on a disk for what is going to be written, and one process at a time in a directory."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from arm_ray.errors import DiskSpaceError

LOCK_NAME = ".lock"


def check_room(directory: Path, needed: int, what: str, source: object, hint: str) -> None:
    """Refuse to write more than the disk of a directory has room for.

    Args:
        directory: Where it goes.
        needed: Bytes.
        what: What it is, for the error: "a copy".
        source: Where it comes from, for the error.
        hint: What to do besides making room.

    Raises:
        DiskSpaceError: Says how much there is, and how much is needed.
        OSError: The directory is not there, or cannot be looked at.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskSpaceError(
            f"not enough room on the disk for {what}",
            where=f"{source}, to {directory}",
            got=f"{size_text(free)} free",
            expected=size_text(needed),
            hint=f"free some, {hint}",
        )


def size_text(num_bytes: int) -> str:
    """A number of bytes for people, in bytes or 10^9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes} bytes"


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only process on this machine that works in a directory, which is made if it is absent.

    Args:
        directory: The directory.
        wait: Whether to wait for another one.

    Raises:
        BlockingIOError: Another one works in it, and it was not to be waited for.
        OSError: The directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield

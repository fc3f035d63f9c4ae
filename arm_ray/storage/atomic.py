"""Files that are there whole, or not at all. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(
    path: Path, *, is_read_again: bool = True, may_race: bool = False
) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is whole and on disk.

    Args:
        path: The file.
        is_read_again: Whether it stays in the page cache.
        may_race: Whether another process may be writing the same file: one on a node that was
            given up, say, on storage that all nodes see.
    """
    own = f".{uuid.uuid4().hex[:12]}" if may_race else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not is_read_again and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())

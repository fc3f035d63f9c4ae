"""Reading files that a user points at: regular ones, and texts that are not too large.

A pipe or a device has no end, and may never give a byte. A name can be one after it was looked at,
so what was opened is what is checked.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# The largest index or tokenizer that is known has about 50 MB.
LARGEST_TEXT = 1 << 28
# Bytes; file systems take 255, and names get endings.
_LONGEST_NAME = 200
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: It cannot be read, or is no regular file: says what it is.
    """
    # Opening a pipe without this waits until somebody writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for test, name in _KINDS if test(mode)), "something else")
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, f"it is no file, but {kind}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Read a file of UTF-8 text.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
        UnicodeDecodeError: It is no UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(path, most)
    return content.decode("utf-8")


def lines_of(file: IO[bytes], most: int = LARGEST_TEXT) -> Iterator[bytes]:
    """The lines of a file, one in memory at a time, each with its end.

    Args:
        file: The file.
        most: Bytes that a line may have.

    Raises:
        OSError: A line has more, or the file cannot be read.
    """
    while line := file.readline(most + 1):
        if len(line) > most:
            raise OSError(errno.EFBIG, f"a line of more than {most} bytes")
        yield line


def log_lines(path: Path, most: int = LARGEST_TEXT) -> Iterator[bytes]:
    """The lines of a log, one in memory at a time, without their ends and without empty ones.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        left = most
        for line in lines_of(file, most):
            left -= len(line)
            if left < 0:
                raise _too_large(path, most)
            if content := line.strip():
                yield content


def _too_large(path: Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))


def is_plain_name(name: str) -> bool:
    """Whether a name that others gave can be that of a file, and leads nowhere else."""
    if not name or name.startswith(".") or not name.isprintable():
        return False
    return not {"/", "\\"} & set(name) and len(name.encode()) <= _LONGEST_NAME


def parse_json(text: str | bytes) -> Any:
    """What JSON says, of which everything that can be wrong is one kind of error.

    Raises:
        ValueError: It is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_in(path: Path) -> Any:
    """The content of a file of JSON.

    Raises:
        OSError: It cannot be read, is no regular file, or is too large for a text.
        ValueError: It is no JSON.
    """
    return parse_json(read_text(path))

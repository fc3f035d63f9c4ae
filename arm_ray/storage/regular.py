"""Reading files that a user points at: regular ones, and texts that are not too large.

A pipe or a device has no end, and may never give a byte. A name can be one after it was looked at,
so what was opened is what is checked.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# The largest index or tokenizer that is known has about 50 MB. A single character beyond the first
# 65,536 makes Python keep four bytes of each.
LARGEST_TEXT = 1 << 26
# Of logs, and of data that is read line by line.
LARGEST_LOG = 1 << 28
# An empty list takes 28 times the bytes that it has in JSON.
MOST_VALUES = 1 << 22
_AT_ONCE = 1 << 20
_ESCAPED, _REST = re.compile(rb"\\.", re.S), re.compile(rb"\\*[^\\]?")
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


def lines_of(file: IO[bytes], most: int = LARGEST_LOG) -> Iterator[bytes]:
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


def log_lines(path: Path, most: int = LARGEST_LOG) -> Iterator[bytes]:
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


def log_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log of JSON lines; what is none, as a crash leaves it, is left out.

    Raises:
        OSError: As `log_lines`.
    """
    for line in log_lines(path):
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


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
        ValueError: It is no JSON, no UTF-8, nested too deeply, or has more than `MOST_VALUES`
            values and brackets.
    """
    # Each takes a character at least.
    if len(text) > MOST_VALUES:
        check_values(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_values(text: bytes, most: int = MOST_VALUES) -> None:
    """Refuse JSON of which Python would make far more than it has bytes, before anything is made.

    Args:
        text: The JSON.
        most: Commas, colons and brackets outside of strings that it may have.

    Raises:
        ValueError: It has more.
    """
    # Nearly always there are not so many even with those in strings.
    if _marks(text) > most and _marks_outside_strings(text, most) > most:
        raise ValueError(f"it has more than {most} values and brackets")


def _marks_outside_strings(text: bytes, most: int) -> int:
    """Their number, or one that is larger than `most`."""
    total, place, is_in_string = 0, 0, 0
    while place < len(text) and total <= most:
        end = place + _AT_ONCE
        if text[end - 1 : end] == b"\\":
            # What follows a backslash belongs to it, or to one that belongs to it.
            end = max(end, _REST.match(text, end).end())  # type: ignore[union-attr]
        parts = _ESCAPED.sub(b"", text[place:end]).split(b'"')
        total += _marks(b" ".join(parts[is_in_string::2]))
        is_in_string, place = (is_in_string + len(parts) - 1) % 2, end
    return total


def _marks(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))


def json_in(path: Path) -> Any:
    """The content of a file of JSON.

    Raises:
        OSError: It cannot be read, is no regular file, or is too large for a text.
        ValueError: It is no JSON.
    """
    return parse_json(read_text(path))

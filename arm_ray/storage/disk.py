"""What the files of a machine say when they cannot be read or written, in words of our own."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from arm_ray.errors import ArmRayError, DiskSpaceError, RunDirectoryError, is_disk_full

# What is said of files, their disks and their mounts. Sockets and processes have errors of the same
# class in Python, with other numbers.
_OF_FILES = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EBADF", "EBUSY", "EDQUOT", "EEXIST", "EFBIG", "EINVAL", "EIO", "EISDIR"),
        *("ELOOP", "EMLINK", "ENAMETOOLONG", "ENODEV", "ENOENT", "ENOLCK", "ENOSPC", "ENOTDIR"),
        *("ENOTEMPTY", "ENOTSUP", "ENXIO", "EOVERFLOW", "EPERM", "EROFS", "ESTALE", "ETXTBSY"),
        *("EXDEV", "EREMOTEIO", "EUCLEAN", "ESHUTDOWN"),
    )
    if hasattr(errno, name)
)
# Their numbers mean something else.
_OTHER_MODULES = ("socket", "ssl")
_AGAIN = "the same command again goes on from what is complete"


def file_error(error: OSError, where: object = None) -> ArmRayError | None:
    """The error to raise for a file that could not be read or written.

    Args:
        error: What the system said.
        where: Whose file it was, where the system names none.

    Returns:
        None where it is not about a file, or already one of ours.
    """
    if type(error).__module__ in _OTHER_MODULES:
        return None
    place = error.filename or where
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return RunDirectoryError(
            "too many files are open at once",
            where=place,
            got=error,
            hint=f"allow more (ulimit -n 65536); {_AGAIN}",
        )
    if error.errno not in _OF_FILES:
        return None
    if is_disk_full(error):
        return DiskSpaceError(
            f"the disk is full: {error.strerror}",
            where=place,
            hint=f"free some; {_AGAIN}",
        )
    return RunDirectoryError(
        f"a file cannot be read or written: {error.strerror}",
        where=place,
        got=error,
        hint=f"look at its disk, its mount and its permissions; {_AGAIN}",
    )


@contextlib.contextmanager
def files_told(where: object) -> Iterator[None]:
    """Have errors of files within the context raised as errors of ours; see `file_error`.

    Args:
        where: Whose files they are.
    """
    try:
        yield
    except OSError as error:
        told = file_error(error, where)
        if told is None:
            raise
        raise told from error

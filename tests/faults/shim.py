"""Builds `shim.c`, and speaks to it from a process that was started with it."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
_MODES = ("count", "once", "from then on", "short write", "kill")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the calls that change files.

    Attributes:
        mode: `count` (nothing does), `once`, `from then on`, `short write` (half is written, and
            all that comes after fails), or `kill` (half is written, and the process is no more).
        error: Name of the error's number, such as `ENOSPC`.
        at: The first call that it befalls, from 1.
        delay_us: How long each call takes at least; microseconds.
    """

    mode: str = "count"
    error: str = "EIO"
    at: int = 0
    delay_us: int = 0

    @property
    def name(self) -> str:
        """For the name of a test."""
        return "kill" if self.mode == "kill" else f"{self.error} {self.mode}"


def build(directory: Path) -> Path | None:
    """Compile the shim; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = directory / "shim.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-std=gnu2x"]
    subprocess.run(
        [compiler, *flags, "-o", str(library), str(_SOURCE), "-ldl"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return library


class Shim:
    """The shim of this process, which was started with it in LD_PRELOAD."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fault_calls.restype = ctypes.c_long
        self._library.fault_mapped.restype = ctypes.c_long
        self._library.fault_place.restype = ctypes.c_char_p
        self._library.fault_arm.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_uint,
        ]

    def arm(self, directory: Path, fault: Fault) -> None:
        """Count, and let fail, what is changed below a directory from now on."""
        number = getattr(errno, fault.error)
        mode = _MODES.index(fault.mode)
        self._library.fault_arm(str(directory).encode(), mode, fault.at, number, fault.delay_us)

    @property
    def calls(self) -> int:
        """Calls that changed something, or would have."""
        return int(self._library.fault_calls())

    @property
    def mapped(self) -> int:
        """Files that were mapped into memory in order to be written there."""
        return int(self._library.fault_mapped())

    @property
    def place(self) -> str:
        """The first call that failed, and on which file; empty: none did."""
        return str(self._library.fault_place().decode(errors="replace"))

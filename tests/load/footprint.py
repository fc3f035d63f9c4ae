"""What this process and its Ray hold at a moment."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import ray

from tests.waiting import status


@dataclass(frozen=True)
class Footprint:
    """What is held.

    Attributes:
        memory_mb: Resident memory of this process; MB.
        open_files: File descriptors of this process.
        threads: Threads of this process.
        processes: Processes that this one has started, and those that they have.
        stored_objects: Objects in Ray's object store.
        scratch_files: Files of arm_ray's in the directory for temporary ones.
    """

    memory_mb: float
    open_files: int
    threads: int
    processes: int
    stored_objects: int
    scratch_files: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in fields(self))


def footprint() -> Footprint:
    """What is held now. Memory that could be given back is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own = Path("/proc/self")
    resident = re.search(r"VmRSS:\s+(\d+) kB", (own / "status").read_text())
    assert resident is not None
    scratch = Path(tempfile.gettempdir())
    return Footprint(
        int(resident[1]) / 1000,
        len(os.listdir(own / "fd")),
        len(os.listdir(own / "task")),
        len(_descendants(os.getpid())),
        _stored_objects(),
        sum(len(files) for top in scratch.glob("arm_ray*") for _, _, files in os.walk(top)),
    )


def growth(held: Sequence[Footprint]) -> dict[str, float]:
    """By how much the last fifth of the footprints exceeds the first fifth after a warm-up.

    Args:
        held: In the order of time; the first fifth is the warm-up.

    Returns:
        Name -> the difference of the means as a part of the first one.
    """
    fifth = max(1, len(held) // 5)
    early, late = held[fifth : 2 * fifth], held[-fifth:]
    found = {}
    for field in fields(Footprint):
        before, after = (
            sum(getattr(each, field.name) for each in part) / len(part) for part in (early, late)
        )
        found[field.name] = (after - before) / max(1.0, before)
    return found


def _descendants(pid: int) -> list[int]:
    """Processes below one, all the way down."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            state = status(int(entry))
            if state and state[0] != "Z":
                below.setdefault(int(state[1]), []).append(int(entry))
    found, left = [], [pid]
    while left:
        children = below.get(left.pop(), [])
        found += children
        left += children
    return found


def _stored_objects() -> int:
    if not ray.is_initialized():
        return 0
    from ray._private.internal_api import memory_summary

    # Of this process's Ray: without an address it would be the newest on the machine.
    address = ray.get_runtime_context().gcs_address
    found = re.search(r"(\d+) objects", memory_summary(address, stats_only=True))
    assert found is not None
    return int(found[1])

"""Writing what a GPU has merged while it merges the next, with a bound on what waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import torch
from torch import Tensor

from arm_ray.planning.workload import WRITERS

# A weight file's `write`, or that of one that several processes fill.
Write = Callable[[str, int, Tensor], object]


class WriteBehind:
    """Takes pieces of tensors, and writes those of a GPU from threads of its own.

    On a CPU, where each piece has a thread to itself, they are written at once.

    Args:
        device: Where the pieces are.
    """

    def __init__(self, device: torch.device) -> None:
        self._room = threading.BoundedSemaphore(WRITERS)
        self._pool = None if device.type == "cpu" else ThreadPoolExecutor(WRITERS, "write")

    def write(self, write: Write, name: str, first_row: int, rows: Tensor) -> list[Future[None]]:
        """Write some rows of a tensor, now or soon.

        Args:
            write: What writes them, from any thread.
            name: Of the tensor.
            first_row: Where they go.
            rows: Their values; what becomes of this tensor afterwards changes nothing.

        Returns:
            What ends with the writing, or raises its error; nothing where it is done.
        """
        if self._pool is None:
            write(name, first_row, rows)
            return []
        self._room.acquire()
        host = torch.empty_like(rows, device="cpu", pin_memory=rows.device.type == "cuda")
        host.copy_(rows)
        return [self._pool.submit(self._write, write, name, first_row, host)]

    def _write(self, write: Write, name: str, first_row: int, rows: Tensor) -> None:
        try:
            write(name, first_row, rows)
        finally:
            self._room.release()


class Flushes:
    """Closes files in a thread of its own: a disk takes longer over that than it should."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._running: list[Future[None]] = []

    def close_after(self, writes: Sequence[Future[None]], files: ExitStack) -> None:
        """Close files once all of them is written; what failed leaves no file."""
        self._running.append(self._pool.submit(_close, files, writes))

    def wait(self) -> None:
        """Wait until nothing is being closed, whatever became of it."""
        wait(self._running)

    def finish(self) -> None:
        """Wait until all files are whole and on disk.

        Raises:
            OSError: The disk is full.
        """
        running, self._running = self._running, []
        wait(running)
        for flush in running:
            flush.result()


def _close(files: ExitStack, writes: Sequence[Future[None]]) -> None:
    with files:
        wait(writes)
        for write in writes:
            write.result()

"""Writing what a GPU has merged while it merges the next, with a bound on what waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# A weight file's `write`, or that of one that several processes fill.
Write = Callable[[str, int, Tensor], object]
# Writers, and pieces that wait in host memory at most.
_WRITERS = 4


class WriteBehind:
    """Takes pieces of tensors, and writes those of a GPU from threads of its own.

    On a CPU, where each piece has a thread to itself, they are written at once.

    Args:
        device: Where the pieces are.
    """

    def __init__(self, device: torch.device) -> None:
        self._room = threading.BoundedSemaphore(_WRITERS)
        self._pool = None if device.type == "cpu" else ThreadPoolExecutor(_WRITERS, "write")

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

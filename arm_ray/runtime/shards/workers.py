"""Work on pieces of tensors by a shard's threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")


class Workers:
    """Maps a function over pieces, in order, as many at a time as there are threads.

    The products of one tensor are too small to share: each piece has one thread to itself, so what
    comes out does not depend on how many there are. A GPU takes one operation after the other
    anyway, and torch's CUDA factorisations must not begin in two threads at once.

    Args:
        threads: How many.
        device: Where the pieces are.
    """

    def __init__(self, threads: int, device: torch.device) -> None:
        self._threads = threads if device.type == "cpu" else 1
        # torch and MKL keep the number of threads for each thread that calls them.
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def in_order(self, work: Callable[[_T], _R], items: Iterator[_T]) -> Iterator[_R]:
        """`map` over the pieces."""
        if self._threads == 1:
            yield from map(work, items)
            return
        running: deque[Future[_R]] = deque()
        for item in items:
            running.append(self._pool.submit(work, item))
            if len(running) > self._threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

"""Runs many programs, a bounded number at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Calls a function for each item in threads, and yields the results in the items' order.

    Threads do for programs in a sandbox, since these are processes of their own. At most twice as
    many items as there are workers are taken ahead, so that neither a long series of programs nor
    their output piles up.

    Args:
        function: What is called; the first error it raises is raised here.
        items: What it is called with.
        workers: Calls at a time; more than a sandbox has slots would only wait.

    Yields:
        The results.
    """
    waiting: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
    try:
        for item in items:
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
            waiting.append(executor.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)

"""A layer group's tensors in pieces of rows, and the threads that work on them and write them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.validation import check_finite
from arm_ray.checkpoints.weight_file import TensorSpec, WeightFileWriter
from arm_ray.errors import about
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.watch import check_finite_rows, looks_finite
from arm_ray.model.layout import ModelLayout
from arm_ray.planning.workload import WRITERS
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.weights import WeightStore
from arm_ray.schedule import IterationPlan

_T = TypeVar("_T")
_R = TypeVar("_R")
# Bytes: a little less than glibc's most, for what it adds to a block.
_LARGEST_KEPT = (32 << 20) - (64 << 10)
# A weight file's `write`, or that of one that several processes fill.
Write = Callable[[str, int, Tensor], object]


def group_specs(layout: ModelLayout, group: int) -> list[TensorSpec]:
    """The tensors of a layer group as a merged state stores them."""
    names = layout.groups[group].tensors
    return [TensorSpec(name, torch.float32, layout.shapes[name]) for name in names]


@contextlib.contextmanager
def group_writer(
    directory: Path, group: int, specs: Sequence[TensorSpec], *, is_read_again: bool = True
) -> Iterator[WeightFileWriter]:
    """Write one layer group of a state; the file appears whole when the context ends."""
    directory.mkdir(parents=True, exist_ok=True)
    file = states.group_file(directory, group)
    with WeightFileWriter(file, specs, is_read_again=is_read_again) as writer:
        yield writer


def row_pieces(spec: TensorSpec, elements: int) -> list[slice]:
    """Consecutive rows of a tensor, of about so many elements at a time."""
    rows = spec.shape[0] if spec.shape else 1
    width = max(1, spec.num_bytes // spec.dtype.itemsize // max(1, rows))
    step = max(1, elements // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pieces_of(
    spec: ShardSpec, tensor: TensorSpec, elements: int, *, measures_tensors: bool = False
) -> list[slice]:
    """The rows that a tensor is merged in: all at once, or about so many elements at a time."""
    if is_by_expert(spec, tensor):
        return [slice(expert, expert + 1) for expert in range(tensor.shape[0])]
    is_linear = tensor.name in spec.layout.matrices
    takes_rows = spec.method.takes_rows(
        len(tensor.shape), is_linear, measures_tensors=measures_tensors
    )
    if takes_rows:
        return row_pieces(tensor, elements)
    return [slice(0, tensor.shape[0] if tensor.shape else 1)]


def is_by_expert(spec: ShardSpec, tensor: TensorSpec) -> bool:
    """Whether a tensor holds all experts, and each is rotated by itself."""
    is_all = tensor.name in spec.layout.rotated and len(tensor.shape) == 3
    return is_all and spec.method.needs_outputs


def tensor_inputs(
    spec: ShardSpec,
    store: WeightStore,
    plan: IterationPlan,
    group: int,
    tensor: TensorSpec,
    rows: slice,
    reference: Tensor,
    contributors: Sequence[Tensor],
    statistics: Mapping[str, object],
    *,
    is_measured: bool = False,
) -> TensorInputs:
    """What an operator is given of some rows of a tensor.

    Args:
        spec: The shard's.
        store: The shard's weights.
        plan: The iteration.
        group: Index of the tensor's layer group.
        tensor: The whole tensor.
        rows: Which rows.
        reference: The reference's.
        contributors: The contributors'.
        statistics: What the operator's rounds have found.
        is_measured: Whether the rounds over this tensor are among them.
    """
    moments: list[Tensor] = []
    if spec.method.operator.second_moments:
        moments = [
            store.second_moments(state, group, tensor.name, rows) for state in plan.contributors
        ]
    return TensorInputs(
        tensor.name,
        reference,
        contributors,
        plan.divisor,
        rows=rows,
        shape=tensor.shape,
        is_linear=tensor.name in spec.layout.matrices or is_by_expert(spec, tensor),
        contributor_names=plan.contributors,
        iteration=plan.draw,
        depth=spec.layout.depth_of(tensor.name),
        includes_reference=plan.regime == "sliding_window",
        statistics=statistics,
        is_measured=is_measured,
        second_moments=moments,
    )


def checked_rows(
    spec: ShardSpec, store: WeightStore, state: str, group: int, name: str, rows: slice
) -> Tensor:
    """Rows of a tensor, float32, of a merge whose weights were not looked at before.

    Not all operators let what is not finite come out again.

    Raises:
        CorruptCheckpointError: Names the tensor of a checkpoint, and the first bad position.
        NumericalError: It is of a merged state.
    """
    found = store.rows(state, group, name, rows)
    if looks_finite(found):
        return found
    checkpoint = spec.checkpoints.get(state)
    if checkpoint is None:
        check_finite_rows(found, name, state)
        return found
    with about(state):
        whole = checkpoint.read([name])[name]
        check_finite(whole, name, f"{state}: {checkpoint.tensors[name].file}")
    return found


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
        if device.type == "cpu":
            _keep_freed_memory()
        # torch and MKL keep the number of threads for each thread that calls them.
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def in_order(self, work: Callable[[_T], _R], items: Iterator[_T]) -> Iterator[_R]:
        """`map` over the pieces."""
        if self._threads == 1:
            yield from map(work, items)
            return
        running: deque[Future[_R]] = deque()
        with _one_thread():
            for item in items:
                running.append(self._pool.submit(work, item))
                if len(running) > self._threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have the calling thread compute alone.

    The threads that torch computes an operation with wait for the next one for some milliseconds
    without sleeping, and take the cores from those that work on pieces.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next piece.

    It hands larger blocks back to the system at once, and each piece would then pay for its pages
    anew: half a million page faults in a merge of 135M parameters. By its documentation
    (`mallopt`, M_MMAP_THRESHOLD) it keeps blocks up to the size of the largest that was freed, of
    at most 32 MiB, and twice as much in all.
    """
    block = bytearray(_LARGEST_KEPT)
    del block


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

"""The merged states of one shard: what of them is in memory, and what of them is written."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import (
    SharedWeightFile,
    SharedWriter,
    TensorSpec,
    narrowed,
    opened_for,
    weight_file_bytes,
)
from arm_ray.planning.workload import PIECE
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.node_files import CHUNK_BYTES, NodeFiles
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.shards.captures import forward_states
from arm_ray.runtime.shards.meter import RateLimit
from arm_ray.runtime.shards.pieces import (
    Workers,
    WriteBehind,
    group_specs,
    group_writer,
    row_pieces,
)
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.weights import WeightStore, put_aside, rows_of
from arm_ray.schedule import (
    BASE,
    IterationPlan,
    iteration_of,
    state_name,
    states_read_after,
    states_run_after,
)


@dataclass(frozen=True)
class Written:
    """What one shard has written of a state: bytes, and the seconds that this took."""

    num_bytes: int = 0
    seconds: float = 0.0


class MadeStates:
    """Merged states that live where the shard's weights do (`runtime.residency` device or host).

    A state stays while a later iteration reads it, while the driver may still end with it
    (`settle`), and until what is to be written of it is on disk. A thread of its own writes it,
    from where it lives: what waits to be written needs no further memory. The merge of a group that
    takes its place waits for both.

    Args:
        spec: The shard's.
        store: Its weights.
        workers: What works on pieces.
        behind: What writes them.
        disk: Bounds how fast the shard writes.
    """

    def __init__(
        self,
        spec: ShardSpec,
        store: WeightStore,
        workers: Workers,
        behind: WriteBehind,
        disk: RateLimit,
    ) -> None:
        self._spec, self._store, self._workers = spec, store, workers
        self._behind, self._disk = behind, disk
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-states")
        self._writing: dict[tuple[int, int], Future[Written]] = {}
        life = spec.life
        # Up to this iteration the driver knows which states it still needs: these.
        self._settled = 0 if life is not None and life.may_end_early else sys.maxsize
        self._held: frozenset[int] = frozenset()
        self._last = sys.maxsize if life is None else life.last
        self._changed = threading.Condition()

    def keep(self, plan: IterationPlan, group: int, tensors: Mapping[str, Tensor]) -> int:
        """Take over a group that is merged, and have it written where that is planned.

        Returns:
            Bytes of the file.
        """
        self._store.keep(plan.output, group, tensors)
        life = self._spec.life
        if life is not None and plan.iteration not in life.written:
            return 0
        return self._submit(plan.iteration, group)

    def settle(self, iteration: int, held: Collection[int]) -> None:
        """Take note of what the driver still needs, of the states up to an iteration.

        Args:
            iteration: The last one that is finished.
            held: Iterations whose states are needed, although no later iteration reads them.
        """
        with self._changed:
            self._held = frozenset(held)
            self._settled = max(self._settled, iteration)
            self._changed.notify_all()

    def end_with(self, iteration: int) -> None:
        """Take note that no iteration after this one counts: its state stays."""
        with self._changed:
            self._last = min(self._last, iteration)
            self._changed.notify_all()

    def release(self, plan: IterationPlan, group: int) -> None:
        """Let go of what nothing needs any more of a group that is merged.

        What the driver may still need, it waits to hear of: a merge of an iteration goes on beside
        others of the one before, but only once all of that one are done is it known whether it was
        the last.
        """
        spec = self._spec
        read = states_read_after(spec.schedule, spec.num_candidates, plan.iteration)
        inputs = forward_states(spec.method, plan)
        if self._store.residency == "disk":
            self._store.release(group, inputs, read.__contains__)
            return
        known = {name: iteration_of(name) for name in self._store.stored(group)}
        made = {name: t for name, t in known.items() if t is not None}
        older = {t for n, t in made.items() if t != plan.iteration and n not in read}

        def unknown() -> set[int]:
            return {t for t in older if t > self._settled}

        with self._changed:
            self._changed.wait_for(lambda: self._last < plan.iteration or not unknown())
            needed = {plan.iteration, *self._held, *unknown()}
        for iteration in older - needed:
            writing = self._writing.get((iteration, group))
            if writing is not None:
                wait([writing])

        def is_needed(name: str) -> bool:
            is_base = spec.kept_base is not None and name == BASE
            return is_base or name in read or made.get(name) in needed

        self._store.release(group, inputs, is_needed)
        runs = states_run_after(spec.schedule, spec.num_candidates, plan.iteration)
        put_aside(self._store, group, lambda name: name not in runs and name not in made)

    def written(self, iteration: int) -> Written:
        """Wait until what is to be written of a state is on disk.

        Raises:
            OSError: The disk is full.
        """
        keys = [key for key in list(self._writing) if key[0] == iteration]
        try:
            wait([self._writing[key] for key in keys])
            found = [self._writing[key].result() for key in keys]
        finally:
            for key in keys:
                del self._writing[key]
        return Written(sum(w.num_bytes for w in found), sum(w.seconds for w in found))

    def quiet(self) -> None:
        """Wait until nothing is being written, whatever became of it."""
        wait(list(self._writing.values()))

    def write(self, iteration: int) -> Written:
        """Write what is in memory of a state, and not on disk yet.

        Raises:
            OSError: The disk is full.
        """
        directory = states.state_directory(self._spec.run, iteration)
        for group in self._spec.groups:
            is_there = states.group_file(directory, group).is_file()
            if not is_there and (iteration, group) not in self._writing:
                self._submit(iteration, group)
        return self.written(iteration)

    def fill(self, iteration: int, model: Sequence[SharedWeightFile]) -> int:
        """Write the shard's tensors of a state to their places in the final model.

        Args:
            iteration: Of the state.
            model: The weight files, which are made already.

        Returns:
            Bytes of tensors, in the final model's dtypes.
        """
        total = 0
        for group in self._spec.groups:
            tensors = self._store.whole(state_name(iteration), group)
            with opened_for(model, tensors) as files:
                writes: list[Future[None]] = []
                put = partial(self._put, files, tensors, writes)
                try:
                    total += sum(self._workers.in_order(put, self._pieces(group)))
                finally:
                    wait(writes)
            for write in writes:
                write.result()
            self._store.release_unless_resident(group)
        self._disk.spend(total)
        return total

    def _put(
        self,
        files: Mapping[str, SharedWriter],
        tensors: Mapping[str, Tensor],
        writes: list[Future[None]],
        piece: tuple[TensorSpec, slice],
    ) -> int:
        spec, rows = piece
        file = files[spec.name]
        # Cast where the weights are: less is copied.
        cast = narrowed(rows_of(tensors[spec.name], rows), file.dtype(spec.name), spec.name)
        writes += self._behind.write(file.write, spec.name, rows.start, cast)
        return cast.nbytes

    def assemble(
        self, iteration: int, model: Sequence[SharedWeightFile], files: Handle[NodeFiles]
    ) -> int:
        """The same where the final model is on another node, which `files` writes on."""
        total, pending = 0, deque[ray.ObjectRef[None]]()
        for group in self._spec.groups:
            tensors = self._store.whole(state_name(iteration), group)
            for file in model:

                def put(view: memoryview, position: int, path: Path = file.path) -> None:
                    data = np.frombuffer(view, dtype=np.uint8)
                    pending.append(files.call(NodeFiles.write, path, position, data))
                    # Two on their way at a time.
                    if len(pending) > 1:
                        ray.get(pending.popleft())

                writer = file.writer(put)
                for spec in group_specs(self._spec.layout, group):
                    if spec.name in writer:
                        for rows in row_pieces(spec, CHUNK_BYTES // spec.dtype.itemsize):
                            tensor = rows_of(tensors[spec.name], rows)
                            total += writer.write(spec.name, rows.start, tensor)
            self._store.release_unless_resident(group)
        ray.get(list(pending))
        return total

    def _submit(self, iteration: int, group: int) -> int:
        tensors = self._store.whole(state_name(iteration), group)
        directory = states.state_directory(self._spec.run, iteration)
        self._writing[iteration, group] = self._pool.submit(self._write, directory, group, tensors)
        return weight_file_bytes(group_specs(self._spec.layout, group))

    def _write(self, directory: Path, group: int, tensors: Mapping[str, Tensor]) -> Written:
        started = time.monotonic()
        specs = group_specs(self._spec.layout, group)
        # What is read again is in memory.
        with group_writer(directory, group, specs, is_read_again=False) as writer:
            writes: list[Future[None]] = []
            try:
                for spec, rows in self._pieces(group):
                    piece = rows_of(tensors[spec.name], rows)
                    writes += self._behind.write(writer.write, spec.name, rows.start, piece)
            finally:
                wait(writes)
            for write in writes:
                write.result()
        self._disk.spend(writer.num_bytes)
        return Written(writer.num_bytes, time.monotonic() - started)

    def _pieces(self, group: int) -> Iterator[tuple[TensorSpec, slice]]:
        for spec in group_specs(self._spec.layout, group):
            for rows in row_pieces(spec, PIECE):
                yield spec, rows

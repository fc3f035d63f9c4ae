"""One node's files, for the shards, the engines and the driver on other nodes.

Only where nodes do not share storage. There is one such actor on each node that takes part, without
CPUs of its own: what it hands out travels through Ray's object store.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from arm_ray.checkpoints import states
from arm_ray.config import scratch_path
from arm_ray.errors import ArmRayError
from arm_ray.runtime.cluster.actors import Handle, start_actor
from arm_ray.runtime.cluster.calls import NODE_FILES, get_results
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.storage.atomic import put_file
from arm_ray.storage.regular import open_regular
from arm_ray.storage.store import StoredFile

if TYPE_CHECKING:
    from ray import ObjectRef

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Of one message: large enough for the network, small enough for an object store in use.
CHUNK_BYTES = 64 << 20
# Directory of the copies of checkpoints, below the scratch directory.
COPIES = "copies"
_GROUP_FILE = re.compile(r"group-([0-9]{5,})\.safetensors")


class NodeFiles:
    """Reads and writes a run's files on its node. A plain class; Ray makes it an actor.

    Args:
        scratch: `runtime.scratch`.
        name: The run's directory below it.
    """

    def __init__(self, scratch: str | None, name: str) -> None:
        self._run = scratch_path(scratch) / name

    def ready(self) -> Path:
        """Answer once the actor runs: the run's scratch directory on this node."""
        return self._run

    def listing(self, directory: Path, recursive: bool) -> dict[str, StoredFile]:
        """Name -> file, of a directory; empty where there is none."""
        found = {}
        # Links to directories are followed: checkpoints are put together from such.
        for parent, below, names in os.walk(directory, followlinks=True):
            if not recursive:
                below.clear()
            for name in names:
                file = Path(parent, name)
                # A trainer may just be removing it.
                with contextlib.suppress(OSError):
                    status = file.stat()
                    if S_ISREG(status.st_mode):
                        time_ns = status.st_mtime_ns
                        relative = file.relative_to(directory).as_posix()
                        found[relative] = StoredFile(status.st_size, str(time_ns), time_ns)
        return dict(sorted(found.items()))

    def size(self, file: Path) -> int:
        """Bytes of a file."""
        return file.stat().st_size

    def read(self, file: Path, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes of a file, from one position to before another."""
        with open_regular(file) as opened:
            opened.seek(begin)
            return np.frombuffer(opened.read(end - begin), dtype=np.uint8)

    def write(self, file: Path, position: int, data: NDArray[np.uint8]) -> None:
        """Write at a position of a file, which is made where it is missing."""
        handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            view = data.data
            while len(view):
                written = os.pwrite(handle, view, position)
                position, view = position + written, view[written:]
        finally:
            os.close(handle)

    def finish(self, partial: Path, file: Path) -> None:
        """Give a file that was written whole its name."""
        put_file(partial, file)

    def groups(self) -> set[tuple[int, int]]:
        """Iteration and layer group of each weight file of merged states on this node."""
        return {
            (iteration, int(match[1]))
            for iteration, directory in states.state_directories(self._run).items()
            for file in directory.iterdir()
            if (match := _GROUP_FILE.fullmatch(file.name))
        }

    def discard(self, iterations: list[int]) -> None:
        """Remove merged states from this node."""
        for iteration in iterations:
            states.discard_state(self._run, iteration)

    def export(
        self, directory: Path, file: states.ExportFile, state: Path, group_of: Mapping[str, int]
    ) -> int:
        """Write one weight file of the final model from a state on this node; returns bytes."""
        return states.write_export_file(directory, file, state, group_of)

    def remove(self, fingerprints: list[str]) -> None:
        """Remove all that the run has left on this node, and copies of these checkpoints."""
        root = self._run.parent
        gone = [self._run, *(root / COPIES / own[:32] for own in fingerprints)]
        for directory in gone:
            shutil.rmtree(directory, ignore_errors=True)
        for directory in (root / COPIES, root):
            with contextlib.suppress(OSError):
                directory.rmdir()


class FilesOnNodes:
    """The `NodeFiles` of all nodes that take part.

    Args:
        handles: Node -> its actor.
        needed: Nodes whose files cannot be done without.
    """

    def __init__(self, handles: Mapping[str, Handle[NodeFiles]], needed: Collection[str]) -> None:
        self._handles, self._needed = dict(handles), frozenset(needed)

    def __getitem__(self, node: str) -> Handle[NodeFiles]:
        return self._handles[node]

    @property
    def nodes(self) -> list[str]:
        """The nodes that have answered so far."""
        return list(self._handles)

    def ask(
        self,
        method: Callable[Concatenate[NodeFiles, _P], _R],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> dict[str, _R]:
        """Node -> what it answers; nodes that are gone by now are left out from now on.

        Raises:
            ShardLostError: A node is gone that cannot be done without.
        """
        refs = {node: files.call(method, *args, **kwargs) for node, files in self._handles.items()}
        answers = {}
        for node, ref in refs.items():
            try:
                [answers[node]] = get_results([ref], NODE_FILES)
            except ArmRayError:
                if node in self._needed:
                    raise
                del self._handles[node]
        return answers

    def end(self) -> None:
        """End the actors."""
        for files in self._handles.values():
            files.end()


def files_on_nodes(
    needed: Collection[str], others: Iterable[str], scratch: str | None, name: str
) -> FilesOnNodes:
    """Start what serves files, on each node that takes part.

    Args:
        needed: Ids of nodes whose files cannot be done without.
        others: Ids of nodes that may have files.
        scratch: `runtime.scratch`.
        name: The run's directory below it.
    """
    handles = {}
    for node in dict.fromkeys([*needed, *others]):
        where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_concurrency": 4, "scheduling_strategy": where}
        handles[node] = start_actor(options, NodeFiles, scratch, name)
    return FilesOnNodes(handles, needed)


def read_chunks(
    files: Handle[NodeFiles], file: Path, begin: int, end: int
) -> Iterator[NDArray[np.uint8]]:
    """Bytes of a file on another node, in pieces; the next one travels while one is used.

    Args:
        files: Handle of that node's `NodeFiles`.
        file: The file there.
        begin: First byte.
        end: One past the last.
    """
    following: ObjectRef[NDArray[np.uint8]] | None = None
    for start in range(begin, end, CHUNK_BYTES):
        after = min(start + CHUNK_BYTES, end)
        ref = following or files.call(NodeFiles.read, file, start, after)
        following = (
            files.call(NodeFiles.read, file, after, min(after + CHUNK_BYTES, end))
            if after < end
            else None
        )
        yield ray.get(ref)


def send_file(source: Path, files: Handle[NodeFiles], target: Path) -> int:
    """Send a whole file to another node, where it appears when it is complete; returns bytes."""
    partial = target.with_name(f".{target.name}.sent.partial")
    position = 0
    pending: list[ObjectRef[None]] = []
    with open_regular(source) as opened:
        while data := opened.read(CHUNK_BYTES):
            array = np.frombuffer(data, dtype=np.uint8)
            pending.append(files.call(NodeFiles.write, partial, position, array))
            position += len(data)
            # Two on their way at a time.
            if len(pending) > 1:
                ray.get(pending.pop(0))
    ray.get(pending)
    ray.get(files.call(NodeFiles.finish, partial, target))
    return position


@dataclass(frozen=True)
class NodeDirectory:
    """A directory of another node, as a `checkpoints.remote.RangeReader`.

    Attributes:
        handle: That node's `NodeFiles`.
        path: The directory there.
    """

    handle: Handle[NodeFiles]
    path: Path

    def read(self, name: str, begin: int, end: int) -> bytearray:
        """Bytes of a file there."""
        whole = bytearray()
        for part in read_chunks(self.handle, self.path / name, begin, end):
            whole += part.data
        return whole

    def __str__(self) -> str:
        return str(self.path)

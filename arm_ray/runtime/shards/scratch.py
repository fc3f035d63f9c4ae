"""What a layer shard keeps on its own node's disk, and exchanges with others.

Only where nodes do not share storage (`runtime.storage: per_node`).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.remote import RemoteCheckpoint
from arm_ray.checkpoints.weight_file import SharedWeightFile, TensorSpec, atomic_file
from arm_ray.errors import NotACheckpointError
from arm_ray.runtime.shards.node_files import CHUNK_BYTES, NodeDirectory, read_chunks
from arm_ray.runtime.shards.pieces import row_pieces

# How often a shard looks for a file that is to be seen on all nodes, and how long it waits between.
_SIGHTINGS = 12
_SIGHTING_S = 0.25


@dataclass(frozen=True)
class Elsewhere:
    """A layer group of a merged state on another node.

    Attributes:
        iteration: Of the state.
        group: The layer group.
        files: `NodeFiles` of that node.
        file: The weight file there.
    """

    iteration: int
    group: int
    files: Any
    file: Path


def sees(file: Path, content: str) -> bool:
    """Whether a file that another node has written is here too."""

    def is_here() -> bool:
        with contextlib.suppress(OSError):
            return file.read_text(encoding="utf-8") == content
        return False

    return sighted(is_here)


def sighted(is_here: Callable[[], bool]) -> bool:
    """Whether something is here, or becomes visible in a moment."""
    # Network file systems show a new file to other nodes a little later.
    for _ in range(_SIGHTINGS):
        if is_here():
            return True
        time.sleep(_SIGHTING_S)
    return False


def missing_files(checkpoints: Mapping[str, Checkpoint], names: Sequence[str]) -> list[str]:
    """Files that some tensors of checkpoints are in and that are not on this node."""
    return [
        f"{label}: {file}"
        for label, given in checkpoints.items()
        if given.is_local
        for file in sorted(given.files(names))
        if not file.is_file()
    ]


def reachable(
    label: str, given: Checkpoint, names: Sequence[str], origin: Any, fingerprint: str
) -> Checkpoint:
    """A checkpoint as it is here, or in the same place on the driver's node.

    Args:
        label: Its state name, for errors.
        given: As the driver has opened it.
        names: The tensors that are wanted of it.
        origin: `NodeFiles` of the driver's node.
        fingerprint: The checkpoint's, as taken there.

    Raises:
        NotACheckpointError: It is not here, and of a format that is not fetched by parts.
    """
    if not given.is_local:
        return given
    absent = sorted(file for file in given.files(names) if not file.is_file())
    if not absent:
        return given
    if type(given) is not Checkpoint:
        raise NotACheckpointError(
            f"{label} is not on a node of the cluster, and its format is not fetched by parts",
            where=f"{absent[0]}, on {socket.gethostname()}",
            got=f"a checkpoint of the format {given.kind}",
            expected="a safetensors model, or the same files on every node",
            hint="copy it there, put it on storage that all nodes see, or export it",
        )
    directory = NodeDirectory(origin, given.path)
    return RemoteCheckpoint(given.path, given.config, given.tensors, directory, fingerprint)


def fetch_group(run: Path, there: Elsewhere) -> int:
    """Bring a layer group of a merged state into a run's directory here; returns bytes."""
    directory = states.state_directory(run, there.iteration)
    directory.mkdir(parents=True, exist_ok=True)
    size = int(ray.get(there.files.size.remote(there.file)))
    with atomic_file(states.group_file(directory, there.group), may_race=True) as target:
        for part in read_chunks(there.files, there.file, 0, size):
            target.write(part.data)
    return size


def assemble(
    state: Path,
    group: int,
    specs: Sequence[TensorSpec],
    model: Sequence[SharedWeightFile],
    files: Any,
) -> int:
    """Send a layer group's tensors to their places in the final model, on another node.

    Args:
        state: The merged state's directory here.
        group: The layer group.
        specs: Its tensors.
        model: The weight files there, which are made already.
        files: `NodeFiles` of that node.

    Returns:
        Bytes of tensors, in the final model's dtypes.
    """
    total, pending = 0, deque[Any]()
    for file in model:

        def put(view: memoryview, position: int, path: Path = file.path) -> None:
            data = np.frombuffer(view, dtype=np.uint8)
            pending.append(files.write.remote(path, position, data))
            # Two on their way at a time.
            if len(pending) > 1:
                ray.get(pending.popleft())

        writer = file.writer(put)
        for spec in specs:
            if spec.name in writer:
                tensor = states.read_group(state, group, [spec.name])[spec.name]
                for rows in row_pieces(spec, CHUNK_BYTES // spec.dtype.itemsize):
                    total += writer.write(spec.name, rows.start, tensor[rows])
    ray.get(list(pending))
    return total

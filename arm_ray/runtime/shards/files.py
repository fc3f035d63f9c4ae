"""A layer shard's files on its own node, and what it exchanges with other nodes.

Most of it only where nodes do not share storage (`runtime.storage: per_node`).
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arm_ray.checkpoints import states
from arm_ray.checkpoints.fp8 import Fp8Checkpoint
from arm_ray.checkpoints.huggingface import BareCheckpoint, Checkpoint
from arm_ray.checkpoints.remote import LocalCopy, RemoteCheckpoint, local_copy
from arm_ray.checkpoints.validation import check_finite
from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.config import scratch_path
from arm_ray.errors import NotACheckpointError, about
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.node_files import (
    COPIES,
    NodeDirectory,
    NodeFiles,
    read_chunks,
    send_file,
)
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.shards.meter import Meter, RateLimit
from arm_ray.runtime.shards.spec import ShardSpec

# How often a shard looks for a file that is to be seen on all nodes, and how long it waits between.
_LOOKS = 12
_LOOK_S = 0.25


@dataclass(frozen=True)
class RemoteGroup:
    """A layer group of a merged state on another node.

    Attributes:
        iteration: Of the state.
        group: The layer group.
        files: `NodeFiles` of that node.
        file: The weight file there.
    """

    iteration: int
    group: int
    files: Handle[NodeFiles]
    file: Path


class ShardFiles:
    """The files of one shard: its checkpoints, its parts of merged states, and of the model.

    Args:
        spec: What the shard was given.
        meter: Where fetched bytes are counted.
        disk: Bounds how fast it reads and writes.
    """

    def __init__(self, spec: ShardSpec, meter: Meter, disk: RateLimit) -> None:
        self._meter, self._disk = meter, disk
        # What cannot be read in place is copied: the shard's own groups, each when it is needed.
        copies = scratch_path(spec.scratch) / COPIES
        tensors = tuple(group.tensors for group in spec.layout.groups)
        self.spec = replace(
            spec,
            checkpoints={
                label: given
                if given.is_local
                else local_copy(given, copies, tensors, meter.count_fetched)
                for label, given in spec.checkpoints.items()
            },
        )

    def moved_to(
        self, name: str, origin: Handle[NodeFiles], fingerprints: Mapping[str, str]
    ) -> ShardFiles:
        """The same with merged states on the node's own disk, and checkpoints fetched.

        Args:
            name: The run's directory below `runtime.scratch`.
            origin: `NodeFiles` of the node where the driver has opened the checkpoints.
            fingerprints: State name -> fingerprint of its checkpoint, as taken there.

        Raises:
            NotACheckpointError: A checkpoint is not here, and of a format that is not fetched.
        """
        spec, own = self.spec, self._own_tensors()
        moved = replace(
            spec,
            run=scratch_path(spec.scratch) / name,
            checkpoints={
                label: _reachable(label, given, own, origin, fingerprints[label])
                for label, given in spec.checkpoints.items()
            },
        )
        return ShardFiles(moved, self._meter, self._disk)

    def sees(self, file: Path, content: str) -> bool:
        """Whether a file that the driver has written is here too."""

        def is_here() -> bool:
            with contextlib.suppress(OSError):
                return file.read_text(encoding="utf-8") == content
            return False

        return becomes_visible(is_here)

    def missing(self) -> list[str]:
        """Files of checkpoints that the shard's layers need and that are not on this node."""
        given = {**self.spec.second_moments, **self.spec.checkpoints}
        own = self._own_tensors()
        return [
            f"{label}: {file}"
            for label, checkpoint in given.items()
            if checkpoint.is_local
            for file in sorted(checkpoint.files(own))
            if not file.is_file()
        ]

    def remove_copies(self) -> None:
        """Remove the copies of what lies elsewhere from this node's disk."""
        for given in self.spec.checkpoints.values():
            if isinstance(given, LocalCopy):
                shutil.rmtree(given.copies, ignore_errors=True)

    def check_weights(self) -> int:
        """Look for NaN and infinity in the shard's layers of all checkpoints; returns bytes read.

        Raises:
            CorruptCheckpointError: Says in which tensor of which checkpoint.
        """
        total = 0
        for label, checkpoint in self.spec.checkpoints.items():
            # Tensor by tensor, memory-mapped: nothing of it stays.
            for name in self._own_tensors():
                tensor = checkpoint.read([name])[name]
                with about(label):
                    check_finite(tensor, name, f"{label}: {checkpoint.tensors[name].file}")
                total += tensor.nbytes
                self._disk.spend(tensor.nbytes)
        return total

    def fetch_groups(self, wanted: Sequence[RemoteGroup]) -> None:
        """Bring layer groups of merged states here, that another node has."""
        for there in wanted:
            directory = states.state_directory(self.spec.run, there.iteration)
            directory.mkdir(parents=True, exist_ok=True)
            size = ray.get(there.files.call(NodeFiles.size, there.file))
            with atomic_file(states.group_file(directory, there.group), may_race=True) as target:
                for part in read_chunks(there.files, there.file, 0, size):
                    target.write(part.data)
            self._meter.count_fetched(size)

    def deliver(self, iteration: int, group: int, files: Handle[NodeFiles], directory: Path) -> int:
        """Send a layer group of a merged state to `directory` on another node; returns bytes."""
        own = states.state_directory(self.spec.run, iteration)
        return send_file(states.group_file(own, group), files, states.group_file(directory, group))

    def _own_tensors(self) -> list[str]:
        return [name for g in self.spec.groups for name in self.spec.layout.groups[g].tensors]


def becomes_visible(is_here: Callable[[], bool]) -> bool:
    """Whether something is here, or becomes visible in a moment."""
    # Network file systems show a new file to other nodes a little later.
    for _ in range(_LOOKS):
        if is_here():
            return True
        time.sleep(_LOOK_S)
    return False


def _reachable(
    label: str,
    given: Checkpoint,
    names: Sequence[str],
    origin: Handle[NodeFiles],
    fingerprint: str,
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
    if isinstance(given, Fp8Checkpoint):
        stored = given.with_scales(n for n in names if n in given.tensors)
        source = _reachable(label, given.source, stored, origin, fingerprint)
        return replace(given, source=source)
    absent = sorted(file for file in given.files(names) if not file.is_file())
    if not absent:
        return given
    if type(given) not in (Checkpoint, BareCheckpoint):
        raise NotACheckpointError(
            f"{label} is not on a node of the cluster, and its format is not fetched by parts",
            where=f"{absent[0]}, on {socket.gethostname()}",
            got=f"a checkpoint of the format {given.kind}",
            expected="a safetensors model, or the same files on every node",
            hint="copy it there, put it on storage that all nodes see, or export it",
        )
    directory = NodeDirectory(origin, given.path)
    return RemoteCheckpoint(given.path, given.config, given.tensors, directory, fingerprint)

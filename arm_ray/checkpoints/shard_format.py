"""A format of trainers' shards: how it is found, opened, and known to be complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.sharded import Rename, ShardedCheckpoint, Table, assemble
from arm_ray.errors import CorruptCheckpointError, NotACheckpointError
from arm_ray.storage.regular import read_text

_NOT_AS_WRITTEN = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True)
class ShardFormat:
    """One format.

    Attributes:
        checkpoint: Its class of checkpoints.
        mark: The file that it is known by, for people.
        find: Where its files are, given a path: in it, or below; None where there are none.
        read: Where each tensor lies, given what `find` gave, and whether float32 masters are read.
        absent: What to say where there are none.
        expected: What would be there.
        beside: Where the configuration and tokenizer may be, given the path and what `find` gave.
        hint: What to do where there are none.
        unwritten: What is still to come of a checkpoint that is being written; None: nothing.
        rename: Gives tensors Hugging Face's names where the trainer has its own; None: it does not.
    """

    checkpoint: type[ShardedCheckpoint]
    mark: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, bool], Table]
    absent: str
    expected: str
    beside: Callable[[Path, Path], Sequence[Path]] = lambda path, found: [path, found, found.parent]
    hint: str | None = None
    unwritten: Callable[[Path], str | None] = lambda _found: None
    rename: Rename | None = None

    def open(self, path: Path, base: Checkpoint | None, masters: bool) -> ShardedCheckpoint:
        """Find every tensor. Reads no weights.

        Args:
            path: Directory with the files, or one above it.
            base: Whose configuration is taken where there is none of the checkpoint's own.
            masters: Read float32 where it is; else the weights in the model's own dtype, or what
                rounding to it gives.

        Raises:
            NotACheckpointError: There are no such files, or such that are not read.
            CorruptCheckpointError: Files are missing, or do not fit each other.
            PickleRefusedError: A file holds other objects than such checkpoints do.
        """
        found = self.find(path)
        if found is None:
            raise NotACheckpointError(
                self.absent, where=path, expected=self.expected, hint=self.hint
            )
        try:
            table, beside = self.read(found, masters), list(self.beside(path, found))
            return assemble(self.checkpoint, path, table, base, masters, beside, self.rename)
        except _NOT_AS_WRITTEN as error:
            # Whatever a table holds in place of what the trainer writes there.
            raise CorruptCheckpointError(
                "the table of a checkpoint is not what its trainer writes",
                where=found,
                got=f"{self.mark} that cannot be understood",
                expected=self.expected,
                hint="copy or save the checkpoint again; --debug shows where it was met",
            ) from error

    def missing(self, path: Path) -> str | None:
        """What is missing of the files; None where they are complete.

        Raises:
            CheckpointError: They are damaged, or such that are not read.
        """
        found = self.find(path)
        if found is None:
            return f"no {self.mark}"
        problem = self.unwritten(found)
        if problem is None:
            self.read(found, True)
        return problem


def find_named(path: Path, pointer: str, below: str, holds: Callable[[Path], bool]) -> Path | None:
    """Where files are: in the path, in what a file names, or in the only directory below.

    Args:
        path: The path.
        pointer: Name of the file in it whose text is the name of a directory beside it.
        below: Glob pattern of the directories below.
        holds: Whether a directory holds such files.
    """
    if holds(path):
        return path
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = path / read_text(path / pointer).strip()
        if named.parent == path and holds(named):
            return named
    found = [directory for directory in sorted(path.glob(below)) if holds(directory)]
    return found[0] if len(found) == 1 else None

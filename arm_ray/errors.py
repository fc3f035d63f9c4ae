"""What can go wrong, as one hierarchy.

::

    ArmRayError
    ├── ConfigError          a key, type, value or combination in the configuration
    ├── CheckpointError      a checkpoint cannot be used
    │   ├── NotACheckpointError    the path holds no model
    │   ├── CorruptCheckpointError a file is truncated, padded, or holds NaN or infinity
    │   ├── PickleRefusedError     the weights are pickles
    │   └── MismatchError          two checkpoints do not have the same tensors
    ├── CalibrationError     the calibration data cannot be used
    ├── RunDirectoryError    the output directory holds something else, or another config
    ├── DiskSpaceError       not enough room for what the run writes
    ├── StorageError         a URL cannot be read or written
    │   ├── NoSuchObjectError      there is no such bucket or object
    │   └── StorageAccessError     credentials are missing, or do not allow it
    ├── NumericalError       activations or merged weights are not finite
    ├── PlacementError       the cluster cannot hold what was asked
    ├── TransportError       hidden states did not reach the next layer shard
    ├── EvaluationError      a benchmark, its data or an engine cannot be used
    │   └── SandboxError           model-written code cannot be isolated here
    └── WorkerError          an actor was lost, or failed in a way that is not the input's fault
        ├── ShardLostError         a layer shard or its node was lost, and can be replaced
        └── EvaluatorLostError     an engine or a grader was lost, and can be replaced

Every error says what went wrong, where, what was found, what was expected and what to do.
They survive pickling, because Ray carries them from actors to the driver.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any, ClassVar

from arm_ray.secrets import shortened

# Of a row of a message: a name or value that is longer is cut.
_LONGEST_ROW = 4000


class ArmRayError(Exception):
    """Base of all errors that arm_ray raises on purpose.

    Args:
        what: One sentence: what went wrong, naming the thing it went wrong with.
        where: File, tensor, key or row.
        got: What was found.
        expected: What would have been right.
        hint: What to do about it.
        subject: Which of several checkpoints or states it is about: `base`, `candidate-1`.
    """

    # What there is to do about any error of the kind, for those that say nothing else.
    advice: ClassVar[str | None] = None

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
        subject: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        self.subject = subject
        super().__init__(self._text())

    def of(self, label: str, subject: str | None = None) -> ArmRayError:
        """The same error, saying which of several things it is about; the label is its subject."""
        return type(self)(
            f"{label}: {self.what}",
            where=self.where,
            got=self.got,
            expected=self.expected,
            hint=self.hint,
            subject=subject or label,
        )

    def at(self, where: object) -> ArmRayError:
        """The same error, saying where, unless it does."""
        place = str(where) if self.where is None else self.where
        fields = (self.what, place, self.got, self.expected, self.hint, self.subject)
        return _rebuild(type(self), fields)

    def _text(self) -> str:
        lines = [self.what]
        rows = (("where", self.where), ("got", self.got), ("expected", self.expected))
        lines += [
            f"  {label + ':':<10}{shortened(text, _LONGEST_ROW)}"
            for label, text in rows
            if text is not None
        ]
        hint = self.advice if self.hint is None and self.expected is None else self.hint
        if hint is not None:
            lines.append(f"  {'to do:':<10}{hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.what, self.where, self.got, self.expected, self.hint, self.subject)
        return _rebuild, (type(self), fields)


def _rebuild(cls: type[ArmRayError], fields: tuple[Any, ...]) -> ArmRayError:
    what, where, got, expected, hint, subject = fields
    return cls(what, where=where, got=got, expected=expected, hint=hint, subject=subject)


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Say of errors within the context which checkpoint or state they are about.

    Args:
        subject: See `ArmRayError`; an error that names one already keeps it.
    """
    try:
        yield
    except ArmRayError as error:
        error.subject = error.subject or subject
        raise


class ConfigError(ArmRayError):
    """A key, type, value or combination in the configuration is wrong."""

    advice = "correct the configuration; nothing was started"


class CheckpointError(ArmRayError):
    """A checkpoint cannot be used."""


class NotACheckpointError(CheckpointError):
    """The path is missing, unreadable, or holds no model."""

    advice = "name the directory of a checkpoint"


class CorruptCheckpointError(CheckpointError):
    """A weight file is truncated or padded, or a weight is NaN or infinite."""

    advice = "copy or save the checkpoint again; if a run is still writing it, wait"


class PickleRefusedError(CheckpointError):
    """The weights are pickles, which could run code when they are read."""


class MismatchError(CheckpointError):
    """Two checkpoints differ in architecture, shape or set of tensors."""

    advice = "name checkpoints of one model"


class CalibrationError(ArmRayError):
    """The calibration data is missing, empty or malformed."""

    advice = "correct the data, or name others"


class RunDirectoryError(ArmRayError):
    """The output directory holds something else, or a run with another configuration."""

    advice = "choose another output; nothing there was touched"


class DiskSpaceError(ArmRayError):
    """There is not enough room for what the run writes."""


class StorageError(ArmRayError):
    """A URL cannot be read or written."""

    advice = "check the URL"


class NoSuchObjectError(StorageError):
    """There is no such bucket or object."""


class StorageAccessError(StorageError):
    """Credentials are missing, or do not allow what was asked."""


class NumericalError(ArmRayError):
    """Activations or merged weights are NaN or infinite."""


class PlacementError(ArmRayError):
    """The cluster cannot hold what was asked of it."""


class TransportError(ArmRayError):
    """Hidden states did not reach the next layer shard."""


class WorkerError(ArmRayError):
    """An actor was lost, or failed in a way that is not the input's fault."""


class ShardLostError(WorkerError):
    """A layer shard, its node, or hidden states on it were lost; others can take its place."""


class EvaluatorLostError(WorkerError):
    """An engine or a grader was lost, or its node; another one can take its place."""


class EvaluationError(ArmRayError):
    """A benchmark, its data, or a model's engine cannot be used."""

    advice = "correct the data or the task"


class SandboxError(EvaluationError):
    """Model-written code cannot be isolated on this machine."""


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room, on the disk or in a quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)

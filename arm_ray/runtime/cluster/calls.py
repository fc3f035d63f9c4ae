"""Calls to actors, and what becomes of their errors: the one place that knows Ray's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from arm_ray.errors import (
    ArmRayError,
    DiskSpaceError,
    EvaluatorLostError,
    ShardLostError,
    TransportError,
    WorkerError,
    is_disk_full,
)
from arm_ray.runtime.cluster.actors import LocalResult
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.secrets import hidden, shortened

if TYPE_CHECKING:
    from ray import ObjectRef


# Names of what Ray raises for a call to a process or a node that is gone, or for an object that
# went with it. Its memory monitor's (OutOfMemoryError) is no RayActorError.
LOST = (
    "RayActorError",
    "OutOfMemoryError",
    "NodeDiedError",
    "LocalRayletDiedError",
    "ObjectLostError",
    "WorkerCrashedError",
    "ActorUnschedulableError",
    "ActorPlacementGroupRemoved",
    "TaskUnschedulableError",
    "TaskPlacementGroupRemoved",
)
# What it raises for a tensor that did not arrive.
_NOT_DELIVERED = ("RayDirectTransportError", "RayChannelError")
# What it raises where neither the object store nor the disk below it has room.
_FULL = ("ObjectStoreFullError", "OutOfDiskError")
_R = TypeVar("_R")
_POLL_S = 0.5
_FRAME = re.compile(r'File "([^"]+)", (line \d+, in \S+)')
_NODE = re.compile(r"\(pid=\d+, ip=([^,)]+)")


def exceptions(names: Sequence[str]) -> tuple[type[Exception], ...]:
    """Ray's exceptions of these names; older releases lack some."""
    known = ray.exceptions
    return tuple(getattr(known, name) for name in names if hasattr(known, name))


@dataclass(frozen=True)
class Callee:
    """Who was called, for the errors.

    Attributes:
        name: In words: "a layer shard".
        lost: What is raised where it is gone.
        memory_hint: What to do if it ran out of memory.
        sends_tensors: Whether calls wait for tensors of others of its kind.
        counts_room: Whether it writes what a run counts the room for, where the disk is full.
    """

    name: str
    lost: type[WorkerError]
    memory_hint: str
    sends_tensors: bool = False
    counts_room: bool = False


SHARD = Callee(
    "a layer shard",
    ShardLostError,
    "use more runtime.layer_shards or nodes, or another runtime.residency (`arm-ray plan` tells "
    "what fits); run the same command again to go on after the last complete iteration",
    sends_tensors=True,
    counts_room=True,
)
NODE_FILES = Callee(
    "what serves a node's files",
    ShardLostError,
    "give its node more; run the same command again to go on after the last complete iteration",
    counts_room=True,
)
EVALUATOR = Callee(
    "an evaluator",
    EvaluatorLostError,
    "lower evaluation.engine.kv_cache_gb or max_num_seqs",
)

DRIVER = Callee("the driver", WorkerError, "give it more")


def get_results(
    refs: Sequence[ObjectRef[_R]], callee: Callee = SHARD, timeout_s: float | None = None
) -> list[_R]:
    """`ray.get`, with arm_ray's own errors as they were raised, and own ones for all of Ray's.

    Args:
        refs: What calls to actors returned.
        callee: Who was called.
        timeout_s: Longest time to wait; None: for ever.

    Raises:
        ArmRayError: As an actor raised it.
        OSError: The disk is full, of a callee whose run counts the room.
        DiskSpaceError: The disk of another callee is full.
        TransportError: A tensor was not delivered.
        WorkerError: Of the kind `callee.lost`, an actor was lost, or what it held; otherwise, one
            failed unexpectedly, or gave no answer in time.
    """
    if not refs:
        # Where there is no Ray, `ray.get` of nothing would join one, or start it.
        return []
    if isinstance(refs[0], LocalResult):
        return [_local(ref, callee) for ref in refs]
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except ray.exceptions.RayTaskError as error:
        # First: it is raised in the class of its cause too, which says something of another call.
        raise _of_task(error, callee) from error
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerError(
            f"{callee.name} gave no answer in time",
            got=None if timeout_s is None else f"nothing within {timeout_s:g} s",
            hint="raise the key timeout_s of its section, or look at Ray's logs of the actor",
        ) from error
    except ray.exceptions.RayError as error:
        raise _of_ray(error, callee) from error


def put(value: _R) -> ObjectRef[_R]:
    """`ray.put`, with arm_ray's own errors.

    Raises:
        DiskSpaceError: Neither the object store nor the disk below it has room.
        WorkerError: It failed in another way.
    """
    try:
        return ray.put(value)
    except ray.exceptions.RayError as error:
        raise _of_ray(error, DRIVER) from error


def wait_for(
    refs: Iterable[ObjectRef[Any]], timeout_s: float | None = None, *, all_of_them: bool = False
) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
    """`ray.wait`: wait for one call, or for all of them, whatever becomes of it.

    Args:
        refs: What calls to actors returned.
        timeout_s: Longest time to wait; None: for ever.
        all_of_them: Whether all are waited for, not only one.

    Returns:
        Those that have ended, and the others.
    """
    refs = list(refs)
    if not refs:
        return [], []
    if not isinstance(refs[0], LocalResult):
        count = len(refs) if all_of_them else 1
        return ray.wait(refs, num_returns=count, timeout=timeout_s)
    local: list[Any] = refs
    until = futures.ALL_COMPLETED if all_of_them else futures.FIRST_COMPLETED
    futures.wait([ref.running for ref in local], timeout_s, until)
    over = [ref.running.done() for ref in local]
    return (
        [ref for ref, is_over in zip(refs, over, strict=True) if is_over],
        [ref for ref, is_over in zip(refs, over, strict=True) if not is_over],
    )


class Calls:
    """Waits for what calls return, and can be interrupted; a test may bring its own.

    Args:
        check: Called while it waits; raises what ends the waiting.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check

    def done(self, refs: Sequence[ObjectRef[Any]]) -> list[ObjectRef[Any]]:
        """Those that have ended, after a moment at most; one at a time."""
        self.check()
        return wait_for(refs, _POLL_S)[0]

    def get(self, ref: ObjectRef[_R], callee: Callee) -> _R:
        """What a call returned; see `get_results`."""
        return get_results([ref], callee)[0]

    def answer(self, ref: ObjectRef[_R], callee: Callee, limit_s: float, key: str) -> _R:
        """Wait for what a call returns.

        Args:
            ref: The call.
            callee: Who was called.
            limit_s: Longest time to wait.
            key: The setting that says so, for the error.

        Raises:
            WorkerError: It gave no answer in time.
        """
        end = time.monotonic() + limit_s
        while not self.done([ref]):
            if time.monotonic() > end:
                raise silent(callee.name, limit_s, key)
        return self.get(ref, callee)


def silent(who: str, limit_s: float, key: str) -> WorkerError:
    """The error for an actor that gives no answer.

    Args:
        who: In words: "an evaluator".
        limit_s: How long it was waited for.
        key: The setting that says so.
    """
    return WorkerError(
        f"{who} gave no answer in time",
        got=f"nothing within {limit_s:g} s",
        hint=f"raise {key}, or ask for less at once (evaluation.engine.chunk_size)",
    )


def _of_task(error: ray.exceptions.RayTaskError, callee: Callee) -> Exception:
    """What to raise for an exception within a call."""
    cause: Any = error.cause
    while isinstance(cause, ray.exceptions.RayTaskError):
        # What the call was given is what another one raised.
        cause = cause.cause
    if callee.sends_tensors and isinstance(cause, TimeoutError):
        return _not_delivered(cause)
    if isinstance(cause, ray.exceptions.RayError):
        # What the call was given was on another actor, or its node.
        return _of_ray(cause, callee, _place(error))
    return _of_cause(cause or error, callee, _place(error))


def _local(ref: Any, callee: Callee) -> Any:
    error = ref.running.exception()
    if error is not None:
        raise _of_cause(error, callee, None) from error
    return ref.running.result()


def _of_cause(cause: BaseException, callee: Callee, place: str | None) -> Exception:
    """What to raise for what a call itself raised."""
    if isinstance(cause, ArmRayError):
        return cause
    if isinstance(cause, OSError) and is_disk_full(cause):
        if callee.counts_room:
            return cause
        return DiskSpaceError(
            f"{callee.name} has no room on its disk",
            got=cause,
            hint="free some; run the same command again to go on",
        )
    if isinstance(cause, OSError):
        return WorkerError(
            f"{callee.name} cannot read or write a file",
            got=cause,
            hint="check the disk; run the same command again to go on",
        )
    if _is_out_of_memory(cause):
        return WorkerError(
            f"{callee.name} ran out of memory",
            where=place,
            got=f"{type(cause).__name__}: {_short(cause)}",
            hint=callee.memory_hint,
        )
    return _unexpected(cause, callee, place)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, for a GPU or the host, or Python could not have what they asked for."""
    # torch, which is not imported here, has a class for GPUs and a text for the host.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


def _of_ray(error: Exception, callee: Callee, place: str | None = None) -> Exception:
    """What to raise for an exception of Ray's own."""
    # Nobody else kills actors: Ray ends both sides of a transfer that failed.
    is_killed = isinstance(error, ray.exceptions.RayActorError) and "ray.kill" in str(error)
    if callee.sends_tensors and (is_killed or isinstance(error, exceptions(_NOT_DELIVERED))):
        return _not_delivered(error)
    if isinstance(error, exceptions(_FULL)):
        return DiskSpaceError(
            f"Ray's object store is full, and the disk that it spills to: {callee.name} cannot "
            "pass anything on",
            where=place,
            got=_short(error),
            hint="free some of the disk below Ray's directory (/tmp/ray), end what holds objects "
            "(`ray memory` lists them), or start Ray with a larger --object-store-memory; run the "
            "same command again to go on",
        )
    # One that cannot be made would fail in another place as well.
    is_unmade = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
    if isinstance(error, exceptions(LOST)) and not is_unmade:
        return callee.lost(
            f"{callee.name} was lost",
            got=_short(error),
            hint=f"if it ran out of memory, {callee.memory_hint}",
        )
    return _unexpected(error, callee, place)


def _unexpected(error: BaseException, callee: Callee, place: str | None) -> WorkerError:
    return WorkerError(
        f"{callee.name} failed unexpectedly",
        where=place,
        got=f"{type(error).__name__}: {_short(error)}",
        hint="run the same command again to go on; Ray's logs of the actor say more",
    )


def _place(error: ray.exceptions.RayTaskError) -> str | None:
    """The line of code that failed, and its node's address; None where Ray does not tell."""
    # Of an error in the class of its cause Ray keeps the text alone.
    text = str(error)
    frames, node = _FRAME.findall(text), _NODE.search(text)
    if not frames:
        return None
    file, line = frames[-1]
    return f"{file}, {line}" + (f", on {node[1]}" if node else "")


def _not_delivered(error: BaseException) -> TransportError:
    return TransportError(
        "hidden states did not reach the next layer shard",
        got=_short(error),
        hint="set runtime.transport to object_store and run the same command again to go on",
    )


def _short(error: BaseException) -> str:
    """An error's text in a line, without the middle of a long one: a traceback's end says most."""
    return shortened(" ".join(hidden(str(error)).split()), 500)

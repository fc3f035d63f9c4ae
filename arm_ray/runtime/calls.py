"""Calls to actors, and what becomes of their errors: the one place that knows Ray's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions

from arm_ray.errors import (
    ArmRayError,
    ShardLostError,
    TransportError,
    WorkerError,
    is_disk_full,
)


def _kinds(*names: str) -> tuple[type[Exception], ...]:
    """Ray's exceptions of these names; older releases lack some."""
    return tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))


# What Ray raises for a call to a process or a node that is gone, or for an object that went with
# it. Its memory monitor's (OutOfMemoryError) is no RayActorError.
LOST = _kinds(
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
_NOT_DELIVERED = _kinds("RayDirectTransportError", "RayChannelError")


@dataclass(frozen=True)
class Callee:
    """Who was called, for the errors.

    Attributes:
        name: In words: "a layer shard".
        lost: What is raised where it is gone.
        memory_hint: What to do if it ran out of memory.
        sends_tensors: Whether calls wait for tensors of others of its kind.
    """

    name: str
    lost: type[WorkerError]
    memory_hint: str
    sends_tensors: bool = False


SHARD = Callee(
    "a layer shard",
    ShardLostError,
    "use more runtime.layer_shards or nodes; run the same command again to go on after the last "
    "complete iteration",
    sends_tensors=True,
)
EVALUATOR = Callee(
    "an evaluator",
    WorkerError,
    "lower evaluation.engine.kv_cache_gb or max_num_seqs",
)


def get_results(
    refs: Sequence[Any], callee: Callee = SHARD, timeout_s: float | None = None
) -> list[Any]:
    """`ray.get`, with arm_ray's own errors as they were raised, and own ones for all of Ray's.

    Args:
        refs: What calls to actors returned.
        callee: Who was called.
        timeout_s: Longest time to wait; None: for ever.

    Raises:
        ArmRayError: As an actor raised it.
        OSError: The disk is full.
        TransportError: A tensor was not delivered.
        WorkerError: Of the kind `callee.lost`, an actor was lost, or what it held; otherwise, one
            failed unexpectedly, or gave no answer in time.
    """
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except exceptions.GetTimeoutError:
        # It is a TimeoutError as well, which from an actor means something else.
        raise WorkerError(
            f"{callee.name} gave no answer in time",
            got=f"nothing within {timeout_s:g} s",
            hint="raise the key timeout_s of its section, or look at Ray's logs of the actor",
        ) from None
    except exceptions.RayTaskError as error:
        raise _of_task(error, error.cause, callee) from error
    except exceptions.RayError as error:
        raise _of_ray(error, callee) from error


def _of_task(error: Exception, cause: Any, callee: Callee) -> Exception:
    """What to raise for an exception within a call."""
    if isinstance(cause, ArmRayError):
        return cause
    if callee.sends_tensors and isinstance(cause, TimeoutError):
        return _not_delivered(cause)
    if isinstance(cause, exceptions.RayError) and not isinstance(cause, exceptions.RayTaskError):
        # What the call was given was on another actor, or its node.
        return _of_ray(cause, callee)
    if isinstance(cause, OSError):
        if is_disk_full(cause):
            return cause
        return WorkerError(
            f"{callee.name} cannot read or write a file",
            got=cause,
            hint="check the disk; run the same command again to go on",
        )
    return _unexpected(cause or error, callee)


def _of_ray(error: Exception, callee: Callee) -> Exception:
    """What to raise for an exception of Ray's own."""
    # Nobody else kills actors: Ray ends both sides of a transfer that failed.
    is_killed = isinstance(error, exceptions.RayActorError) and "ray.kill" in str(error)
    if callee.sends_tensors and (is_killed or isinstance(error, _NOT_DELIVERED)):
        return _not_delivered(error)
    if isinstance(error, LOST):
        return callee.lost(
            f"{callee.name} was lost",
            got=_short(error),
            hint=f"if it ran out of memory, {callee.memory_hint}",
        )
    return _unexpected(error, callee)


def _unexpected(error: BaseException, callee: Callee) -> WorkerError:
    return WorkerError(
        f"{callee.name} failed unexpectedly",
        got=f"{type(error).__name__}: {_short(error)}",
        hint="run the same command again to go on; Ray's logs of the actor say more",
    )


def _not_delivered(error: BaseException) -> TransportError:
    return TransportError(
        "hidden states did not reach the next layer shard",
        got=_short(error, 300),
        hint="set runtime.transport to object_store and run the same command again to go on",
    )


def _short(error: BaseException, length: int = 500) -> str:
    return " ".join(str(error).split())[:length]

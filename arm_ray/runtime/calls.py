"""Calls to the layer shards' actors, and what becomes of their errors."""

from __future__ import annotations

from typing import Any

import ray

from arm_ray.errors import (
    ArmRayError,
    ShardLostError,
    TransportError,
    WorkerError,
    is_disk_full,
)

_LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)


def get_results(refs: list[Any]) -> list[Any]:
    """`ray.get`, with arm_ray's own errors as they were raised, and a plain one for lost actors.

    Raises:
        ArmRayError: As an actor raised it.
        OSError: The disk is full.
        TransportError: A tensor was not delivered.
        ShardLostError: An actor was lost, or what it held.
        WorkerError: An actor failed unexpectedly.
    """
    try:
        return list(ray.get(refs))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ArmRayError):
            raise error.cause from None
        if isinstance(error.cause, TimeoutError):
            raise _not_delivered(error.cause) from None
        if isinstance(error.cause, _LOST):
            # What a call was given was on another actor, or its node.
            raise _lost(error.cause) from None
        if isinstance(error.cause, OSError):
            if is_disk_full(error.cause):
                raise error.cause from None
            raise WorkerError(
                "a layer shard cannot read or write a file",
                got=error.cause,
                hint="check the disk; run the same command again to go on",
            ) from error
        raise
    except ray.exceptions.RayActorError as error:
        if "ray.kill" in str(error):
            # Nobody else does that: Ray ends both sides of a transfer that failed.
            raise _not_delivered(error) from None
        raise _lost(error) from None
    except ray.exceptions.ObjectLostError as error:
        raise _lost(error) from None


def _lost(error: Exception) -> ShardLostError:
    return ShardLostError(
        "a layer shard was lost",
        got=" ".join(str(error).split())[:500],
        hint="if it ran out of memory, use more runtime.layer_shards or nodes; "
        "run the same command again to go on after the last complete iteration",
    )


def _not_delivered(error: Exception) -> TransportError:
    return TransportError(
        "hidden states did not reach the next layer shard",
        got=" ".join(str(error).split())[:300],
        hint="set runtime.transport to object_store and run the same command again to go on",
    )

"""Whatever Ray raises for a call comes to the user as one of our own errors."""

from __future__ import annotations

import errno
import inspect
from typing import Any

import pytest
import ray
from ray import exceptions

from arm_ray.errors import (
    ArmRayError,
    ConfigError,
    ShardLostError,
    TransportError,
    WorkerError,
)
from arm_ray.runtime.calls import EVALUATOR, LOST, SHARD, Callee, get_results

# All that there are, so that one of a later Ray is looked at.
ALL = [
    kind
    for _, kind in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(kind, exceptions.RayError)
]
GONE = {
    "RayActorError", "ActorDiedError", "ActorUnavailableError", "OutOfMemoryError",
    "NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "ObjectFetchTimedOutError",
    "ObjectFreedError", "ObjectReconstructionFailedError", "OwnerDiedError",
    "ReferenceCountingAssertionError", "WorkerCrashedError", "ActorUnschedulableError",
    "ActorPlacementGroupRemoved", "TaskUnschedulableError", "TaskPlacementGroupRemoved",
}  # fmt: skip
UNDELIVERED = {
    "RayDirectTransportError",
    "RayChannelError",
    "RayChannelTimeoutError",
}


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `get_results` makes of an exception that `ray.get` raises."""

    def outcome(error: Exception, callee: Callee = SHARD) -> Exception:
        def get(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises((ArmRayError, OSError)) as caught:
            get_results([object()], callee, 3.0)
        return caught.value

    return outcome


def of_task(cause: BaseException) -> Exception:
    return exceptions.RayTaskError("forward", "the worker's traceback", cause)


def test_there_are_exceptions_to_look_at() -> None:
    assert {kind.__name__ for kind in ALL} >= GONE | UNDELIVERED
    assert exceptions.OutOfMemoryError in LOST


@pytest.mark.parametrize("kind", [k for k in ALL if k is not exceptions.RayTaskError])
@pytest.mark.parametrize("within", [False, True], ids=["of the call", "of what it was given"])
def test_every_exception_of_ray_becomes_ours(
    raised: Any, kind: type[Exception], within: bool
) -> None:
    error = instance(kind)
    found = raised(of_task(error) if within else error)
    name = kind.__name__
    if name in GONE:
        assert type(found) is ShardLostError
    elif name in UNDELIVERED or (within and issubclass(kind, TimeoutError)):
        assert type(found) is TransportError
    else:
        assert type(found) is WorkerError
        assert "failed unexpectedly" in str(found) or "no answer in time" in str(found)
    assert found.__cause__ is not None or "no answer" in str(found)


def instance(kind: type[Exception], text: str = "as Ray says it") -> Exception:
    """Of a subclass that is made without arguments, because those of Ray's kinds are its affair."""
    own = {"__init__": lambda _self: None, "__str__": lambda _self: text}
    made: Exception = type(kind.__name__, (kind,), own)()
    return made


def test_a_killed_actor_is_a_transfer_that_failed_for_shards_alone(raised: Any) -> None:
    error = instance(exceptions.ActorDiedError, "killed by ray.kill")
    assert type(raised(error)) is TransportError
    assert type(raised(error, EVALUATOR)) is WorkerError
    assert "an evaluator was lost" in str(raised(error, EVALUATOR))


def test_what_an_actor_raises_itself(raised: Any) -> None:
    ours = ConfigError("a key is wrong")
    assert raised(of_task(ours)) is ours
    full = OSError(errno.ENOSPC, "No space left on device")
    assert raised(of_task(full)) is full
    broken = raised(of_task(OSError(errno.EIO, "Input/output error")))
    assert type(broken) is WorkerError
    assert "cannot read or write a file" in str(broken)
    assert type(raised(of_task(TimeoutError("no message came")))) is TransportError
    late = raised(of_task(TimeoutError("no message came")), EVALUATOR)
    assert type(late) is WorkerError
    bug = raised(of_task(ZeroDivisionError("division by zero")))
    assert type(bug) is WorkerError
    assert "ZeroDivisionError: division by zero" in str(bug)
    assert isinstance(bug.__cause__, exceptions.RayTaskError)


def test_no_answer_in_time_says_how_long(raised: Any) -> None:
    found = raised(exceptions.GetTimeoutError("timed out"), EVALUATOR)
    assert "an evaluator gave no answer in time" in str(found)
    assert "nothing within 3 s" in str(found)

"""Whatever Ray raises for a call comes to the user as one of our own errors."""

from __future__ import annotations

import errno
import inspect
from typing import Any

import pytest
import ray
import torch
from ray import exceptions

from arm_ray.errors import (
    ArmRayError,
    ConfigError,
    DiskSpaceError,
    EvaluatorLostError,
    ShardLostError,
    TransportError,
    WorkerError,
)
from arm_ray.runtime.cluster.calls import (
    EVALUATOR,
    LOST,
    NODE_FILES,
    SHARD,
    Callee,
    get_results,
    put,
)
from tests.builders.ray_errors import instance

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
FULL = {"ObjectStoreFullError", "OutOfDiskError"}
UNDELIVERED = {
    "RayDirectTransportError",
    "RayChannelError",
    "RayChannelTimeoutError",
}


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `get_results` makes of an exception that `ray.get` raises."""

    def outcome(
        error: Exception, callee: Callee = SHARD, timeout_s: float | None = None
    ) -> Exception:
        def get(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises((ArmRayError, OSError)) as caught:
            get_results([object()], callee, timeout_s)
        return caught.value

    return outcome


TRACE = """Traceback (most recent call last):
  File "/x/layer_shard.py", line 7, in forward
    run()
Error: what it says"""


def of_task(cause: BaseException) -> Exception:
    """As `ray.get` raises it: in the class of its cause too, where Ray can make such a one."""
    error = exceptions.RayTaskError("forward", TRACE, cause, "shard", 1, "10.0.0.1")
    raised: Exception = error.as_instanceof_cause()
    return raised


def test_there_are_exceptions_to_look_at() -> None:
    assert {kind.__name__ for kind in ALL} >= GONE | UNDELIVERED | FULL
    assert "OutOfMemoryError" in LOST


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
    elif name in FULL:
        assert type(found) is DiskSpaceError
        assert "object-store-memory" in str(found)
    else:
        assert type(found) is WorkerError
        assert "failed unexpectedly" in str(found) or "no answer in time" in str(found)
    assert found.__cause__ is not None or "no answer" in str(found)


def test_a_killed_actor_is_a_transfer_that_failed_for_shards_alone(raised: Any) -> None:
    error = instance(exceptions.ActorDiedError, "killed by ray.kill")
    assert type(raised(error)) is TransportError
    assert type(raised(error, EVALUATOR)) is EvaluatorLostError
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
    found = raised(exceptions.GetTimeoutError("timed out"), EVALUATOR, 3.0)
    assert "an evaluator gave no answer in time" in str(found)
    assert "nothing within 3 s" in str(found)
    # One that an actor met in waiting for another is no silence of its own.
    within = raised(of_task(exceptions.GetTimeoutError("timed out")), EVALUATOR, 3.0)
    assert "an evaluator failed unexpectedly" in str(within)


def test_a_bug_is_told_with_its_place(raised: Any) -> None:
    found = raised(of_task(ZeroDivisionError("division by zero")))
    assert found.where == "/x/layer_shard.py, line 7, in forward, on 10.0.0.1"


def test_the_end_of_a_long_text_is_told(raised: Any) -> None:
    found = raised(of_task(ValueError("begins " + "x" * 1000 + " and ends")))
    assert "ValueError: begins" in found.got
    assert found.got.endswith("and ends")


def test_an_actor_that_cannot_be_made_is_no_lost_one(raised: Any) -> None:
    """In another place it would fail as well."""
    init = exceptions.RayTaskError("__init__", TRACE, ImportError("no such module"))
    for callee in (SHARD, EVALUATOR):
        found = raised(exceptions.ActorDiedError(init), callee)
        assert type(found) is WorkerError
        assert "failed unexpectedly" in found.what
        assert found.got.endswith("Error: what it says")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("Unable to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"),
    ],
)
def test_memory_that_is_not_there_is_told_with_what_to_do(raised: Any, error: Exception) -> None:
    found = raised(of_task(error))
    assert type(found) is WorkerError
    assert found.what == "a layer shard ran out of memory"
    assert str(error) in found.got
    assert "runtime.residency" in found.hint
    assert "kv_cache_gb" in raised(of_task(error), EVALUATOR).hint


def test_what_a_call_was_given_failed_before(raised: Any) -> None:
    ours = ConfigError("a key is wrong")
    assert raised(of_task(of_task(ours))) is ours


def test_node_files_are_lost_like_shards_but_send_no_tensors(raised: Any) -> None:
    assert type(raised(instance(exceptions.ActorUnschedulableError), NODE_FILES)) is ShardLostError
    late = raised(of_task(TimeoutError(errno.ETIMEDOUT, "of a network disk")), NODE_FILES)
    assert type(late) is WorkerError


def test_a_full_disk_is_counted_by_the_run_that_filled_it(raised: Any) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for callee in (SHARD, NODE_FILES):
        assert raised(of_task(full), callee) is full
    assert type(raised(of_task(full), EVALUATOR)) is DiskSpaceError


def test_a_full_object_store_is_told_of_by_who_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_value: object) -> None:
        raise instance(exceptions.ObjectStoreFullError, "no room")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(DiskSpaceError, match=r"the driver cannot pass anything on(?s:.*)no room"):
        put(1)

"""Typed handles of actors: the only place that says `.remote`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from arm_ray.runtime.cluster.nodes import this_node
from arm_ray.runtime.session.lazy_ray import ray

if TYPE_CHECKING:
    from ray import ObjectRef

A = TypeVar("A")
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True)
class Handle(Generic[A]):
    """An actor of class `A`, called by the methods of that class, whose types mypy checks.

    `handle.call(LayerShard.check_weights)` is a reference to what `check_weights` returns. Another
    class may stand for `A`, as long as its methods have the same names.

    Attributes:
        actor: Ray's own handle.
    """

    actor: Any

    def call(
        self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> ObjectRef[R]:
        """Submit a call; returns at once."""
        remote = getattr(self.actor, method.__name__)
        return cast("ObjectRef[R]", remote.remote(*args, **kwargs))

    def call_with(
        self,
        options: Mapping[str, Any],
        method: Callable[Concatenate[A, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ObjectRef[R]:
        """The same with options of the call, such as `concurrency_group`."""
        remote = getattr(self.actor, method.__name__).options(**options)
        return cast("ObjectRef[R]", remote.remote(*args, **kwargs))

    def node(self) -> ObjectRef[str]:
        """Ray's id of the node that the actor is on."""
        return cast("ObjectRef[str]", self.actor.__ray_call__.remote(lambda _: this_node()))

    def end(self) -> None:
        """Kill the actor; one that is gone is none the worse for it."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)


class LocalResult(Generic[R]):
    """Stands for the reference to what a call in this process returns; see `LocalHandle`.

    Attributes:
        running: The call, which may be over.
    """

    def __init__(self, future: Future[R]) -> None:
        self.running = future


def local_result(value: R) -> ObjectRef[R]:
    """What `ray.put` is to calls of actors, to those of a `LocalHandle`."""
    future: Future[R] = Future()
    future.set_result(value)
    return cast("ObjectRef[R]", LocalResult(future))


@dataclass(frozen=True)
class LocalHandle(Handle[A]):
    """The handle of an object in this process, called as if it were an actor.

    Its calls are made in the order of submission by a thread of its own; those of each
    `concurrency_group` by another. A call that is given what another one returns waits for that.
    `calls` takes what they return, which are no references of Ray's.

    Attributes:
        begin: What each thread does first.
    """

    begin: Callable[[], None] = lambda: None
    _threads: dict[str, ThreadPoolExecutor] = field(default_factory=dict, compare=False)

    def call(
        self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> ObjectRef[R]:
        """Submit a call; returns at once."""
        return self.call_with({}, method, *args, **kwargs)

    def call_with(
        self,
        options: Mapping[str, Any],
        method: Callable[Concatenate[A, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ObjectRef[R]:
        """The same; of the options, only `concurrency_group` counts."""
        group = options.get("concurrency_group", "calls")
        if group not in self._threads:
            self._threads[group] = ThreadPoolExecutor(1, group, self.begin)
        own = getattr(self.actor, method.__name__)
        future = self._threads[group].submit(_call, own, args, kwargs)
        return cast("ObjectRef[R]", LocalResult(future))

    def end(self) -> None:
        """Wait for the calls that are being made; those that wait their turn are dropped."""
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)


def _call(own: Callable[..., R], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R:
    given = (arg.running.result() if isinstance(arg, LocalResult) else arg for arg in args)
    return own(*given, **kwargs)


def start_actor(
    options: Mapping[str, Any], kind: Callable[P, A], *args: P.args, **kwargs: P.kwargs
) -> Handle[A]:
    """Start an actor.

    Args:
        options: Of `ray.remote`: resources, scheduling strategy, environment.
        kind: Its class.
        args: What the class is made with.
        kwargs: The same, by name.
    """
    actor_class: Any = ray.remote(**options)(kind)
    return Handle(actor_class.remote(*args, **kwargs))


def run_on(node: str, function: Callable[[], R]) -> ObjectRef[R]:
    """Run a function on a node, or on another one if that is gone; returns at once."""
    where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": where}
    remote: Any = ray.remote(**options)(function)
    return cast("ObjectRef[R]", remote.remote())


def in_place_of(ref: ObjectRef[R] | None) -> R:
    """A reference as an argument of a call, which Ray gives the call as what it refers to."""
    return cast("R", ref)

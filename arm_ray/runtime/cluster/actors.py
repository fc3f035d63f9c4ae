"""Typed handles of actors: the only place that says `.remote`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import ray
from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arm_ray.runtime.cluster.nodes import this_node

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
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


class LocalResult(Generic[R]):
    """Stands for the reference to a call that was made in this process, and is over.

    Attributes:
        value: What it returned.
        error: What it raised; None: nothing.
    """

    def __init__(self, call: Callable[[], R]) -> None:
        self.error: Exception | None = None
        try:
            self.value = call()
        except Exception as error:  # raised by whoever waits for it, as from an actor
            self.error = error


class LocalHandle(Handle[A]):
    """The handle of an object in this process: its calls are over when they return.

    Only `get_results` takes what they return: it is no reference of Ray's.
    """

    def call(
        self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> ObjectRef[R]:
        """Make a call."""
        own: Callable[P, R] = getattr(self.actor, method.__name__)
        return cast("ObjectRef[R]", LocalResult(lambda: own(*args, **kwargs)))

    def call_with(
        self,
        options: Mapping[str, Any],  # noqa: ARG002 - of the class above
        method: Callable[Concatenate[A, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ObjectRef[R]:
        """The same: there is nothing that options could change."""
        return self.call(method, *args, **kwargs)

    def end(self) -> None:
        """Nothing to end."""


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
    where = NodeAffinitySchedulingStrategy(node, soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": where}
    remote: Any = ray.remote(**options)(function)
    return cast("ObjectRef[R]", remote.remote())


def in_place_of(ref: ObjectRef[R] | None) -> R:
    """A reference as an argument of a call, which Ray gives the call as what it refers to."""
    return cast("R", ref)

"""Layer shards, engines, graders and training workers in this process.

Starting an actor takes seconds, in which a test of what is computed learns nothing. Shards are
those of a merge without Ray (`placed_here`). Calls of engines and graders run at once, in the order
they are submitted, which is the order that an actor takes them in; what they return goes through
Ray's object store as it does from an actor.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import transformers

from arm_ray.config import RuntimeConfig
from arm_ray.evaluation.graders import Grader
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.runtime.cluster.actors import A, Handle
from arm_ray.runtime.scoring.evaluator import EngineActor, EvaluatorGang
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.shards import placement
from arm_ray.runtime.shards.placement import Placement, ShardGang
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.train.workers import run_worker
from tests.doubles.plain_engine import PlainEngineActor


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_options: Any) -> _Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        given = [ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in arguments]
        return ray.put(self._call(*given))


class Actor:
    """Stands for Ray's own handle of an actor."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._instance, name))


class LocalHandle(Handle[A]):
    """The handle of an instance in this process, with which it ends."""

    def end(self) -> None:
        """Nothing to end."""


@contextlib.contextmanager
def placed_shards(
    specs: Sequence[ShardSpec],
    _runtime: RuntimeConfig,
    _placement: Placement,
    _reporter: Reporter,
    _has_shrunk: Callable[[], bool] = lambda: False,
) -> Iterator[ShardGang]:
    """Stands for `arm_ray.runtime.shards.placement.placed_shards`."""
    home = str(ray.get_runtime_context().get_node_id())
    with placement.placed_here(specs) as gang:
        yield replace(gang, nodes=[home for _ in specs])


class PlainEvaluators(EvaluatorGang):
    """Plain engines and graders in this process, in the places of their actors."""

    _settings: EvaluationSettings

    def start_engine(self, index: int, model: str, tokenizer: str) -> Handle[EngineActor]:
        self._check_open()
        engine = LocalHandle[EngineActor](
            Actor(PlainEngineActor(model, tokenizer, self._settings.engine))
        )
        self._engines[index] = engine
        return engine

    def start_grader(self, index: int) -> Handle[Grader]:
        self._check_open()
        grader = LocalHandle[Grader](Actor(Grader(self._settings.grading)))
        self._graders[index] = grader
        return grader


def on_ray_train(
    settings: Mapping[str, Any], _workers: object, _max_failures: int
) -> Callable[[], None]:
    """Stands for `runtime.train.workers.on_ray_train`; what a worker changes is set back."""

    def work() -> None:
        environment, verbosity = dict(os.environ), transformers.logging.get_verbosity()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        try:
            with warnings.catch_warnings():
                # The trainers' own, which a worker prints to nobody.
                warnings.simplefilter("ignore")
                run_worker(settings)
        finally:
            os.environ.clear()
            os.environ |= environment
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()

    return work

"""The actors that score models: vLLM engines, and the CPU processes that grade what they say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from arm_ray.errors import EvaluatorLostError, PlacementError, WorkerError
from arm_ray.evaluation.engine import (
    ENVIRONMENT,
    Completion,
    Engine,
    LoadReport,
    ModelSource,
    Request,
)
from arm_ray.evaluation.graders import Grader
from arm_ray.evaluation.settings import EngineSettings, EvaluationSettings
from arm_ray.noise import quiet_environment, verbose_environment
from arm_ray.runtime.cluster.actors import Handle, start_actor
from arm_ray.runtime.cluster.calls import EVALUATOR, get_results
from arm_ray.runtime.cluster.nodes import format_resources, view_of_cluster
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes, ModelCopies
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.storage.mirror import present

if TYPE_CHECKING:
    from ray import ObjectRef

# How often an evaluator may be lost over the same work.
ATTEMPTS = 3
_POLL_S = 1.0
_R = TypeVar("_R")


@dataclass(frozen=True)
class EvaluatorResources:
    """What the evaluation reserves in the cluster."""

    engine: dict[str, float]
    replicas: int
    grader: dict[str, float]
    graders: int

    @property
    def total(self) -> dict[str, float]:
        """Everything together."""
        names = {*self.engine, *self.grader}
        return {
            name: self.engine.get(name, 0.0) * self.replicas
            + self.grader.get(name, 0.0) * self.graders
            for name in names
        }


def evaluator_resources(settings: EvaluationSettings, gpus_in_cluster: float) -> EvaluatorResources:
    """What the settings ask of a cluster with so many GPUs."""
    engine = settings.engine
    gpus = engine.gpus_per_engine
    if gpus == "auto":
        gpus = float(engine.tensor_parallel) if gpus_in_cluster else 0.0
    wanted = {"CPU": float(engine.cpus_per_engine), **engine.resources}
    if gpus:
        wanted["GPU"] = float(gpus)
    grader = {"CPU": 1.0, **settings.grading.resources}
    return EvaluatorResources(wanted, engine.replicas, grader, settings.grading.workers)


class EngineActor:
    """An engine in an actor. It starts in a call of its own, whose errors arrive as they are.

    Args:
        model: Directory that it is started with.
        tokenizer: Directory of the tokenizer.
        settings: Of the engine.
        copies: `ModelCopies` of its node; None where it sees the driver's files.
    """

    engine_class: ClassVar[type[Engine]] = Engine

    def __init__(
        self,
        model: str,
        tokenizer: str,
        settings: EngineSettings,
        copies: Handle[ModelCopies] | None = None,
    ) -> None:
        self._arguments = (model, tokenizer, settings)
        self._copies = copies
        self._engine: Engine | None = None

    def ready(self) -> float:
        """Start the engine, unless it runs; returns the seconds that it took."""
        return self._started.start_seconds

    def load(self, source: ModelSource, version: str) -> LoadReport:
        """See `Engine.load`. A model that is not on this node is copied first."""
        started = time.monotonic()
        for place in source.directories:
            # Of a model at a URL, what describes it is copied to this node.
            present(place)
        fetched_bytes = 0
        if self._copies is not None:
            [placed] = get_results([self._copies.call(ModelCopies.place, source)], EVALUATOR)
            source, fetched_bytes = placed.source, placed.fetched_bytes
        report = self._started.load(source, version)
        return replace(report, seconds=time.monotonic() - started, fetched_bytes=fetched_bytes)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`."""
        return self._started.generate(requests)

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        """See `Engine.log_likelihoods`."""
        return self._started.log_likelihoods(samples)

    @property
    def _started(self) -> Engine:
        if self._engine is None:
            model, tokenizer, settings = self._arguments
            present(model)
            present(tokenizer)
            if self._copies is not None:
                [placed] = get_results(
                    [self._copies.call(ModelCopies.describe, model, tokenizer)], EVALUATOR
                )
                model, tokenizer = placed.source.path, placed.tokenizer or tokenizer
            self._engine = self.engine_class(model, tokenizer, settings)
        return self._engine


class EvaluatorGang:
    """Engines and graders, placed; a lost one is replaced in its own place."""

    def __init__(
        self,
        settings: EvaluationSettings,
        resources: EvaluatorResources,
        group: Any,
        copies: CopiesOnNodes,
    ) -> None:
        self._settings, self._resources, self._group = settings, resources, group
        self._copies = copies
        self._engines: list[Handle[EngineActor] | None] = [None] * resources.replicas
        self._graders: list[Handle[Grader] | None] = [None] * resources.graders
        self._is_closed = False

    @property
    def engines(self) -> list[Handle[EngineActor]]:
        """The engines that are there, by place."""
        return [engine for engine in self._engines if engine is not None]

    @property
    def graders(self) -> list[Handle[Grader]]:
        """The graders that are there, by place."""
        return [grader for grader in self._graders if grader is not None]

    def start_engine(self, index: int, model: str, tokenizer: str) -> Handle[EngineActor]:
        """Place an engine, instead of the one that may be in this place; `ready` starts it."""
        self._check_open()
        self._end(self._engines[index])
        self._wait_for_places()
        node = ray.util.placement_group_table(self._group)["bundles_to_node_id"][index]
        threads = str(self._settings.engine.cpus_per_engine)
        env = {
            **ENVIRONMENT,
            **quiet_environment(),
            **verbose_environment(),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Several engines may share a machine: each finds its own free ports.
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if not self._resources.engine.get("GPU"):
            # Ray leaves a process that asked for no GPU all of them, the trainer's included.
            env |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        options = {
            **_options(self._resources.engine, self._group, index),
            "runtime_env": {"env_vars": env},
        }
        engine = start_actor(
            options, EngineActor, model, tokenizer, self._settings.engine, self._copies.on(node)
        )
        self._engines[index] = engine
        return engine

    def _wait_for_places(self) -> None:
        """Those that were lost with their node come up again on another one."""
        end = time.monotonic() + self._settings.engine.placement_timeout_s
        while not self._group.wait(_POLL_S):
            self._check_open()
            if time.monotonic() > end:
                error = _not_placed(self._settings, self._resources)
                raise WorkerError(
                    "an evaluator's node was lost, and there is no other room",
                    got=error.got,
                    expected=error.expected,
                    hint=error.hint,
                )
        self._check_open()

    def start_grader(self, index: int) -> Handle[Grader]:
        """Start a grader, instead of the one that may be in this place."""
        self._check_open()
        self._end(self._graders[index])
        place = self._resources.replicas + index
        options = _options(self._resources.grader, self._group, place)
        grader = start_actor(options, Grader, self._settings.grading)
        self._graders[index] = grader
        return grader

    def close(self) -> None:
        """End all actors."""
        self._is_closed = True
        for grader in self.graders:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(grader.call(Grader.close), timeout=10)
        for engine in self.engines:
            engine.end()
        for grader in self.graders:
            grader.end()
        self._copies.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise WorkerError("the evaluators have been ended")

    @staticmethod
    def _end(actor: Handle[Any] | None) -> None:
        if actor is not None:
            actor.end()


@contextlib.contextmanager
def placed_evaluators(
    settings: EvaluationSettings,
    model: str,
    tokenizer: str,
    runs_code: bool,
    copies: CopiesOnNodes,
) -> Iterator[EvaluatorGang]:
    """Have the engines and graders run; they end with the context.

    Args:
        settings: Of the evaluation.
        model: Directory that the engines are started with.
        tokenizer: Directory of the tokenizer.
        runs_code: Whether graders must be able to isolate code.
        copies: For engines on nodes that do not see the models; closed at the end.

    Raises:
        PlacementError: The cluster does not give the resources in time; says what was asked and
            what there is.
        EvaluationError: An engine does not start, or code cannot be isolated.
    """
    resources = evaluator_resources(settings, ray.cluster_resources().get("GPU", 0.0))
    bundles = [resources.engine] * resources.replicas + [resources.grader] * resources.graders
    group = ray.util.placement_group(bundles, strategy="PACK")
    gang = EvaluatorGang(settings, resources, group, copies)
    try:
        if not group.wait(settings.engine.placement_timeout_s):
            raise _not_placed(settings, resources)
        starts: list[Callable[[], ObjectRef[Any]]] = [
            *(partial(begin_grader, gang, i, runs_code) for i in range(resources.graders)),
            *(partial(begin_engine, gang, i, model, tokenizer) for i in range(resources.replicas)),
        ]
        begun = [start() for start in starts]
        with activity(f"starting {resources.replicas} vLLM engine(s)"):
            for ref, start in zip(begun, starts, strict=True):
                started(start, partial(_answer, limit_s=settings.engine.timeout_s), ref)
        yield gang
    finally:
        gang.close()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(group)


def begin_engine(gang: EvaluatorGang, index: int, model: str, tokenizer: str) -> ObjectRef[float]:
    """Start an engine in its place; returns what `EngineActor.ready` will."""
    return gang.start_engine(index, model, tokenizer).call(EngineActor.ready)


def begin_grader(gang: EvaluatorGang, index: int, runs_code: bool) -> ObjectRef[str]:
    """Start a grader in its place; returns what `Grader.ready` will."""
    return gang.start_grader(index).call(Grader.ready, runs_code)


def started(
    start: Callable[[], ObjectRef[_R]],
    wait: Callable[[ObjectRef[_R]], _R],
    begun: ObjectRef[_R] | None = None,
) -> _R:
    """Start an evaluator and wait until it is ready; again where it is lost meanwhile.

    Args:
        start: Starts one and asks it to be ready.
        wait: Waits for what it answers.
        begun: One that is started already.

    Raises:
        EvaluatorLostError: It was lost `ATTEMPTS` times.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return wait(begun or start())
        except EvaluatorLostError:
            begun = None
    return wait(start())


def _answer(ref: ObjectRef[_R], limit_s: float) -> _R:
    return get_results([ref], EVALUATOR, limit_s)[0]


def _options(resources: dict[str, float], group: Any, bundle: int) -> dict[str, Any]:
    custom = {name: n for name, n in resources.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "resources": custom,
        "scheduling_strategy": ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        ),
    }


def _not_placed(settings: EvaluationSettings, resources: EvaluatorResources) -> PlacementError:
    return PlacementError(
        f"the cluster did not place the evaluators within "
        f"{settings.engine.placement_timeout_s:g} s",
        got=str(view_of_cluster()),
        expected=f"{resources.replicas} times {format_resources(resources.engine)} for the "
        f"engines, {resources.graders} times {format_resources(resources.grader)} for the graders",
        hint="use fewer evaluation.engine.replicas, a fraction of a GPU "
        "(evaluation.engine.gpus_per_engine), or nodes of their own "
        "(evaluation.engine.resources, evaluation.grading.resources)",
    )

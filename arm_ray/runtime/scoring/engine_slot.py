"""One engine's place: what it holds, and how it is loaded, called and replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from arm_ray.errors import EvaluationError, WorkerError
from arm_ray.evaluation.engine import LoadReport
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.calls import EVALUATOR, Calls
from arm_ray.runtime.scoring.evaluator import (
    ATTEMPTS,
    EngineActor,
    EvaluatorGang,
    begin_engine,
    started,
)
from arm_ray.runtime.scoring.subject import Subject, engine_kind
from arm_ray.runtime.session.reporter import Reporter

if TYPE_CHECKING:
    from ray import ObjectRef

_P = ParamSpec("_P")
_R = TypeVar("_R")


class EngineSlot:
    """A place in the gang of evaluators, with whichever engine is there.

    Args:
        gang: The evaluators.
        index: Which engine.
        first: The model that the engine was started with, whose weights are not loaded yet.
        timeout_s: Longest time without an answer.
        reporter: Told where an engine is started anew.
        calls: How answers are waited for.
    """

    def __init__(
        self,
        gang: EvaluatorGang,
        index: int,
        first: Subject,
        timeout_s: float,
        reporter: Reporter,
        calls: Calls,
    ) -> None:
        self._gang, self._index, self._timeout_s = gang, index, timeout_s
        self._reporter, self._calls = reporter, calls
        self._kind: str | None = engine_kind(first.source.path, first.tokenizer)
        self._loaded: str | None = None

    @property
    def engine(self) -> Handle[EngineActor]:
        """The engine that is there now."""
        return self._gang.engines[self._index]

    def load(self, subject: Subject) -> LoadReport | None:
        """Have the engine hold a model's weights: reloaded in place, or started anew.

        Returns:
            How they were loaded; None: it held them already.

        Raises:
            EvaluationError: Not even a fresh engine takes them in.
            WorkerError: The engine was lost.
        """
        if self._loaded == subject.name:
            return None
        if self._kind != engine_kind(subject.source.path, subject.tokenizer):
            self.restart(subject)
        try:
            return self._take_in(subject)
        except EvaluationError as error:
            return self._take_in_anew(subject, error)

    def load_even_if_lost(self, subject: Subject) -> LoadReport | None:
        """The same; an engine that is lost meanwhile is started anew, once."""
        try:
            return self.load(subject)
        except WorkerError as error:
            return self._take_in_anew(subject, error)

    def _take_in_anew(self, subject: Subject, error: Exception) -> LoadReport:
        self._reporter.say(f"{subject.name}: reloading failed, starting the engine anew: {error}")
        self.restart(subject)
        return self._take_in(subject)

    def _take_in(self, subject: Subject) -> LoadReport:
        """Load a model of the engine's kind."""
        # What a failed reload leaves behind is a mixture: nothing to go on with.
        kind, self._loaded, self._kind = self._kind, None, None
        report = self._load(subject)
        self._loaded, self._kind = subject.name, kind
        return report

    def restart(self, subject: Subject) -> None:
        """Start another engine in this place, for models such as this one."""
        self._loaded = self._kind = None
        path, tokenizer = subject.source.path, subject.tokenizer
        started(lambda: begin_engine(self._gang, self._index, path, tokenizer), self._get)
        self._kind = engine_kind(subject.source.path, subject.tokenizer)

    def ask(
        self,
        subject: Subject,
        method: Callable[Concatenate[EngineActor, _P], _R],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _R:
        """Call the engine, and again where it is lost.

        Args:
            subject: The model that it is to hold.
            method: Of the engine.
            args: Of the method.
            kwargs: The same, by name.

        Raises:
            WorkerError: It was lost several times over the same call.
        """
        attempt = 1
        while True:
            try:
                if attempt > 1:
                    self.restart(subject)
                    self._take_in(subject)
                return self._get(self.engine.call(method, *args, **kwargs))
            except WorkerError:
                if attempt == ATTEMPTS:
                    raise
                attempt += 1
                self._reporter.say(f"{subject.name}: the engine was lost, starting it anew")

    def _load(self, subject: Subject) -> LoadReport:
        # The name as the version: no other weights have it in this engine.
        return self._get(self.engine.call(EngineActor.load, subject.source, subject.name))

    def _get(self, ref: ObjectRef[_R]) -> _R:
        limit = self._timeout_s
        return self._calls.answer(ref, EVALUATOR, limit, "evaluation.engine.timeout_s")

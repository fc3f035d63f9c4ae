"""Scores models one after another on evaluators that are placed already, beside whatever else runs.

Models wait in a queue; a thread of the driver takes them, one `Round` each. A chunk holds the same
requests whatever the number of engines, and an engine works on one chunk at a time, so the numbers
depend neither on the number of engines nor on which of them was lost meanwhile.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arm_ray.errors import ArmRayError, WorkerError
from arm_ray.evaluation.engine import preferred_dtypes
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import Task
from arm_ray.runtime.cluster.calls import Calls
from arm_ray.runtime.output.precision import recorded, settle, units_of
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.evaluator import (
    EvaluatorGang,
    evaluator_resources,
    placed_evaluators,
)
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes
from arm_ray.runtime.scoring.requests import KnownScores, chunks_of
from arm_ray.runtime.scoring.results import ScoringWork, scored_event, scored_line
from arm_ray.runtime.scoring.round import Evaluators, Round
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter

_POLL_S = 0.5


class _ClosedError(Exception):
    """The service is being closed; its thread ends."""


class ScoringService:
    """Scores models in the background; see the module.

    Args:
        settings: Of the evaluation.
        tasks: What models are scored on.
        directory: Where results go and are found again.
        gang: The evaluators.
        first: The model that the engines were started with.
        reporter: Told about each model, from the service's thread.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        tasks: Sequence[Task],
        directory: Path,
        gang: EvaluatorGang,
        first: Subject,
        reporter: Reporter,
    ) -> None:
        self._settings, self._tasks, self._reporter = settings, tasks, reporter
        self._closing = threading.Event()
        calls, limit = Calls(self._stop_if_closing), settings.engine.timeout_s
        slots = [
            EngineSlot(gang, index, first, limit, reporter, calls)
            for index in range(len(gang.engines))
        ]
        self._evaluators = Evaluators(settings, directory, slots, gang, reporter, calls)
        self._known = KnownScores(settings, tasks, directory)
        self._queue: queue.Queue[Subject | None] = queue.Queue()
        self._changed = threading.Condition()
        self._scores: dict[str, dict[str, TaskScores]] = {}
        self._pending: list[str] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, subject: Subject) -> None:
        """Have a model scored after those submitted before; returns at once."""
        with self._changed:
            self._pending.append(subject.name)
        self._queue.put(subject)

    def recall(self, subject: Subject) -> None:
        """Take a model's scores from disk, if all of them are there; without its weights.

        Before the first `submit` only: afterwards the tokenizer belongs to the service's thread.
        """
        found = self._known.of(subject)
        if len(found) == len(self._tasks):
            with self._changed:
                self._scores[subject.name] = {task.name: found[task.name] for task in self._tasks}

    @property
    def has_failed(self) -> bool:
        """Whether an error ended the service."""
        with self._changed:
            return self._failure is not None

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the models that are not scored yet, in order."""
        with self._changed:
            return tuple(self._pending)

    def scores(self) -> dict[str, dict[str, TaskScores]]:
        """Model -> task -> numbers, of the models that are scored."""
        with self._changed:
            return dict(self._scores)

    def check(self) -> None:
        """Raise what ended the service, if something did."""
        with self._changed:
            if self._failure is not None:
                raise self._failure

    def wait(self, name: str | None = None) -> None:
        """Wait until a model is scored, or all are.

        Raises:
            ArmRayError: The evaluation failed.
        """
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                if name is None and not self._pending:
                    return
                if name is not None and name not in self._pending:
                    return
                self._changed.wait(_POLL_S)

    def close(self) -> None:
        """Drop what is still waiting or in progress, and end the thread."""
        self._closing.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._queue.put(None)
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while (subject := self._queue.get()) is not None:
            try:
                with activity(f"scoring {subject.name}"):
                    scores = self._score(subject)
            except _ClosedError:
                return
            except Exception as error:  # raised for whoever asks next; the merge goes on
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                self._reporter.say(
                    f"{subject.name}: the evaluation failed, and goes no further: {error}"
                )
                return
            with self._changed:
                self._scores[subject.name] = scores
                self._pending.remove(subject.name)
                self._changed.notify_all()

    def _score(self, subject: Subject) -> dict[str, TaskScores]:
        started, known = time.monotonic(), self._known
        digests = {task.name: known.digest(task, subject) for task in self._tasks}
        scores = known.of(subject)
        missing = [task for task in self._tasks if task.name not in scores]
        report, size = None, self._settings.engine.chunk_size
        if missing:
            chunks = [
                chunk
                for task in missing
                for chunk in chunks_of(task, known.items(task, subject.tokenizer), size)
            ]
            work = Round(self._evaluators, subject, chunks, digests)
            scores |= {scored.task: scored for scored in work.run()}
            report = work.report
        ordered = {task.name: scores[task.name] for task in self._tasks}
        new = [ordered[task.name] for task in missing]
        sizes = [scored.num_problems * scored.repeats for scored in new]
        tokens = sum(n * scored.mean_tokens for n, scored in zip(sizes, new, strict=True))
        seconds = time.monotonic() - started
        self._tell(subject, ordered, ScoringWork(report, seconds, sum(sizes), round(tokens)))
        return ordered

    def _tell(self, subject: Subject, scores: dict[str, TaskScores], work: ScoringWork) -> None:
        self._reporter.write(scored_event(subject, scores, work))
        self._reporter.say(scored_line(subject.name, scores, work.seconds))

    def _stop_if_closing(self) -> None:
        if self._closing.is_set():
            raise _ClosedError


@contextlib.contextmanager
def scoring_service(
    settings: EvaluationSettings,
    tasks: Sequence[Task],
    directory: Path,
    first: Subject,
    reporter: Reporter,
    copies: CopiesOnNodes,
) -> Iterator[ScoringService]:
    """Place the evaluators and have the service run; all of it ends with the context.

    The engines are started with the model `first`; it is not submitted. `copies` is for engines on
    nodes that do not see the models.

    Raises:
        PlacementError: The cluster has no room for the evaluators.
        EvaluationError: An engine does not start, or code cannot be isolated.
    """
    runs_code = any(task.kind == "code" for task in tasks)
    model = first.source.path
    settings = with_dtype(settings, model, directory, reporter)
    with placed_evaluators(settings, model, first.tokenizer, runs_code, copies) as gang:
        service = ScoringService(settings, tasks, directory, gang, first, reporter)
        try:
            yield service
        finally:
            service.close()


def with_dtype(
    settings: EvaluationSettings, model: str, directory: Path, reporter: Reporter
) -> EvaluationSettings:
    """The settings with the engines' dtype settled, for all that is scored in a directory.

    So an engine that is started anew, with another model or on another machine, computes in it too.

    Args:
        settings: Of the evaluation.
        model: Directory that the engines are started with.
        directory: Where results go.
        reporter: Told what was taken.
    """
    engine = evaluator_resources(settings, ray.cluster_resources().get("GPU", 0.0)).engine
    dtype: Any = settle(
        directory,
        settings.engine.dtype,
        preferred_dtypes(model),
        lambda: units_of("cuda" if engine.get("GPU") else "cpu"),
        reporter.about("engines"),
    )
    return replace(settings, engine=replace(settings.engine, dtype=dtype))


def with_recorded_dtype(settings: EvaluationSettings, directory: Path) -> EvaluationSettings:
    """The settings with what `dtype: auto` of the engines came to in a directory, if it did."""
    dtype: Any = recorded(directory)
    if settings.engine.dtype != "auto" or dtype is None:
        return settings
    return replace(settings, engine=replace(settings.engine, dtype=dtype))


def as_error(error: Exception) -> ArmRayError:
    """Any failure of an evaluation as one of arm_ray's own errors."""
    if isinstance(error, ArmRayError):
        return error
    return WorkerError("the evaluation failed", got=f"{type(error).__name__}: {error}")

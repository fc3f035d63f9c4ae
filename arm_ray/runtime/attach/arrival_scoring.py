"""Scores a run's checkpoints and their merges beside each other, wherever there is room for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arm_ray.config import RuntimeConfig
from arm_ray.errors import PlacementError
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.selection import Criterion
from arm_ray.evaluation.settings import EngineSettings, EvaluationSettings
from arm_ray.evaluation.tasks import Task
from arm_ray.following.config import SharingConfig
from arm_ray.report.scores import paired_results, scores_as_json
from arm_ray.runtime.scoring.model_copies import copies_of
from arm_ray.runtime.scoring.results import flat_means
from arm_ray.runtime.scoring.service import ScoringService, scoring_service
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.reporter import Reporter


class ArrivalScoring:
    """The engines, started once for all arrivals, and again where they were lost.

    Args:
        settings: Of the evaluation.
        sharing: What to do where the engines cannot be placed.
        tasks: What models are scored on.
        criterion: What they are compared by; None: nothing.
        directory: Where results go and are found again.
        runtime: Of the merges.
        reporter: Told of scored models.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        sharing: SharingConfig,
        tasks: Sequence[Task],
        criterion: Criterion | None,
        directory: Path,
        runtime: RuntimeConfig,
        reporter: Reporter,
    ) -> None:
        self._settings, self._sharing, self._tasks = settings, sharing, tasks
        self._criterion, self._directory, self._runtime = criterion, directory, runtime
        self._reporter = reporter
        self._service: ScoringService | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ArrivalScoring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines; the next `start` starts new ones."""
        self._service = None
        self._stack.close()

    def start(self, first: Subject) -> bool:
        """Have the engines run; returns whether they do.

        Args:
            first: The model that they start with; it is not scored.

        Raises:
            PlacementError: There is no room where the settings say to look.
            EvaluationError: An engine does not start.
        """
        if self._service is not None and not self._service.has_failed:
            return True
        self.close()
        engine = engine_beside_a_trainer(self._settings.engine, self._sharing)
        while True:
            try:
                self._open(first, engine)
                return True
            except PlacementError as error:
                if self._sharing.when_full == "skip":
                    self._reporter.say(
                        f"no room for the evaluation; going on without scores: {error}"
                    )
                    return False
                if self._sharing.when_full == "wait":
                    self._reporter.say(f"no room for the evaluation; waiting for it: {error}")
                    continue
                other = elsewhere(engine, self._sharing)
                if other == engine:
                    raise
                self._reporter.say(f"no room for the evaluation as configured: {error}")
                where = "CPUs" if self._sharing.when_full == "cpu" else "the labelled nodes"
                self._reporter.say(f"the evaluation goes to {where} ({_reserved(other)})")
                engine = other

    def submit(self, subject: Subject) -> None:
        """Have a model scored, after those before; returns at once."""
        assert self._service is not None
        if subject.name not in self._service.scores():
            self._service.submit(subject)

    def wait(self) -> dict[str, dict[str, TaskScores]]:
        """Wait for all that were submitted; model -> task -> numbers.

        Raises:
            Exception: What ended the engines.
        """
        assert self._service is not None
        self._service.wait()
        return self._service.scores()

    def value(self, scores: Mapping[str, TaskScores]) -> float | None:
        """The number that models are compared by."""
        return None if self._criterion is None else self._criterion.value(flat_means(scores))

    def evidence(
        self, scores: Mapping[str, Mapping[str, TaskScores]], reference: str
    ) -> dict[str, Any]:
        """All numbers of some models, and each compared with the reference problem by problem."""
        paired = paired_results(scores, self._directory, reference, self._settings)
        return scores_as_json(scores, paired)

    def _open(self, first: Subject, engine: EngineSettings) -> None:
        settings = dataclasses.replace(self._settings, engine=engine)
        service = scoring_service(
            settings,
            self._tasks,
            self._directory,
            first,
            self._reporter,
            copies_of(self._runtime),
        )
        self._service = self._stack.enter_context(service)


def engine_beside_a_trainer(engine: EngineSettings, sharing: SharingConfig) -> EngineSettings:
    """The engine's settings, without GPUs unless those were allowed."""
    if sharing.use_gpus:
        return engine
    return dataclasses.replace(engine, gpus_per_engine=0.0)


def elsewhere(engine: EngineSettings, sharing: SharingConfig) -> EngineSettings:
    """The settings for where to go when the engines found no room."""
    if sharing.when_full == "cpu":
        return dataclasses.replace(engine, gpus_per_engine=0.0, resources={})
    return dataclasses.replace(engine, resources=dict(sharing.resources))


def _reserved(engine: EngineSettings) -> str:
    parts = [f"{engine.cpus_per_engine} CPU"]
    if engine.gpus_per_engine:
        parts.append(f"GPU: {engine.gpus_per_engine}")
    parts += [f"{amount:g} {name}" for name, amount in engine.resources.items()]
    return f"{engine.replicas} x " + ", ".join(parts)

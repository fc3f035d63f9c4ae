"""Scores the models of a study: each on each task once, many of them by the same engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arm_ray.checkpoints.formats import split_source
from arm_ray.checkpoints.huggingface import resolve_path
from arm_ray.config import EvaluateConfig
from arm_ray.errors import ArmRayError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.tasks import Task
from arm_ray.lazy import ray_is_joined
from arm_ray.runtime.cluster.joining import ray_session
from arm_ray.runtime.scoring.evaluate import subject_of
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes
from arm_ray.runtime.scoring.requests import KnownScores
from arm_ray.runtime.scoring.service import as_error, scoring_service, with_recorded_dtype
from arm_ray.runtime.scoring.state_scoring import local_evaluator_slots
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.study.cell import error_text
from arm_ray.storage.urls import is_url
from arm_ray.study.events import ScoringFailed
from arm_ray.study.parts import ScoredModel
from arm_ray.study.plan import Study
from arm_ray.study.records import MODEL_NAME, ModelRecord, environment, read_record, write_record


@dataclass(frozen=True)
class Scored:
    """A scored model: its numbers by task, and when and with what they were made."""

    scores: Mapping[str, TaskScores]
    record: ModelRecord


class Scoring:
    """Scores models, and finds again what is scored.

    Args:
        study: Whose models.
        tasks: What they are scored on.
        address: Address of a Ray cluster, as for `evaluate`.
        reporter: Told about each model.

    Attributes:
        scored: Model -> what there is.
        failures: Model -> why it could not be scored.
    """

    def __init__(
        self, study: Study, tasks: Sequence[Task], address: str | None, reporter: Reporter
    ) -> None:
        self._study, self._tasks = study, tasks
        self._address, self._reporter = address, reporter
        self._settings = study.config.evaluation
        self._known = self._open()
        self.scored: dict[str, Scored] = {}
        self.failures: dict[str, str] = {}

    def recall(self, name: str) -> bool:
        """Whether a model is scored on all tasks; by what is written down, without its weights."""
        path = self._study.scores / name / MODEL_NAME
        record = read_record(ModelRecord, path)
        if record is None or not Path(record.tokenizer).is_dir():
            return False
        return self._take(Subject(name, ModelSource(""), record.tokenizer, record.identity), record)

    def score(
        self, models: Sequence[ScoredModel], done: Callable[[str], None] = lambda _name: None
    ) -> None:
        """Score models that are there; one that fails keeps no other from being scored.

        Args:
            models: The models. Of the same tasks and weights as before nothing is done.
            done: Called with the name of each that is scored.
        """
        waiting = []
        for model in models:
            try:
                subject = self._subject(model)
            except (ArmRayError, OSError) as error:
                self._fail(model.name, error)
                continue
            if self._take(subject, None):
                done(model.name)
            else:
                waiting.append(subject)
        if not waiting:
            return
        names = ", ".join(task.name for task in self._tasks)
        self._reporter.say(f"\n== scoring {len(waiting)} models on {names}")
        slots = 1 + local_evaluator_slots(self._settings)
        about = {"job": "study", "output": str(self._study.output)}
        with (
            heartbeat(self._reporter.console),
            activity("scoring"),
            ray_session(self._address, slots, about),
        ):
            failure = ""
            while waiting:
                failed = waiting[0].name
                waiting = self._with_engines(waiting, done)
                if waiting and failure and self.failures.get(failed) == failure:
                    # Two models failed alike before any was scored: it is not for the models.
                    break
                failure = self.failures.get(failed, "")
        for subject in waiting:
            self.failures[subject.name] = failure

    def _with_engines(
        self, waiting: Sequence[Subject], done: Callable[[str], None]
    ) -> list[Subject]:
        """Score models until one fails; returns those that are left after it."""
        left = list(waiting)
        copies = CopiesOnNodes(None)
        try:
            with scoring_service(
                self._settings, self._tasks, self._study.scores, left[0], self._reporter, copies
            ) as service:
                # The engines' number format is settled now.
                self._known = self._open()
                for subject in waiting:
                    service.submit(subject)
                for subject in waiting:
                    service.wait(subject.name)
                    if self._take(subject, None):
                        left.remove(subject)
                        done(subject.name)
        except Exception as error:  # also of libraries; it is about the model at work
            # Scored, but told of after the failure of a later one.
            for subject in list(left):
                if self._take(subject, None):
                    left.remove(subject)
                    done(subject.name)
            if left:
                self._fail(left.pop(0).name, as_error(error))
        return left

    def _take(self, subject: Subject, record: ModelRecord | None) -> bool:
        """Keep a model's scores, if all of them are on disk."""
        found = self._known.of(subject)
        if len(found) < len(self._tasks):
            return False
        path = self._study.scores / subject.name / MODEL_NAME
        known = record or read_record(ModelRecord, path)
        if known is None or known.identity != subject.identity:
            date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            known = ModelRecord(
                subject.identity, str(subject.tokenizer), date, environment(_gpu_model())
            )
            write_record(path, known)
        self.scored[subject.name] = Scored(found, known)
        self.failures.pop(subject.name, None)
        return True

    def _fail(self, name: str, error: Exception) -> None:
        self.failures[name] = error_text(error)
        self._reporter.write(ScoringFailed(name, self.failures[name]))
        self._reporter.warn(f"{name} is not scored: {self.failures[name]}")

    def _subject(self, model: ScoredModel) -> Subject:
        _, place = split_source(model.base)
        tokenizer = self._study.config.tokenizer
        if tokenizer is None and not is_url(place):
            # Not the model's own copy, which goes with it.
            tokenizer = str(resolve_path(place))
        config = EvaluateConfig(
            models={model.name: model.path},
            output=str(self._study.scores),
            adapter_base=model.base,
            tokenizer=tokenizer,
            evaluation=self._settings,
        )
        return subject_of(model.name, model.path, config)

    def _open(self) -> KnownScores:
        directory = self._study.scores
        return KnownScores(with_recorded_dtype(self._settings, directory), self._tasks, directory)


def _gpu_model() -> str | None:
    """Of the cluster, as Ray names it; else of this machine."""
    if ray_is_joined():
        prefix = "accelerator_type:"
        names = [n.removeprefix(prefix) for n in ray.cluster_resources() if n.startswith(prefix)]
        if names:
            return ", ".join(sorted(names))
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

"""Scores a merge's states beside the merge: which of them is published, and when to stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping

from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.config import MergeConfig, state_settings
from arm_ray.errors import EvaluationError, NotACheckpointError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.selection import (
    Contender,
    Criterion,
    Selection,
    best_state,
    checkpoint_title,
    keep_promise,
    make_criterion,
    stops_at,
)
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import joined
from arm_ray.evaluation.tasks import Task, load_tasks
from arm_ray.report.scores import paired_results, print_scores, scores_as_json
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.scoring.evaluator import evaluator_resources
from arm_ray.runtime.scoring.model_copies import copies_of
from arm_ray.runtime.scoring.results import flat_means, write_table
from arm_ray.runtime.scoring.service import ScoringService, as_error, scoring_service
from arm_ray.runtime.scoring.subject import Subject, model_source
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.schedule import BASE, candidate_name, iteration_of, state_name

DIRECTORY = "evaluation"


class StateScoring:
    """What the driver tells of states and asks about them.

    Args:
        config: Of the merge; it has an evaluation.
        inputs: The checked checkpoints.
        run: The run directory, open.
        service: The scoring service.
        criterion: What states are compared by; None publishes the last one.
        reporter: Told what goes wrong.
    """

    def __init__(
        self,
        config: MergeConfig,
        inputs: MergeInputs,
        run: RunDirectory,
        service: ScoringService,
        criterion: Criterion | None,
        reporter: Reporter,
    ) -> None:
        assert config.evaluation is not None
        self._config, self._inputs, self._run = config, inputs, run
        self._settings: EvaluationSettings = config.evaluation
        self._service, self._criterion, self._reporter = service, criterion, reporter
        self._submitted: set[int] = set()
        self._has_warned = False

    @property
    def may_choose_earlier(self) -> bool:
        """Whether the published model may be another than the last state."""
        return self._criterion is not None

    def start(self) -> None:
        """Have the checkpoints scored, and the states that a run that goes on has already."""
        for iteration in range(1, self._run.last_iteration + 1):
            if iteration not in self._run.finished and self.is_due(iteration):
                # Pruned, but its scores still count for what is selected and when to stop.
                self._service.recall(self._subject(iteration))
        wanted = [BASE] if self._settings.base else []
        if self._settings.candidates:
            wanted += [candidate_name(i) for i in range(len(self._config.candidates))]
        for name in wanted:
            self._service.submit(checkpoint_subject(self._inputs, name))
        for iteration in sorted(self._run.finished):
            self.state_finished(iteration)

    def is_due(self, iteration: int) -> bool:
        """Whether a state is scored: every so many, and the last one."""
        return self._settings.is_due(iteration, self._config.schedule.max_iterations)

    def waits_for(self, iteration: int) -> bool:
        """Whether the merge goes on only once a state has its scores (`evaluation.wait`)."""
        return self._settings.wait and self.is_due(iteration)

    def state_finished(self, iteration: int, is_last: bool = False) -> None:
        """Have a state scored whose weights are on disk."""
        if iteration in self._submitted or not (self.is_due(iteration) or is_last):
            return
        if not states.is_published(self._run.path, iteration):
            return
        self._submitted.add(iteration)
        self._service.submit(self._subject(iteration))
        if self._settings.wait:
            try:
                self._service.wait(state_name(iteration))
            except Exception as error:
                self._failed(error)

    def _subject(self, iteration: int) -> Subject:
        known = [sorted(self._run.inputs.items()), state_settings(self._config), iteration]
        text = json.dumps(known, sort_keys=True)
        return Subject(
            state_name(iteration),
            ModelSource(str(states.state_directory(self._run.path, iteration))),
            str(self._inputs.tokenizer),
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def _failed(self, error: Exception) -> None:
        """The evaluation is over: an error where the result depends on it, else a warning."""
        if self._criterion is not None:
            raise as_error(error) from error
        if not self._has_warned:
            self._has_warned = True
            self._reporter.warn(f"the evaluation failed; the merge goes on without it: {error}")

    def held(self) -> set[int]:
        """Iterations whose states must stay on disk: still to be scored, or the best so far."""
        if self._criterion is None and self._service.has_failed:
            return set()
        # Before the scores are read: what is scored in between is held for one of the two reasons.
        waiting = {iteration_of(name) for name in self._service.pending}
        keep = {iteration for iteration in waiting if iteration is not None}
        if self._criterion is not None:
            best = best_state(self._eligible(), self._criterion)
            keep |= {best} if best is not None else set()
        return keep

    def stops(self, iteration: int) -> bool:
        """Whether the states have stopped getting better, at or before this iteration.

        Raises:
            ArmRayError: The evaluation failed, and the result depends on it.
        """
        if self._criterion is None:
            return False
        self._check()
        end = stops_at(self._in_order(), self._criterion, self._settings.select.patience)
        return end is not None and end <= iteration

    def select(self, last: int) -> Selection:
        """Wait for all scores and say which state, or checkpoint, is published.

        Args:
            last: The last state.

        Raises:
            ArmRayError: The evaluation failed, and the result depends on it.
        """
        self.state_finished(last, is_last=True)
        try:
            self._service.wait()
        except Exception as error:
            self._failed(error)
            return Selection(state_name(last))
        if self._criterion is None:
            return Selection(state_name(last))
        best = best_state(self._eligible(), self._criterion)
        if best is None:
            raise EvaluationError(
                "no merged state has the score that the model is selected by",
                where="evaluation.select",
                got=", ".join(str(t) for t in sorted(self._submitted)) or "no state was scored",
                expected=" and ".join(f"{task}: {name}" for task, name in self._criterion.metrics),
            )
        if self._config.promises:
            return self._compared(state_name(best), self._criterion)
        return Selection(state_name(best))

    def _compared(self, best: str, criterion: Criterion) -> Selection:
        """The best state against the best checkpoint; see `select.promise`."""
        scores = self.scores()
        values = {name: criterion.value(flat_means(tasks)) for name, tasks in scores.items()}
        finite = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
        checkpoints = {name: v for name, v in finite.items() if iteration_of(name) is None}
        # The configuration has them scored; one that is not finite is no rival.
        if not checkpoints:
            return Selection(best)
        sign = 1.0 if criterion.higher_is_better else -1.0
        rival = max(checkpoints, key=lambda name: sign * checkpoints[name])
        tasks = [task for task, _ in criterion.metrics]
        pair = {name: {task: scores[name][task] for task in tasks} for name in (rival, best)}
        found = paired_results(pair, self._run.path / DIRECTORY, rival, self._settings)
        title = checkpoint_title(rival, self._config.candidates)
        return keep_promise(
            Contender(best, best, finite[best]),
            Contender(rival, title, checkpoints[rival]),
            joined([result.comparison for result in found]),
            higher_is_better=criterion.higher_is_better,
            what=self._settings.select.by,
        )

    def scores(self) -> dict[str, dict[str, TaskScores]]:
        """Model -> task -> numbers, of what is scored so far."""
        return _sorted(self._service.scores())

    def report(self, console: Console, marked: str) -> None:
        """Print the tables, with one model marked, and write them beside the records."""
        scores = self.scores()
        if not scores:
            return
        directory = self._run.path / DIRECTORY
        # Not the selected state: the best of many by chance alone makes all others look worse.
        reference = next(iter(scores))
        paired = paired_results(scores, directory, reference, self._settings)
        write_table(directory, scores_as_json(scores, paired))
        print_scores(console, scores, paired, title=f"run {self._run.path.name}", marked=marked)
        self._say_if_a_checkpoint_is_better(scores, marked)

    def _say_if_a_checkpoint_is_better(
        self, scores: Mapping[str, Mapping[str, TaskScores]], marked: str
    ) -> None:
        if self._criterion is None or marked not in scores or self._config.promises:
            return
        ours = self._criterion.value(flat_means(scores[marked]))
        for name in scores:
            value = self._criterion.value(flat_means(scores[name]))
            if iteration_of(name) is not None or value is None or ours is None:
                continue
            if self._criterion.is_better(value, ours):
                self._reporter.warn(
                    f"{name} scores better ({value:.4f}) than the selected {marked} ({ours:.4f})"
                )

    def _eligible(self) -> dict[int, float | None]:
        """The states that may be published: those up to the one at which patience ended.

        What was merged while a score was still awaited does not count, whenever that score came.
        """
        assert self._criterion is not None
        end = stops_at(self._in_order(), self._criterion, self._settings.select.patience)
        return {t: value for t, value in self._values().items() if end is None or t <= end}

    def _values(self) -> dict[int, float | None]:
        """Iteration -> its number, of the states that are scored."""
        assert self._criterion is not None
        found: dict[int, float | None] = {}
        for name, tasks in self._service.scores().items():
            iteration = iteration_of(name)
            if iteration is not None:
                found[iteration] = self._criterion.value(flat_means(tasks))
        return found

    def _in_order(self) -> dict[int, float | None]:
        """As `_values`, with None for the states that are not scored yet."""
        pending = [iteration_of(name) for name in self._service.pending]
        waiting: dict[int, float | None] = {t: None for t in pending if t is not None}
        return {**waiting, **self._values()}

    def _check(self) -> None:
        try:
            self._service.check()
        except Exception as error:
            raise as_error(error) from error


def checkpoint_subject(inputs: MergeInputs, name: str) -> Subject:
    """The base or a candidate as a model to score."""
    checkpoint = inputs.checkpoints[name]
    source = model_source(checkpoint)
    # All are asked with the merged model's tokenizer: the same prompts for all.
    return Subject(name, source, str(inputs.tokenizer), checkpoint.fingerprint)


@contextlib.contextmanager
def state_scoring(
    config: MergeConfig,
    inputs: MergeInputs,
    run: RunDirectory,
    tasks: list[Task],
    reporter: Reporter,
) -> Iterator[StateScoring]:
    """Place the evaluators of a merge, and have its checkpoints and states scored meanwhile.

    Raises:
        PlacementError: The cluster has no room for the evaluators.
        EvaluationError: An engine does not start, or code cannot be isolated.
    """
    assert config.evaluation is not None
    settings = config.evaluation
    criterion = make_criterion(settings.select, {task.name: task.metrics for task in tasks})

    base = checkpoint_subject(inputs, BASE)
    directory = run.path / DIRECTORY
    copies = copies_of(config.runtime)
    with scoring_service(settings, tasks, directory, base, reporter, copies) as service:
        scoring = StateScoring(config, inputs, run, service, criterion, reporter)
        scoring.start()
        yield scoring


def open_evaluation(config: MergeConfig, inputs: MergeInputs) -> list[Task]:
    """Read the tasks of a merge and check what can be checked before anything starts.

    Raises:
        EvaluationError: Unknown tasks, missing data, or settings that do not fit.
    """
    if config.evaluation is None:
        return []
    tasks = load_tasks(config.evaluation)
    make_criterion(config.evaluation.select, {task.name: task.metrics for task in tasks})
    if not states.has_tokenizer(inputs.tokenizer):
        raise NotACheckpointError(
            "no tokenizer for the prompts of the evaluation",
            where=inputs.tokenizer,
            expected="tokenizer.json or tokenizer.model beside the weights",
            hint="copy the tokenizer into the base's directory, or set `tokenizer`",
        )
    return tasks


def reserved_resources(config: MergeConfig) -> dict[str, float]:
    """What the evaluation of a merge takes of the cluster that is joined."""
    if config.evaluation is None:
        return {}
    gpus = ray.cluster_resources().get("GPU", 0.0)
    return evaluator_resources(config.evaluation, gpus).total


def local_evaluator_slots(settings: EvaluationSettings | None) -> int:
    """CPU slots that evaluators need of a Ray that is started for them."""
    return 0 if settings is None else int(evaluator_resources(settings, 0.0).total["CPU"])


def _sorted(
    scores: Mapping[str, dict[str, TaskScores]],
) -> dict[str, dict[str, TaskScores]]:
    """The base, the candidates, then the states, each by their number."""
    order = sorted(scores, key=lambda name: (iteration_of(name) or 0, len(name), name))
    return {name: scores[name] for name in sorted(order, key=lambda n: iteration_of(n) is not None)}

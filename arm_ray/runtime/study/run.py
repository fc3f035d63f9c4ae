"""A whole study, from a configuration to its tables; what is done is skipped on the next run."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from arm_ray.checkpoints.formats import split_source
from arm_ray.errors import ConfigError
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.events import EventLog
from arm_ray.runtime.cluster.joining import local_slots, outliving, ray_kept
from arm_ray.runtime.output.claim import claimed, holds_earlier, write_config
from arm_ray.runtime.scoring.state_scoring import local_evaluator_slots
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.page import write_page
from arm_ray.runtime.session.progress import duration, print_summary
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.study.cell import error_text
from arm_ray.runtime.study.merging import Merging
from arm_ray.runtime.study.scoring import Scoring
from arm_ray.runtime.train.stage import task_files, there, train_stage
from arm_ray.storage.urls import is_url
from arm_ray.study.config import StudyConfig
from arm_ray.study.events import SeriesTrained, StudyFinished, StudyStarted
from arm_ray.study.parts import Merge, Run, ScoredModel
from arm_ray.study.plan import Study
from arm_ray.study.records import CELL_NAME, CellRecord, read_record, write_record
from arm_ray.study.render import check_renders, render
from arm_ray.study.results import Outcome, read_results, result_rows, write_results

EVENTS_NAME = "events.jsonl"


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended.

    Attributes:
        study: What it was.
        outcome: What there is of it.
        files: Tables and figures.
    """

    study: Study
    outcome: Outcome
    files: tuple[Path, ...]

    @property
    def failed(self) -> dict[str, str]:
        """Merge or model -> why it is not scored."""
        cells = {
            name: str(record.error)
            for name, record in self.outcome.cells.items()
            if record.state == "failed"
        }
        return {**cells, **self.outcome.failures}


def run_study(
    config: StudyConfig,
    *,
    source: str = "config",
    address: str | None = None,
    console: Console | None = None,
) -> StudyOutcome:
    """Train the series, do the merges, score all models, and write results, tables and figures.

    A cell that fails is written down with its error, and the others are done; the next run tries it
    again.

    Args:
        config: The study.
        source: File that it is from, for errors.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error.

    Raises:
        ArmRayError: The study cannot be as it is configured. What is complete on disk stays and is
            used again.
    """
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    outliving(config.output)
    study = Study(config, source)
    check_renders(config)
    _check_inputs(study, source)
    tasks = load_tasks(config.evaluation)
    holds_earlier(study.output, "study")
    about = {"job": "study", "output": str(study.output)}
    with (
        claimed(study.output, "study"),
        heartbeat(reporter.console),
        ray_kept(_slots(study), about),
    ):
        write_config(study.output, config.to_yaml())
        reporter = reporter.with_events(EventLog(study.output / EVENTS_NAME))
        scoring = Scoring(study, tasks, address, reporter)
        work = _Work(study, scoring, address, reporter)
        work.begin()
        for level in study.levels:
            work.level(level)
        done = StudyOutcome(study, work.outcome(), work.write())
        seconds = time.monotonic() - started
        reporter.write(StudyFinished(len(done.failed), round(seconds, 3)))
        _summarise(done, seconds, reporter)
        write_page(study.output, reporter)
    return done


def render_study(config: StudyConfig, *, source: str = "config") -> list[Path]:
    """Write tables and figures anew, of the results that there are; runs nothing.

    Raises:
        ArmRayError: There are no results, or the tables and figures cannot be.
    """
    study = Study(config, source)
    check_renders(config)
    return render(study, read_results(study.output))


class _Work:
    """What is done and what is left of a study."""

    def __init__(
        self, study: Study, scoring: Scoring, address: str | None, reporter: Reporter
    ) -> None:
        self._study, self._scoring = study, scoring
        self._address, self._reporter = address, reporter
        self._cells: dict[str, CellRecord] = {}
        self._merging: Merging | None = None

    def begin(self) -> None:
        """Look at what is there, and say what is left."""
        study = self._study
        for name, merge in study.merges.items():
            record = read_record(CellRecord, merge.directory / CELL_NAME)
            # What failed is tried again.
            if record is not None and record.state != "failed":
                self._cells[name] = record
        with activity("looking at what is scored"):
            left = [merge for merge in study.merges.values() if self._is_left(merge)]
        trainings = [run for run in study.runs if run.training is not None]
        self._reporter.write(
            StudyStarted(len(study.cells), len(study.merges), len(trainings), len(study.models))
        )
        self._reporter.say(
            f"{len(study.cells)} cells, {len(study.merges)} different merges, {len(left)} of them "
            f"to do; {len(trainings)} trainings"
        )
        config = study.config
        self._merging = Merging(
            config.parallel, self._address, _slots(study), self._reporter, len(left)
        )

    def level(self, level: int) -> None:
        """Train the runs of a level, do their merges, and score all that there is then."""
        runs = [run for run in self._study.runs if run.level == level]
        broken = {str(run): error for run in runs if (error := self._train(run)) is not None}
        models = [m for m in self._study.models.values() if m.run.level == level]
        for model in models:
            if str(model.run) in broken and model.path != model.run.base:
                self._scoring.failures[model.name] = broken[str(model.run)]
        models = [m for m in models if m.name not in self._scoring.failures]
        merges = []
        for merge in self._study.merges.values():
            if merge.run.level != level or not self._is_left(merge):
                continue
            # It may be of checkpoints of several runs.
            lost = [
                broken[str(run)]
                for run in runs
                if str(run) in broken and run.has_any(merge.config.candidates)
            ]
            if lost:
                self._fail(merge, lost[0])
            else:
                merges.append(merge)
        batches = iter(merges)
        while True:
            batch = [*islice(batches, self._study.config.batch)]
            self._merge(batch)
            self._score(models, level)
            models = []
            self.write()
            if not batch or self._study.config.batch is None:
                return

    def outcome(self) -> Outcome:
        """What there is."""
        scored = self._scoring.scored
        merged = self._study.merges
        return Outcome(
            dict(self._cells),
            {name: given.scores for name, given in scored.items()},
            {name: given.record for name, given in scored.items()},
            {n: e for n, e in self._scoring.failures.items() if n not in merged},
        )

    def write(self) -> tuple[Path, ...]:
        """Write results, tables and figures of what there is."""
        with activity("writing tables"):
            write_results(self._study, result_rows(self._study, self.outcome()))
            return (*render(self._study, read_results(self._study.output)),)

    def _is_left(self, merge: Merge) -> bool:
        """Whether a merge has to be done, or done again because its model is gone."""
        if merge.name not in self._cells:
            return True
        if merge.model.is_dir():
            return False
        return merge.name in self._study.starts or not self._scoring.recall(merge.name)

    def _train(self, run: Run) -> str | None:
        """Train a run, unless it is there; returns why it could not be."""
        if run.training is None:
            return None
        if run.start is not None and not self._study.merges[run.start].model.is_dir():
            return f"the model that {run} begins with, {run.start}, is not there"
        started = time.monotonic()
        files = task_files(self._study.config.evaluation)
        for merge in self._study.merges.values():
            if run.has_any(merge.config.candidates) and merge.config.calibration is not None:
                files[f"the calibration of {merge.name}"] = merge.config.calibration.path
        self._reporter.say(f"\n== training {run}")
        problem: str | None = None
        try:
            with activity(f"training {run}"):
                train_stage(run.training, there(files), self._address, self._reporter.console)
        except Exception as error:  # the other series are trained all the same
            problem = f"the training of {run} failed: {error_text(error)}"
            self._reporter.warn(problem)
        seconds = round(time.monotonic() - started, 3)
        self._reporter.write(SeriesTrained(run.series, run.seed, seconds, problem))
        return problem

    def _merge(self, batch: Sequence[Merge]) -> None:
        for merge in batch:
            known = self._cells.pop(merge.name, None)
            if known is not None:
                # Its model was removed once it was scored: what is left is no run to go on with.
                shutil.rmtree(merge.config.output, ignore_errors=True)
        if batch:
            assert self._merging is not None
            self._reporter.say(f"\n== {len(batch)} merges")
            self._cells |= self._merging.run(batch)

    def _score(self, models: Sequence[ScoredModel], level: int) -> None:
        """Score models and all merged ones of a level that are there and not scored."""
        waiting = [*models]
        for merge in self._study.merges.values():
            record = self._cells.get(merge.name)
            if merge.run.level != level or record is None or record.state == "failed":
                continue
            if merge.model.is_dir() and merge.name not in self._scoring.scored:
                root = merge.run.root
                waiting.append(ScoredModel(merge.name, str(merge.model), root, merge.run))
        self._scoring.score(waiting, self._is_scored)
        for merge in self._study.merges.values():
            error = self._scoring.failures.get(merge.name)
            if error is not None and self._cells[merge.name].state != "failed":
                # The merge itself is done, and not done again: this is not written down.
                failed = replace(self._cells[merge.name], state="failed", error=error)
                self._cells[merge.name] = failed

    def _is_scored(self, name: str) -> None:
        """After a model is scored: write it down, and make room."""
        merge = self._study.merges.get(name)
        if merge is None:
            return
        record = replace(self._cells[name], state="scored")
        self._cells[name] = record
        write_record(merge.directory / CELL_NAME, record)
        if not self._study.config.keep_models and name not in self._study.starts:
            shutil.rmtree(merge.model, ignore_errors=True)

    def _fail(self, merge: Merge, error: str) -> None:
        record = CellRecord("failed", merge.digest, error)
        self._cells[merge.name] = record
        write_record(merge.directory / CELL_NAME, record)


def _check_inputs(study: Study, source: str) -> None:
    """Refuse bases and given checkpoints that are not there.

    Raises:
        ConfigError: Lists them all.
    """
    missing = []
    for model in study.models.values():
        place = split_source(model.path)[1]
        is_made = model.run.training is not None and model.path != model.run.base
        # A name like owner/model may be the hub's.
        is_ours = Path(place).is_absolute() or place.startswith((".", "~")) or place.count("/") != 1
        if not is_made and is_ours and not is_url(place) and not Path(place).expanduser().exists():
            missing.append(f"  - {model.run.series}: {model.path}")
    if missing:
        raise ConfigError(
            "\n".join([f"{len(missing)} checkpoints are not there", *missing]),
            where=f"{source}: series",
            hint="name the directories that there are; --dry-run plans without them",
        )


def _slots(study: Study) -> int:
    """CPU slots of a local Ray in which each stage has what it would have in one of its own."""
    cores, parallel = os.cpu_count() or 1, study.config.parallel
    found = [cores, parallel, 1 + local_evaluator_slots(study.config.evaluation)]
    for merge in study.merges.values():
        runtime, evaluators = merge.config.runtime, local_evaluator_slots(merge.config.evaluation)
        if runtime.layer_shards == "auto":
            # As many as there is room for.
            found.append(max(cores, parallel * runtime.threads) + parallel * evaluators)
        else:
            shards = runtime.layer_shards * runtime.threads
            alone = local_slots(runtime, sys.maxsize)
            found.append(max(alone, parallel * shards) + parallel * evaluators)
    return max(found)


def _summarise(done: StudyOutcome, seconds: float, reporter: Reporter) -> None:
    study, failed = done.study, done.failed
    scored = sum(record.state == "scored" for record in done.outcome.cells.values())
    rows = [
        ("merges scored", f"{scored} of {len(study.merges)}"),
        ("other models scored", str(sum(n in study.models for n in done.outcome.scores))),
        ("failed", str(len(failed))),
        ("time", duration(seconds)),
        ("results", str(study.output / "results.parquet")),
        *(("written", str(path)) for path in done.files),
    ]
    print_summary(reporter.console, f"study {study.output.name}", rows)
    for name, error in failed.items():
        reporter.say(f"failed: {name}: {error}")

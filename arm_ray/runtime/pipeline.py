"""Training, merging and evaluation in one go; finished stages are skipped on the next run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.errors import RunDirectoryError
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.events import Event, EventLog
from arm_ray.report.verdict import verdict
from arm_ray.runtime.cluster.joining import local_slots, outliving, ray_kept
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.scoring.evaluate import evaluate
from arm_ray.runtime.scoring.state_scoring import local_evaluator_slots
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.page import write_page
from arm_ray.runtime.session.progress import duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.train.stage import task_files, there, train_stage
from arm_ray.storage.regular import json_in
from arm_ray.training.pipeline import PipelineConfig, Stages
from arm_ray.training.split import overlaps, split_file, texts_in

_SPLIT_NAME = "split.json"


@dataclass(frozen=True)
class StageFinished(Event):
    """A stage of a pipeline is done."""

    name: ClassVar[str] = "stage_finished"
    stage: str
    seconds: float


def run_pipeline(
    config: PipelineConfig,
    *,
    source: str = "config",
    address: str | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, TaskScores]]:
    """Split the data, train, merge, score, and train on where that is asked for.

    Args:
        config: The pipeline.
        source: File that it is from, for errors.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error.

    Returns:
        Model -> task -> numbers.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays and is used again.
    """
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    outliving(config.output)
    stages = Stages(config, source)
    # Before anything long starts: unknown tasks, missing data.
    if config.data is None:
        load_tasks(config.evaluation)
    stages.output.mkdir(parents=True, exist_ok=True)
    reporter = reporter.with_events(EventLog(stages.output / "events.jsonl"))
    names = _stage_names(stages)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        number = names.index(name) + 1
        reporter.say(f"\n== {number}/{len(names)} {name}")
        with heartbeat(reporter.console), activity(name):
            result = work()
        seconds = time.monotonic() - begun
        reporter.write(StageFinished(name, round(seconds, 3)))
        reporter.say(f"== {number}/{len(names)} {name}: {duration(seconds)}")
        return result

    if config.data is not None:
        stage("data", lambda: _split(stages, reporter))
        load_tasks(config.evaluation)
    others = _other_data(stages)
    _tell_overlaps(stages, others, reporter)
    with ray_kept(_local_slots(stages), {"job": "pipeline", "output": str(stages.output)}):
        scores = _run_stages(stages, others, stage, address, reporter)
    directory = Path(stages.evaluation([]).output)
    told = verdict(scores, directory, stages.merges, config.evaluation)
    reporter.say(f"\n{told}")
    write_page(stages.output, reporter)
    reporter.say(f"done after {duration(time.monotonic() - started)}: {stages.output}")
    return scores


def _run_stages(
    stages: Stages,
    others: dict[str, str],
    stage: Callable[[str, Callable[[], Any]], Any],
    address: str | None,
    reporter: Reporter,
) -> dict[str, dict[str, TaskScores]]:
    """Train, merge, score, and train on where that is asked for; all in one Ray."""
    stage(
        "training", lambda: train_stage(stages.first_training(), others, address, reporter.console)
    )
    for name, given in stages.merges.items():
        stage(name, partial(merge, given, address=address, console=reporter.console))

    def score(steps: list[int]) -> dict[str, dict[str, TaskScores]]:
        return evaluate(stages.evaluation(steps), address=address, console=reporter.console)

    scores: dict[str, dict[str, TaskScores]] = stage("scores", lambda: score(_saved(stages)))
    if stages.config.train_on:
        stage(
            "training on", lambda: train_stage(stages.training, others, address, reporter.console)
        )
        scores = stage("scores of all", lambda: score(_saved(stages)))
    return scores


def _local_slots(stages: Stages) -> int:
    """CPU slots of a local Ray in which each stage has what it would have in one of its own."""
    merges = [
        # How many layer groups there are is known once the base is read.
        local_slots(merge.runtime, sys.maxsize) + local_evaluator_slots(merge.evaluation)
        for merge in stages.merges.values()
    ]
    return max(*merges, 1 + local_evaluator_slots(stages.config.evaluation))


def _stage_names(stages: Stages) -> list[str]:
    names = ["data"] if stages.config.data is not None else []
    names += ["training", *stages.merges, "scores"]
    return [*names, "training on", "scores of all"] if stages.config.train_on else names


def _split(stages: Stages, reporter: Reporter) -> None:
    data = stages.config.data
    assert data is not None
    directory = stages.part("train").parent
    record = directory / _SPLIT_NAME
    wanted = data.model_dump(mode="json")
    if record.is_file():
        known = json_in(record)
        if known["settings"] != wanted:
            raise RunDirectoryError(
                "the data of this pipeline were split otherwise",
                where=record,
                got=wanted,
                expected=known["settings"],
                hint="choose another output, or restore the `data` section",
            )
        reporter.say(f"nothing to do: {directory}")
        return
    counts = split_file(data, directory, data.shares, data.seed)
    write_json(record, {"settings": wanted, "rows": counts})
    reporter.say(", ".join(f"{name}: {count} rows" for name, count in counts.items()))


def _saved(stages: Stages) -> list[int]:
    """Steps of the checkpoints that are there."""
    found = []
    for path in (stages.output / "train").glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / "trainer_state.json").is_file():
            found.append(int(number))
    return sorted(found)


def _other_data(stages: Stages) -> dict[str, str]:
    """What it is for -> file of data that must not be trained on."""
    found = {}
    for name, given in stages.merges.items():
        if given.calibration is not None:
            found[f"the calibration of {name}"] = given.calibration.path
        for key, path in (("path", given.select.path), ("final_path", given.select.final_path)):
            if path is not None:
                found[f"{name}: select.{key}"] = path
        if given.evaluation is not None:
            found |= task_files(given.evaluation, f"{name}: ")
    found |= task_files(stages.config.evaluation)
    return there(found)


def _tell_overlaps(stages: Stages, others: dict[str, str], reporter: Reporter) -> None:
    """Say where calibration data are also scored on; training rows are looked at by the job."""
    calibrated = {path for what, path in others.items() if "calibration of" in what}
    scored = task_files(stages.config.evaluation)
    for path in sorted(calibrated):
        texts = list(texts_in(path))
        for what, other in scored.items():
            if other not in others.values():
                continue
            found = overlaps(texts, texts_in(other))
            if found.count:
                message = (
                    f"{found.count} texts of the calibration data are also in {what}: "
                    f"{found.examples[0][:80]!r}"
                )
                reporter.warn(message)

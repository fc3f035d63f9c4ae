"""A training as a stage of a larger job: kept apart from the data that the other stages use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from arm_ray.config import read_yaml
from arm_ray.evaluation.data import find_file
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import BENCHMARKS
from arm_ray.runtime.output.claim import CONFIG_NAME
from arm_ray.storage.urls import is_url
from arm_ray.training.config import GrpoConfig, SftConfig, TrainingConfig


def train_stage(
    config: TrainingConfig, others: Mapping[str, str], address: str | None, console: Console
) -> list[Path]:
    """Train as configured, on rows that none of the other data has.

    Args:
        config: Of the training.
        others: What it is for -> file of data that must not be trained on; see `there`.
        address: As for `run_sft`.
        console: Where progress goes.

    Returns:
        The checkpoints that there are at the end.

    Raises:
        ArmRayError: Any of its kinds. Checkpoints that are complete stay and are used again.
    """
    # Imported here: it takes the trainers' libraries, which a finished training does not need.
    from arm_ray.runtime.train.run import run_grpo, run_sft

    if not config.apart_from:
        # As the run began: other tasks may have come since, but it trains on the same rows.
        record = config.output / CONFIG_NAME
        known = read_yaml(record).get("apart_from") if record.is_file() else sorted(others.values())
        config = config.model_copy(update={"apart_from": known})
    if isinstance(config, GrpoConfig):
        return run_grpo(config, address=address, console=console)
    assert isinstance(config, SftConfig)
    return run_sft(config, address=address, console=console)


def task_files(evaluation: EvaluationSettings, label: str = "") -> dict[str, str]:
    """What it is for -> file of a task, where one is known.

    Args:
        evaluation: The settings.
        label: Stands before each name.
    """
    found = {}
    for task in evaluation.task_settings:
        known = BENCHMARKS.get(task.name)
        file = None if known is None else find_file(evaluation.data_dir, known.files)
        path = task.path or file
        if path is not None:
            found[f"{label}the task {task.name}"] = path
    return found


def there(files: Mapping[str, str]) -> dict[str, str]:
    """Those of the files that can be looked into."""
    return {
        what: path
        for what, path in files.items()
        if is_url(path) or Path(path).expanduser().is_file()
    }

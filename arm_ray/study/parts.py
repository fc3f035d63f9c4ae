"""The parts of a study: runs of a series, merges, and other models that are scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arm_ray.config import MergeConfig
from arm_ray.errors import ConfigError
from arm_ray.study.grid import Cell
from arm_ray.training.config import TrainingConfig


@dataclass(frozen=True)
class Run:
    """A series with a seed: the run whose checkpoints are merged.

    Attributes:
        series: Its name.
        seed: Of the training; None: as the series has it.
        base: The model that it began with.
        base_model: That model's name in the scores.
        root: The base of the base, of a run that begins with a merged model; else the base.
        checkpoints: Step -> path.
        models: Step -> name in the scores, of the checkpoints that are scored.
        training: How it is trained; None: it is there.
        start: Name of the merge that it begins with.
        level: How many trainings stand before its merges, one behind another.
    """

    series: str
    seed: int | None
    base: str
    base_model: str
    root: str
    checkpoints: Mapping[int, str]
    models: Mapping[int, str]
    training: TrainingConfig | None
    start: str | None
    level: int

    def has_any(self, paths: Iterable[str]) -> bool:
        """Whether one of these is a checkpoint of the run."""
        return not set(self.checkpoints.values()).isdisjoint(paths)

    def __str__(self) -> str:
        return self.series if self.seed is None else f"{self.series}, seed {self.seed}"


@dataclass(frozen=True)
class Merge:
    """A merge that one or more cells ask for.

    Attributes:
        name: Of its directory, and of the model in the scores.
        digest: Of the keys that decide its result.
        config: Its configuration.
        run: The run that it merges checkpoints of; the first one, where runs share checkpoints.
        cells: Who asks for it.
    """

    name: str
    digest: str
    config: MergeConfig
    run: Run
    cells: tuple[Cell, ...]

    @property
    def directory(self) -> Path:
        """Where its record is, and its run directory `run`."""
        return Path(self.config.output).parent

    @property
    def model(self) -> Path:
        """The merged model."""
        return Path(self.config.output) / "model"


@dataclass(frozen=True)
class ScoredModel:
    """A model that is scored, beside the merged ones.

    Attributes:
        name: In the scores.
        path: Directory, hub id or URL.
        base: Of adapters and of shards without a configuration.
        run: The run that it belongs to.
    """

    name: str
    path: str
    base: str
    run: Run


def saved_steps(training: TrainingConfig) -> list[int]:
    """The steps that a training saves, as far as that is known before the data are read."""
    if isinstance(training.save_steps, list) or training.steps is not None:
        total = training.steps or max(training.save_steps)  # type: ignore[arg-type]
        return training.steps_to_save(total)
    raise ConfigError(
        "save_steps: with epochs, name the steps: [10, 20]; how many steps there are depends on "
        "the data"
    )

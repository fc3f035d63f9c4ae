"""The configuration of a study: which experiments there are, and what is made of their scores.

It is validated before anything is loaded. What its parts ask for together (cells, merges, tables)
is checked by `study.plan`. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from arm_ray.config import LocalPath, PositiveInt, Section, read_yaml, to_yaml, validate
from arm_ray.evaluation.settings import EvaluationSettings

Steps = Annotated[list[PositiveInt], Field(min_length=1)]
Labels = str | int | float | list[str | int | float]


class StepOf(Section):
    """A checkpoint of another series of the study, with the same seed."""

    series: str
    """Its name; it begins with the same base."""
    step: PositiveInt
    """One that it saves."""


class SeriesConfig(Section):
    """A training run whose checkpoints are merged: one that the study does, or one that is there.

    It has exactly one of `train` and `checkpoints`.
    """

    train: dict[str, Any] | None = None
    """Keys of the training job, without `model`, `output` and `stop_after`: it is trained once for
    each `seed`, as far as the last checkpoint that is used."""
    job: Literal["sft", "grpo"] = "sft"
    """How the series is trained."""
    checkpoints: dict[PositiveInt, str | StepOf] | None = None
    """Step -> checkpoint of a run that is there; `{seed}` stands for the seed of the axis. Or
    number -> `series` and `step`: a checkpoint of another series, to merge what several runs of one
    base have learned."""
    base: str | None = None
    """The model that the run began with; null: the study's base."""
    start_from: dict[str, Labels] | None = None
    """Begin the training with the merged model of this cell: axis -> label. It names a `series` and
    as much as it takes for one cell; where it names no `seed`, it is that of this series."""
    moments: Literal["new", "kept"] = "new"
    """Of the optimizer, for `start_from`: `kept` takes those of the last candidate of that merge,
    whose series is trained with `save_optimizer: true`."""
    merge: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of all merges of this series."""


class ShownConfig(Section):
    """What a table and a figure have in common."""

    title: str | None = None
    """What stands above it."""
    task: str | None = None
    """The task whose scores are shown, where tasks are no axis of it; null: the first one."""
    metric: str | None = None
    """Which of a task's numbers; null: its main one."""
    value: str = "mean"
    """`mean`; `difference`, from `against`, on the same problems; or what the merges took:
    `seconds`, `forward_seconds`, `merge_seconds`, `iterations`."""
    against: Literal["base", "last_candidate", "best_checkpoint"] | dict[str, Labels] = "base"
    """What `difference` compares with: the series' base, the cell's last candidate, the best of its
    series' scored checkpoints, or the cell that has these labels and is the same otherwise."""
    where: dict[str, Labels] = Field(default_factory=dict)
    """Only cells with these labels: axis -> label, or a list of them."""
    over: list[str] = Field(default_factory=lambda: ["seed", "calibration_seed"])
    """Axes that are averaged over."""
    show: list[Literal["base", "checkpoints"]] = Field(default_factory=list)
    """Models that were not merged, to be shown as well: rows above, or level lines."""


class TableConfig(ShownConfig):
    """A table of scores, for `tables/NAME.md`."""

    rows: Annotated[list[str], Field(min_length=1)]
    """Axes whose labels make the rows; `task` is one."""
    columns: str = "task"
    """The axis whose labels make the columns; `task` is one."""


class FigureConfig(ShownConfig):
    """A figure of scores, for `figures/NAME.svg`."""

    kind: Literal["line", "bars"] = "line"
    """Points with intervals that lines join, or bars side by side."""
    x: str
    """The axis along the bottom; labels that are numbers lie where they belong. `task` is one."""
    lines: str | None = None
    """The axis whose labels have a line or a colour each; null: there is one."""


class StudyConfig(Section):
    """Everything `arm-ray study` needs."""

    output: LocalPath
    """Directory of trainings, merges, scores, tables and figures."""
    base: str | None = None
    """The model that series without a base of their own began with."""
    series: Annotated[dict[str, SeriesConfig], Field(min_length=1)]
    """Name -> a training run."""
    merge: dict[str, Any] = Field(default_factory=dict)
    """Keys that all merges have in common, without `base`, `candidates` and `output`."""
    axes: dict[str, list[Any] | dict[str, Any]]
    """What is varied: every combination is a cell. `series`: names (left out: all); `seed`: of the
    trainings; `calibration_seed`; `candidates`: lists of steps, or for each series such lists; and
    any further axis: label -> dotted keys of the merge."""
    exclude: list[dict[str, Labels]] = Field(default_factory=list)
    """Combinations that are no cells: axis -> label, or a list of them."""
    checkpoints: list[PositiveInt] | dict[str, list[PositiveInt]] = Field(default_factory=list)
    """Steps that are scored beside the candidates, of all series or of each."""
    evaluation: EvaluationSettings
    """How base, checkpoints and merged models are scored."""
    tokenizer: str | None = None
    """Directory of the tokenizer for all prompts; null: that of each series' base."""
    parallel: PositiveInt = 1
    """Cells that are merged at once; each takes such a share of the cluster."""
    batch: PositiveInt | None = None
    """Cells that are merged between two scorings: so many models need room on the disk at once;
    null: all, which starts the engines once."""
    keep_models: bool = False
    """Whether merged models are kept once they are scored."""
    tables: dict[str, TableConfig] = Field(default_factory=dict)
    """Name -> a table."""
    figures: dict[str, FigureConfig] = Field(default_factory=dict)
    """Name -> a figure: needs the extra `study`."""
    figure_format: Literal["svg", "png"] = "svg"
    """What figures are written as."""

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        return to_yaml(self)


def load_study_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a YAML file and apply dotted overrides.

    Raises:
        ConfigError: The file cannot be read, or its content is wrong; all problems are listed.
    """
    return validate(StudyConfig, read_yaml(Path(path)), overrides, source=str(path))

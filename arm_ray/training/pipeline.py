"""The configuration of a pipeline, and what it makes of it for each stage. Pure.

A pipeline is training, merging and evaluation in one directory::

    output/data/        the parts of the data, where they are split
    output/train/       checkpoints
    output/merges/…/    one run directory for each merge
    output/evaluation/  the scores of all of them
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from arm_ray.config import (
    DataConfig,
    EvaluateConfig,
    LocalPath,
    MergeConfig,
    PositiveInt,
    Section,
    TrackingConfig,
    parse_merge_config,
    read_yaml,
    validate,
)
from arm_ray.errors import ConfigError
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.training.config import (
    GrpoConfig,
    SftConfig,
    TrainingConfig,
    parse_training_config,
)


class SplitConfig(DataConfig):
    """Data that are cut into parts: equal questions are always in one part."""

    shares: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        default_factory=lambda: {"train": 0.8, "calibration": 0.1, "validation": 0.1}
    )
    """Part -> its share; `train` and `calibration` are used by the stages of these names, and all
    of them are files `data/PART.jsonl` of the output."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice which question goes into which part."""


class PipelineConfig(Section):
    """Everything `arm-ray pipeline` needs."""

    base: str
    """The model that is trained."""
    output: LocalPath
    """Directory of all stages."""
    data: SplitConfig | None = None
    """Split these data first; null: `train.data` and `calibration` name their own."""
    job: Literal["sft", "grpo"] = "sft"
    """How the base is trained."""
    train: dict[str, Any]
    """Keys of the training job, without `model` and `output`."""
    candidates: Annotated[list[PositiveInt], Field(min_length=1)]
    """Steps whose checkpoints are merged."""
    merges: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name in the scores -> keys of a merge, without `base`, `candidates` and `output`."""
    calibration: dict[str, Any] | None = None
    """The `calibration` section of all merges that have none of their own."""
    evaluation: EvaluationSettings
    """How base, checkpoints and merged models are scored."""
    tokenizer: str | None = None
    """Directory of the tokenizer for all prompts; null: the base's."""
    tracking: TrackingConfig = TrackingConfig()
    """Of all stages that have none of their own; each is a run, NAME-STAGE."""
    train_on: bool = False
    """Train first only as far as the last candidate; go on to the end of the schedule after the
    merges have been scored, and score its checkpoints as well."""


class Stages:
    """The configurations of a pipeline's stages, each checked as its own command checks it.

    Args:
        config: The pipeline.
        source: File that it is from, for errors.

    Raises:
        ConfigError: A key or value of a stage is wrong, or the stages do not fit each other.
    """

    def __init__(self, config: PipelineConfig, source: str) -> None:
        self.config = config
        self.output = config.output.expanduser().resolve()
        self.training = self._training(source)
        self.merges = {
            name: self._merge(name, content, source) for name, content in config.merges.items()
        }
        runs = [merge.output for merge in self.merges.values()]
        if len(set(runs)) < len(runs):
            raise ConfigError(
                "two merges would have the same directory",
                where=f"{source}: merges",
                got=", ".join(self.merges),
                expected="names that differ in letters or digits",
            )

    def part(self, name: str) -> Path:
        """File of a part of the split data."""
        return self.output / "data" / f"{name}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Directory of a checkpoint."""
        return self.output / "train" / f"checkpoint-{step}"

    def first_training(self) -> TrainingConfig:
        """The training up to where the merges begin."""
        if not self.config.train_on:
            return self.training
        return self.training.model_copy(update={"stop_after": max(self.config.candidates)})

    def evaluation(self, steps: Sequence[int]) -> EvaluateConfig:
        """The evaluation of the base, the checkpoints of some steps, and the merged models."""
        models = {"base": self.config.base}
        models |= {f"checkpoint-{step}": str(self.checkpoint(step)) for step in steps}
        models |= {name: str(Path(m.output) / "model") for name, m in self.merges.items()}
        return EvaluateConfig(
            models=models,
            output=str(self.output / "evaluation"),
            adapter_base=self.config.base,
            tokenizer=self.config.tokenizer or self.config.base,
            evaluation=self.config.evaluation,
            tracking=self._tracking("evaluation"),
        )

    def _tracking(self, stage: str) -> TrackingConfig:
        given = self.config.tracking
        return given.model_copy(update={"run": f"{given.run or self.output.name}-{stage}"})

    def _training(self, source: str) -> TrainingConfig:
        config = self.config
        content = copy.deepcopy(config.train)
        _refuse(content, ("model", "output", "stop_after"), f"{source}: train")
        content |= {"model": config.base, "output": str(self.output / "train")}
        content.setdefault("tracking", self._tracking("train").model_dump(mode="json"))
        if config.data is not None:
            self._need_part("train", source)
            columns = config.data.model_dump(mode="json", exclude={"shares", "seed", "path"})
            content["data"] = {**columns, "path": str(self.part("train"))} | (
                content.get("data") or {}
            )
        model = SftConfig if config.job == "sft" else GrpoConfig
        parsed: TrainingConfig = parse_training_config(model, content, source=f"{source}: train")
        if parsed.steps is not None:
            saved = parsed.steps_to_save()
            missing = [step for step in config.candidates if step not in saved]
            if missing:
                raise ConfigError(
                    f"no checkpoint is saved at step {missing[0]}",
                    where=f"{source}: candidates",
                    got=config.candidates,
                    expected="steps of train.save_steps: " + ", ".join(map(str, saved)),
                )
        if config.train_on and not parsed.save_optimizer:
            raise ConfigError(
                "training on needs the optimizer's state",
                where=f"{source}: train.save_optimizer",
                got="false",
                expected="true with train_on",
            )
        limit = parsed.save_total_limit
        if limit is not None and limit < len(config.candidates):
            raise ConfigError(
                "checkpoints that are merged would be removed",
                where=f"{source}: train.save_total_limit",
                got=limit,
                expected=f"at least {len(config.candidates)}, or null",
            )
        return parsed

    def _merge(self, name: str, given: dict[str, Any], source: str) -> MergeConfig:
        where = f"{source}: merges: {name}"
        content = copy.deepcopy(given)
        _refuse(content, ("base", "candidates", "output", "push_to_hub"), where)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        if not slug or "/" in name:
            raise ConfigError(
                "a merge's name is used for a directory",
                where=where,
                got=repr(name),
                expected="letters or digits, and no slash",
            )
        calibration = dict(self.config.calibration or {})
        if self.config.data is not None and "calibration" in self.config.data.shares:
            columns = self.config.data.model_dump(mode="json", exclude={"shares", "seed", "path"})
            calibration = {**columns, "path": str(self.part("calibration"))} | calibration
        if calibration and "calibration" not in content:
            content["calibration"] = calibration
        content |= {
            "base": self.config.base,
            "candidates": [str(self.checkpoint(step)) for step in self.config.candidates],
            "output": str(self.output / "merges" / slug),
        }
        content.setdefault("tracking", self._tracking(slug).model_dump(mode="json"))
        return parse_merge_config(content, source=where)

    def _need_part(self, name: str, source: str) -> None:
        assert self.config.data is not None
        if name not in self.config.data.shares:
            raise ConfigError(
                f"the split has no part {name!r}",
                where=f"{source}: data.shares",
                got=", ".join(self.config.data.shares),
                expected=f"a share for {name!r}",
            )


def load_pipeline_config(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a YAML file and apply dotted overrides.

    Raises:
        ConfigError: The file cannot be read, or its content is wrong; all problems are listed.
    """
    return validate(PipelineConfig, read_yaml(Path(path)), overrides, source=str(path))


def _refuse(content: dict[str, Any], keys: Sequence[str], where: str) -> None:
    given = [key for key in keys if key in content]
    if given:
        raise ConfigError(
            f"{given[0]!r} is set by the pipeline",
            where=where,
            got=content[given[0]],
            hint="remove it here; the pipeline's own keys decide",
        )

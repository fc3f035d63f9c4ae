"""What all sections of a configuration share, and the sections that several jobs have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from arm_ray.storage.urls import is_url

PositiveInt = Annotated[int, Field(ge=1)]
DTypeOrAuto = Literal["auto", "float32", "bfloat16", "float16"]
StorageDType = Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"]


def _no_url(value: Any) -> Any:
    if isinstance(value, str) and is_url(value):
        raise ValueError("a URL is not taken here: name a directory on a disk (docs/storage.md)")
    return value


# Directories that are worked in, and cannot be behind a URL.
LocalStr = Annotated[str, BeforeValidator(_no_url)]
LocalPath = Annotated[Path, BeforeValidator(_no_url)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values keep their types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Where rows of text are, and which of their columns are used."""

    path: str
    """A JSON Lines or Parquet file (perhaps gzipped), a directory, glob pattern or URL of them, a
    directory written by `datasets.save_to_disk`, or a Hugging Face dataset id: `owner/name`,
    `owner/name/config`; a directory, and a dataset, with an optional `:split`."""
    split: str | None = None
    """Which part of a dataset, or of a directory with a directory or files for each of them
    (`train/`, `test-00000-of-00001.parquet`); null: the only one, or the `train` of a dataset."""
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"
    """What a row holds; auto: as its columns say. Messages are read as `role` and `content`, and as
    the `from` and `value` of ShareGPT."""
    prompt_column: str = "prompt"
    """Column of the prompt, for `format: prompt_completion`."""
    completion_column: str = "completion"
    """Column of the completion, for `format: prompt_completion`."""
    text_column: str = "text"
    """Column of plain text, for `format: text`."""
    messages_column: str = "messages"
    """Column of the chat's messages, for `format: messages`."""


class MlflowConfig(Section):
    """A run in MLflow: needs the extra `mlflow`."""

    experiment: str = "arm_ray"
    """Name of the experiment that the run belongs to."""
    tracking_uri: str | None = None
    """Address of the server; null: MLFLOW_TRACKING_URI, else MLflow's own default."""


class WandbConfig(Section):
    """A run in Weights & Biases: needs the extra `wandb`."""

    project: str = "arm_ray"
    """Name of the project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the default of whoever is logged in."""
    mode: Literal["online", "offline"] = "online"
    """offline: kept in `wandb/` of the run's directory, for `wandb sync`."""


class TrackingConfig(Section):
    """Who is told numbers of the run, beside Ray's metrics and TensorBoard: see docs/metrics.md."""

    run: str | None = None
    """Name of the run in all of them; null: the name of its directory."""
    mlflow: MlflowConfig | None = None
    wandb: WandbConfig | None = None


def scratch_path(given: str | None) -> Path:
    """What `runtime.scratch` stands for on the node that asks."""
    if given is not None:
        return Path(given).expanduser()
    return Path(tempfile.gettempdir()) / f"arm_ray-{os.getuid()}"

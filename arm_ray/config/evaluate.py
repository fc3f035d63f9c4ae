"""The configuration of `arm-ray evaluate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arm_ray.config.reading import to_yaml
from arm_ray.config.sections import LocalStr, Section, TrackingConfig
from arm_ray.evaluation.settings import EvaluationSettings


class EvaluateConfig(Section):
    """Everything `arm-ray evaluate` needs."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Name in the results -> directory of a model, of a LoRA adapter, or of a trainer's shards."""
    output: str
    """Directory of the results, or their URL."""
    adapter_base: str | None = None
    """The base of models that are adapters, or shards without a configuration."""
    tokenizer: str | None = None
    """Directory of the tokenizer for all models; null: each model's own."""
    scratch: LocalStr | None = None
    """Directory on the nodes of engines for copies of models that are not there, as
    `runtime.scratch` of a merge; null: below the system's directory for temporary files."""
    evaluation: EvaluationSettings
    tracking: TrackingConfig = TrackingConfig()

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        return to_yaml(self)

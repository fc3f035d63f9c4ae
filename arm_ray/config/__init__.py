"""The configurations of merges and evaluations; trainings and attach have theirs beside them."""

from arm_ray.config.evaluate import EvaluateConfig
from arm_ray.config.merge import (
    CalibrationConfig,
    MergeConfig,
    PrecisionConfig,
    PushConfig,
    ScheduleConfig,
    config_difference,
    load_merge_config,
    parse_merge_config,
    state_settings,
)
from arm_ray.config.reading import overridden, read_yaml, to_yaml, validate
from arm_ray.config.runtime import RuntimeConfig
from arm_ray.config.sections import (
    DataConfig,
    DTypeOrAuto,
    LocalPath,
    LocalStr,
    MlflowConfig,
    PositiveInt,
    Section,
    StorageDType,
    TrackingConfig,
    WandbConfig,
    scratch_path,
)

__all__ = [
    "CalibrationConfig",
    "DTypeOrAuto",
    "DataConfig",
    "EvaluateConfig",
    "LocalPath",
    "LocalStr",
    "MergeConfig",
    "MlflowConfig",
    "PositiveInt",
    "PrecisionConfig",
    "PushConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "Section",
    "StorageDType",
    "TrackingConfig",
    "WandbConfig",
    "config_difference",
    "load_merge_config",
    "overridden",
    "parse_merge_config",
    "read_yaml",
    "scratch_path",
    "state_settings",
    "to_yaml",
    "validate",
]

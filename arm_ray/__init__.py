"""arm_ray merges a training run's own checkpoints into a better model, without training.

It implements Streaming Merging with ARM (Activation-guided Rotation-aware Merging,
arXiv 2602.03237) on Ray. The names below are stable: see docs/api.md.
"""

from typing import TYPE_CHECKING

from arm_ray.lazy import lazily

if TYPE_CHECKING:
    from arm_ray.api import (
        AttachResult,
        EvaluateResult,
        MergeResult,
        attach,
        evaluate,
        load_config,
        merge,
        plan,
    )
    from arm_ray.errors import ArmRayError
    from arm_ray.report.run_facts import Score

__version__ = "0.1.0"
__all__ = [
    "ArmRayError",
    "AttachResult",
    "EvaluateResult",
    "MergeResult",
    "Score",
    "__version__",
    "attach",
    "evaluate",
    "load_config",
    "merge",
    "plan",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ArmRayError": "arm_ray.errors",
        "AttachResult": "arm_ray.api",
        "EvaluateResult": "arm_ray.api",
        "MergeResult": "arm_ray.api",
        "Score": "arm_ray.report.run_facts",
        "attach": "arm_ray.api",
        "evaluate": "arm_ray.api",
        "load_config": "arm_ray.api",
        "merge": "arm_ray.api",
        "plan": "arm_ray.api",
    },
)

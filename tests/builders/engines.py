"""A real vLLM engine, for the tests of what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from arm_ray.evaluation.engine import ENVIRONMENT, Completion, Engine, Request
from arm_ray.evaluation.settings import EngineSettings
from arm_ray.noise import quiet_environment
from arm_ray.runtime.cluster.calls import EVALUATOR, get_results

SETTINGS = EngineSettings(kv_cache_gb=0.05, max_model_len=64, dtype="float32")


class Watched(Engine):
    """An engine that also speaks before anything is loaded."""

    def generate_as_started(self, requests: list[Request]) -> list[Completion]:
        self.version = "default"
        return self.generate(requests)


class Served:
    """An engine in a process of its own, as in a run: vLLM changes the process it is in."""

    def __init__(self, model: Path, tokenizer: Path, settings: EngineSettings = SETTINGS) -> None:
        env = {**ENVIRONMENT, **quiet_environment(), "OMP_NUM_THREADS": "1"}
        actor: Any = ray.remote(Watched)
        self.actor = actor.options(num_cpus=1, runtime_env={"env_vars": env}).remote(
            str(model), str(tokenizer), settings
        )

    def __getattr__(self, name: str) -> Any:
        return lambda *args: get_results([getattr(self.actor, name).remote(*args)], EVALUATOR)[0]

    def close(self) -> None:
        ray.kill(self.actor)

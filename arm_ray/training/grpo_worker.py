"""What one worker of a GRPO run does. Imports no Ray."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.errors import ConfigError
from arm_ray.training.config import GrpoConfig
from arm_ray.training.grpo_data import checked_reward, load_reward
from arm_ray.training.trainer import (
    CheckpointMixin,
    StepCallback,
    TrainingJob,
    argument_values,
    load_model,
    note,
    plan_resumption,
    prepare_process,
)


class GrpoTrainer(CheckpointMixin, GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's trainer with our schedule and checkpoints."""

    def __init__(self, job: TrainingJob, **kwargs: Any) -> None:
        self.job = job
        super().__init__(**kwargs)


def train_grpo(job: TrainingJob, prompts: list[dict[str, Any]]) -> None:
    """Train in this worker until the last step of the session; collective over all workers.

    Args:
        job: What to do.
        prompts: As `grpo_data.Prompts.rows`.

    Raises:
        ArmRayError: As `sft_worker.train_sft`; or a reward that fails.
    """
    config: GrpoConfig = job.config
    position = prepare_process(job)
    plan = plan_resumption(job, position)
    if not plan.missing:
        return
    arguments = GRPOConfig(
        **argument_values(job, position.world),
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        beta=config.beta,
        **_generation(job),
    )
    model, _ = load_model(job, label_positions_only=False)
    note(job, position, [f"going on after step {plan.step}"] if plan.checkpoint else [])
    trainer = GrpoTrainer(
        job,
        model=model,
        args=arguments,
        reward_funcs=reward_function(config),
        train_dataset=Dataset.from_list(prompts),
        processing_class=load_tokenizer(str(job.model)),
        callbacks=[StepCallback(job, plan, position)],
    )
    trainer.train(resume_from_checkpoint=plan.checkpoint)


def _generation(job: TrainingJob) -> dict[str, Any]:
    """What generates: vLLM within this process where there are CUDA and vLLM."""
    wanted = job.config.generation
    there = job.device == "cuda" and importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not there:
        raise ConfigError(
            "vLLM cannot generate here",
            where="generation",
            got=f"device {job.device}, vLLM {'installed' if there else 'or CUDA missing'}",
            expected="CUDA and vLLM, or generation: transformers",
        )
    if wanted == "transformers" or not there:
        return {"use_vllm": False}
    return {"use_vllm": True, "vllm_mode": "colocate"}


def reward_function(config: GrpoConfig) -> Callable[..., list[float]]:
    """The reward as TRL calls it: with lists of prompts, completions and columns."""
    reward = load_reward(config)

    def rewards(
        prompts: list[Any],
        completions: list[Any],
        where: list[str],
        row: list[str],
        **_columns: Any,
    ) -> list[float]:
        return [
            checked_reward(
                reward, _text(completion), {"prompt": prompt, "where": place, "row": content}
            )
            for prompt, completion, place, content in zip(
                prompts, completions, where, row, strict=True
            )
        ]

    return rewards


def _text(completion: Any) -> str:
    """A completion's text; of a chat, that of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)

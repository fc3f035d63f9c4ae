"""The configurations of the training jobs: one YAML file each, with dotted overrides.

They are validated before anything is loaded. Nothing heavy is imported here.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field

from arm_ray.config import (
    DataConfig,
    LocalPath,
    PositiveInt,
    Section,
    TrackingConfig,
    overridden,
    read_yaml,
    validate,
)
from arm_ray.errors import ConfigError
from arm_ray.identity import NOTHING, RESULT, Decides, identity
from arm_ray.presets import merged

ConfigT = TypeVar("ConfigT", bound="TrainingConfig")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]


class LoraConfig(Section):
    """Training of a low-rank adapter instead of all weights: W + (alpha / rank) B A."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: Positive = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the adapter's inputs that are set to zero in training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of modules, `q_proj` say; `all-linear`: every linear module but the `lm_head`."""


class TrainRuntimeConfig(Section):
    """Where and with what the training runs. Only `zero_stage` decides the result."""

    DECIDES: ClassVar[Decides] = NOTHING

    workers: Literal["auto"] | PositiveInt = "auto"
    """Processes that share a batch; auto: one per GPU of the cluster, or one without GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    zero_stage: Annotated[Literal[0, 3], RESULT] = 0
    """0: every worker holds the whole model. 3: DeepSpeed ZeRO-3 shards the weights, gradients and
    optimizer over the workers."""
    zero_gather: bool = True
    """False: checkpoints of a ZeRO-3 run hold its shards alone, and no gathered weights."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: ZeRO-3 keeps the optimizer in host memory."""
    cpus_per_worker: Literal["auto"] | PositiveInt = "auto"
    """CPU slots and threads of a worker; auto: without GPUs the node's, shared by the workers."""
    max_failures: Count = 2
    """How often lost workers are replaced; each time, the last complete checkpoint goes on."""


class TrainingConfig(Section):
    """What all training jobs have in common."""

    model: str
    """Directory of the model to start from, or a model on the hub."""
    output: Annotated[LocalPath, NOTHING]
    """Directory of the run: checkpoints, log and resolved configuration."""
    data: DataConfig
    optimizer_from: LocalPath | None = None
    """A checkpoint that the same job saved with `save_optimizer`: the run begins with its moments
    of AdamW. For a `model` that was merged of checkpoints of that run. null: they begin at zero."""
    learning_rate: Positive
    """Of AdamW, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the linear warm-up; `linear` and `cosine` fall to zero at the last step."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from zero, linearly."""
    steps: PositiveInt | None = None
    """Optimizer steps of the whole schedule; or give `epochs`."""
    epochs: Positive | None = None
    """Passes over the rows; the last step is filled up with rows of the next pass."""
    save_steps: PositiveInt | list[PositiveInt]
    """Every so many steps, or exactly these steps."""
    save_total_limit: Annotated[PositiveInt | None, NOTHING] = None
    """Checkpoints kept; older ones are removed. null: all."""
    save_optimizer: bool = True
    """False: checkpoints hold the model alone, and a run that was killed starts over."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights in checkpoints. Training goes on with the exact ones where the optimizer's
    state is saved, so that rounding never enters the run."""
    batch_size: PositiveInt = 16
    """Samples of one step, over all workers."""
    micro_batch_size: Annotated[Literal["auto"] | PositiveInt, NOTHING] = "auto"
    """Samples in one forward pass of a worker; auto: its whole part of the batch."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of AdamW; norms and biases have none."""
    gradient_clip: Positive = 1.0
    """Longest gradient; a longer one is scaled down to this norm."""
    seed: Count = 0
    """Of the order of the rows, and of whatever else is random."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto: bfloat16 where the devices multiply it by themselves, else
    float32; a run that goes on keeps what it began with. Weights and AdamW's moments are float32;
    ZeRO-3 with bfloat16 keeps bfloat16 weights beside float32 masters."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """`eager` is the faster one for short bfloat16 rows on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter; checkpoints are PEFT adapters."""
    apart_from: list[str] = Field(default_factory=list)
    """Data (calibration, validation, benchmarks) whose questions must not be trained on."""
    on_overlap: Literal["error", "drop", "warn"] = "drop"
    """What happens where the training rows hold such questions: an error, these rows are left out,
    or they are kept with a warning."""
    stop_after: Annotated[PositiveInt | None, NOTHING] = None
    """Halt after this step of the schedule; a later run with a larger value, or none, goes on."""
    log_every: Annotated[PositiveInt, NOTHING] = 5
    """Steps between two printed lines; where steps are slow, a line comes sooner."""
    preset: Annotated[str | None, NOTHING] = None
    """Where keys that are not given come from, instead of the defaults: see `TRAINING_PRESETS`."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()
    tracking: Annotated[TrackingConfig, NOTHING] = TrackingConfig()

    def steps_to_save(self, total: int | None = None) -> list[int]:
        """The steps after which a checkpoint is written, ascending.

        Args:
            total: Steps of the whole schedule; None: `steps`.

        Raises:
            ConfigError: There is none, or one is outside of the schedule.
        """
        total = total if total is not None else self.steps
        assert total is not None, "epochs need the number of rows"
        if isinstance(self.save_steps, int):
            chosen = list(range(self.save_steps, total + 1, self.save_steps))
        else:
            chosen = sorted(set(self.save_steps))
        if not chosen or chosen[-1] > total:
            raise ConfigError(
                "no checkpoint, or one outside the run, would be saved",
                where="save_steps",
                got=self.save_steps,
                expected=f"steps between 1 and the last one, {total}",
            )
        return chosen

    def session_saves(self, total: int) -> list[int]:
        """The checkpoints there are at the end of this session; its last is where it ends."""
        saves = self.steps_to_save(total)
        if self.stop_after is None or self.stop_after >= saves[-1]:
            return saves
        return [*(step for step in saves if step < self.stop_after), self.stop_after]

    def identity(self) -> dict[str, Any]:
        """The keys that decide the result, with their values, as JSON has them."""
        decides = identity(type(self), self.model_dump(mode="json"))
        if self.optimizer_from is None:
            # So that runs have the names that they had before there was this key.
            decides.pop("optimizer_from")
        return decides

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


class SftConfig(TrainingConfig):
    """Everything `python -m arm_ray.jobs.sft` needs."""

    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row, the eos included; with packing, of a bin."""
    too_long: Literal["error", "drop", "cut"] = "drop"
    """What happens to longer rows; `cut` removes their end."""
    packing: bool = False
    """Put several rows into one sample of `max_length` tokens, without attention between them."""


class GrpoConfig(TrainingConfig):
    """Everything `python -m arm_ray.jobs.grpo` needs."""

    reward: str = "math"
    """`math` compares the final answer with `answer_column`; `path/file.py:function` is called
    with (completion text, row) and returns a number."""
    answer_column: str = "answer"
    """Column of the right answer."""
    math_mode: Literal["strict", "qwen_compat"] = "strict"
    """Which of the two math graders decides: see docs/evaluation.md."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt. `batch_size` counts completions."""
    max_prompt_length: PositiveInt = 1024
    """Tokens; longer prompts are handled by `too_long`."""
    too_long: Literal["error", "drop"] = "drop"
    """What happens to longer prompts."""
    max_completion_length: PositiveInt = 256
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    """At which completions are drawn."""
    beta: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the Kullback-Leibler penalty against the starting model; 0 loads no second model."""
    generation: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vLLM within the workers where there are CUDA and vLLM."""


# The paper's fine-tuning. Open: warm-up, decay and schedule, and LoRA's alpha and modules.
_PAPER: dict[str, Any] = {
    "learning_rate": 1.0e-5,
    "batch_size": 128,
    "micro_batch_size": 1,
    "epochs": 5.0,
    "max_length": 8192,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "runtime": {"zero_stage": 3},
}
TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "paper/sft-full": _PAPER,
    "paper/sft-lora": merged(_PAPER, {"lora": {"rank": 16}}),
}


def load_training_config(
    model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()
) -> ConfigT:
    """Read a YAML file, apply dotted overrides and validate the whole.

    Args:
        model: `SftConfig` or `GrpoConfig`.
        path: The YAML file.
        overrides: `section.key=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: The file cannot be read, or its content is wrong; all problems are listed.
    """
    return parse_training_config(model, read_yaml(Path(path)), overrides, source=str(path))


def parse_training_config(
    model: type[ConfigT],
    content: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "config",
) -> ConfigT:
    """Validate configuration content that is already parsed. See `load_training_config`."""
    content = overridden(content, overrides)
    name = content.get("preset")
    if isinstance(name, str):
        content = _over_preset(name, content, source)
    config = validate(model, content, source=source)
    problems = _problems(config)
    if problems:
        raise ConfigError(
            "\n".join(
                ["the configuration asks for what cannot be", *(f"  - {p}" for p in problems)]
            ),
            where=source,
        )
    return config


def _over_preset(name: str, content: dict[str, Any], source: str) -> dict[str, Any]:
    if name not in TRAINING_PRESETS:
        close = difflib.get_close_matches(name, TRAINING_PRESETS, n=1)
        raise ConfigError(
            f"there is no preset {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            where=f"{source}: preset",
            got=name,
            expected="one of " + ", ".join(TRAINING_PRESETS),
        )
    under = copy.deepcopy(TRAINING_PRESETS[name])
    # The two say the same thing in two ways: the file's takes the preset's place.
    if content.get("steps") is not None:
        under.pop("epochs", None)
    return merged(under, content)


def _problems(config: TrainingConfig) -> list[str]:
    problems = []
    if (config.steps is None) == (config.epochs is None):
        problems.append("steps, epochs: give exactly one of the two")
    elif config.steps is not None:
        try:
            config.steps_to_save()
        except ConfigError as error:
            problems.append(f"save_steps: {error.what}; got {error.got}, {error.expected}")
    runtime = config.runtime
    if runtime.zero_stage != 3:
        if not runtime.zero_gather:
            problems.append("runtime.zero_gather: false needs runtime.zero_stage: 3")
        if runtime.offload != "none":
            problems.append("runtime.offload: cpu needs runtime.zero_stage: 3")
    elif not runtime.zero_gather and not config.save_optimizer:
        problems.append(
            "save_optimizer: false leaves nothing in the checkpoints where runtime.zero_gather "
            "is false"
        )
    if config.optimizer_from is not None and runtime.zero_stage == 3:
        problems.append("optimizer_from: cannot be read with runtime.zero_stage: 3; remove one")
    if config.optimizer_from is not None and config.lora is not None:
        problems.append("optimizer_from: a new adapter has no moments to begin with; remove one")
    if runtime.workers != "auto":
        problems += batch_problems(config, runtime.workers)
    if (
        isinstance(config, SftConfig)
        and config.packing
        and config.micro_batch_size
        not in (
            "auto",
            1,
        )
    ):
        problems.append("micro_batch_size: packed samples go one by one; set it to 1 or auto")
    if isinstance(config, GrpoConfig) and config.batch_size % config.num_generations:
        problems.append(
            f"batch_size: got {config.batch_size} completions, which are no multiple of "
            f"num_generations = {config.num_generations}"
        )
    return problems


def batch_problems(config: TrainingConfig, workers: int) -> list[str]:
    """What keeps a batch from being shared evenly by so many workers."""
    if config.batch_size % workers:
        return [f"batch_size: got {config.batch_size}, no multiple of {workers} workers"]
    share, micro = config.batch_size // workers, config.micro_batch_size
    if micro != "auto" and share % micro:
        return [
            f"micro_batch_size: got {micro}, but a worker's {share} samples of a batch "
            "are no multiple of it"
        ]
    return []


def learning_rate_factor(config: TrainingConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied with at a step.

    With s the step from 1, w the warm-up steps and S all steps: s / w up to step w; then 1
    (constant), 1 - d (linear) or (1 + cos(pi d)) / 2 (cosine), where d = (s - w) / (S - w).

    Args:
        config: Warm-up and schedule.
        step: The step, from 1.
        total: Steps of the whole schedule.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(total - config.warmup_steps, 1))
    if config.schedule == "linear":
        return 1.0 - done
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0

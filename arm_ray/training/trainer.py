"""What the Hugging Face trainers of both jobs have in common. Runs in a worker; imports no Ray.

A worker finds RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in its environment, and
torch.distributed initialised. One module, because all of it adapts one library, the trainers of
transformers, to saves and resumptions that are exact.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from arm_ray.errors import NumericalError, RunDirectoryError
from arm_ray.noise import is_verbose
from arm_ray.storage.atomic import write_text
from arm_ray.storage.regular import json_in
from arm_ray.training import label_loss, memory
from arm_ray.training.config import TrainingConfig, learning_rate_factor
from arm_ray.training.records import (
    LOG_NAME,
    OPTIMIZER_NAME,
    missing_saves,
    remove_incomplete,
    resume_point,
    truncate_log,
)

_EXACT_NAME = "training_weights.pt"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                   "MASTER_PORT")  # fmt: skip


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs to know.

    Attributes:
        config: The configuration.
        model: Directory of the model to start from.
        output: The run's directory, absolute.
        scratch: A directory of this session, on the same storage, for errors and notes.
        device: `cpu` or `cuda`.
        total_steps: Steps of the whole schedule.
        saves: Steps that are saved in this session; the last is where it ends.
        length: Tokens of the longest sample.
        threads: CPU threads of the worker.
    """

    config: Any
    model: Path
    output: Path
    scratch: Path
    device: str
    total_steps: int
    saves: tuple[int, ...]
    length: int
    threads: int


@dataclass(frozen=True)
class Ranks:
    """Where this worker stands among the others."""

    rank: int
    world: int
    local_world: int


@dataclass(frozen=True)
class ResumePlan:
    """What is left to do: the checkpoint to go on from, if any, and the steps still to save."""

    step: int
    checkpoint: str | None
    missing: tuple[int, ...]


def ranks() -> Ranks:
    """This worker's rank, from the environment."""
    return Ranks(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def batch_parts(config: TrainingConfig, world: int) -> tuple[int, int]:
    """Samples of a worker's forward pass, and forward passes of a step."""
    share = config.batch_size // world
    micro = share if config.micro_batch_size == "auto" else config.micro_batch_size
    if getattr(config, "packing", False):
        micro = 1
    return micro, share // micro


def prepare_process(job: TrainingJob) -> Ranks:
    """Set up threads, seeds and environment, before anything else uses torch.

    Raises:
        PlacementError: The training will not fit into memory.
    """
    # Squared gradients of rare tokens' rows are denormal numbers, on which a CPU is many times
    # slower. Threads take the setting from the one that starts them, so it comes first.
    torch.set_flush_denormal(True)
    torch.set_num_threads(job.threads)
    # A worker of Ray Train may have imported it before the variables were set.
    if not is_verbose():
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
    position = ranks()
    config: TrainingConfig = job.config
    _check_memory(job, position)
    if job.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = str(position.local_world)
    if position.world == 1 and config.runtime.zero_stage == 0:
        # As distributed training of one, every gradient would be copied and reduced for nothing.
        for name in _RANK_VARIABLES:
            os.environ.pop(name, None)
    transformers.set_seed(config.seed)
    return position


def _check_memory(job: TrainingJob, position: Ranks) -> None:
    micro, _ = batch_parts(job.config, position.world)
    needed = memory.estimate(
        job.model, job.config, workers=position.world, micro_batch=micro, length=job.length
    )
    if job.device == "cuda":
        free, sharing, where = int(torch.cuda.mem_get_info()[0]), 1, "GPU memory"
    else:
        free, sharing = memory.free_host_bytes(), position.local_world
        where = "memory of a node"
    memory.check(needed, job.config, free=free, sharing=sharing, where=where)
    # Nobody loads before everybody has looked.
    _barrier(position)


def _barrier(position: Ranks) -> None:
    if position.world > 1:
        torch.distributed.barrier()


def plan_resumption(job: TrainingJob, position: Ranks) -> ResumePlan:
    """Clean up after a killed run, and decide where to go on: on rank 0, told to the others.

    Raises:
        RunDirectoryError: The shards of the last checkpoint need another number of workers.
    """
    found: list[Any] = [None]
    if position.rank == 0:
        remove_incomplete(job.output)
        missing = missing_saves(job.output, job.saves, job.config.save_total_limit)
        point = resume_point(job.output, missing) if job.config.save_optimizer else None
        step, path = point if point else (0, None)
        found[0] = ResumePlan(step, str(path) if path else None, tuple(missing))
    if position.world > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    plan: ResumePlan = found[0]
    if plan.checkpoint and job.config.runtime.zero_stage == 3:
        _check_shards(Path(plan.checkpoint), position.world)
    return plan


def _check_shards(checkpoint: Path, world: int) -> None:
    shards = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if shards != world:
        raise RunDirectoryError(
            "a ZeRO-3 run goes on with the workers that it began with",
            where=checkpoint,
            got=f"{world} workers, and optimizer shards of {shards}",
            expected=f"{shards} workers",
            hint=f"set runtime.workers to {shards}, or choose another output",
        )


def deepspeed_config(config: TrainingConfig, world: int) -> dict[str, Any] | None:
    """DeepSpeed's configuration, or None without ZeRO."""
    if config.runtime.zero_stage != 3:
        return None
    micro, passes = batch_parts(config, world)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": config.runtime.zero_gather,
    }
    if config.runtime.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "train_batch_size": config.batch_size,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bfloat16"},
        # AdamW is torch's, so that no extension has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def argument_values(job: TrainingJob, world: int) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments` and its subclasses."""
    config: TrainingConfig = job.config
    micro, passes = batch_parts(config, world)
    on_cpu = job.device == "cpu"
    zero = deepspeed_config(config, world)
    values: dict[str, Any] = {
        "output_dir": str(job.output),
        "max_steps": job.total_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": passes,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.gradient_clip,
        "seed": config.seed,
        "bf16": config.precision == "bfloat16",
        "fp16": False,
        # Accelerate takes DeepSpeed for a thing of GPUs; see `_configure_zero_on_cpu`.
        "use_cpu": on_cpu and not zero,
        "optim": "adamw_torch" if zero else "adamw_torch_fused",
        "gradient_checkpointing": config.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        # `StepCallback` says when.
        "save_strategy": "no",
        "save_total_limit": config.save_total_limit,
        "save_only_model": not config.save_optimizer,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
    }
    if config.gradient_checkpointing:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if zero:
        values["deepspeed"] = zero
        if on_cpu:
            _configure_zero_on_cpu()
            values["accelerator_config"] = {"use_configured_state": True}
    elif on_cpu and world > 1:
        values["ddp_backend"] = "gloo"
    return values


def _configure_zero_on_cpu() -> None:
    from accelerate import PartialState

    # With `cpu`, Accelerate leaves DeepSpeed out; without, it knows no backend unless told.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def load_model(job: TrainingJob, *, label_positions_only: bool = True) -> tuple[Any, str | None]:
    """The model to train, with an adapter where one is trained.

    With ZeRO-3 it is to be called after the training arguments are made: then the weights are
    sharded while they are loaded.

    Returns:
        The model, and why it computes all logits, or None.
    """
    config: TrainingConfig = job.config
    low = config.runtime.zero_stage == 3 and config.precision == "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=torch.bfloat16 if low else torch.float32,
        attn_implementation=config.attention,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )
    reason = label_loss.patch(model) if label_positions_only else None
    if config.lora is not None:
        import peft

        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,  # type: ignore[arg-type, unused-ignore]
                lora_dropout=config.lora.dropout,
                target_modules=config.lora.target_modules,
                task_type="CAUSAL_LM",
            ),
        )
    return model, reason


def take_moments(optimizer: Any, checkpoint: Path) -> None:
    """Give an optimizer the moments of another one; its own learning rate and decay stay.

    Args:
        optimizer: AdamW over the parameters of the model, in the trainer's order.
        checkpoint: Where the trainer of the same model saved its optimizer.

    Raises:
        RunDirectoryError: They are of other parameters.
    """
    path = checkpoint / OPTIMIZER_NAME
    moments = torch.load(path, map_location="cpu", weights_only=True)["state"]
    content = optimizer.state_dict()
    groups = [(g["params"], h["params"]) for g, h in
              zip(content["param_groups"], optimizer.param_groups, strict=True)]  # fmt: skip
    shapes = {
        index: tuple(parameter.shape)
        for indices, parameters in groups
        for index, parameter in zip(indices, parameters, strict=True)
    }
    found = {index: tuple(state["exp_avg"].shape) for index, state in moments.items()}
    if found != shapes:
        raise RunDirectoryError(
            "the moments of the optimizer are of another model, or of other parameters of it",
            where=path,
            got=f"moments of {len(found)} parameters",
            expected=f"moments of {len(shapes)} parameters, each of its parameter's shape",
            hint="name a checkpoint of a run that trained the same parameters, or remove "
            "optimizer_from",
        )
    optimizer.load_state_dict({**content, "state": moments})


class StepCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Saves at exactly the steps asked for, halts after the last one, and writes the log."""

    def __init__(self, job: TrainingJob, plan: ResumePlan, position: Ranks) -> None:
        self._job = job
        self._begins = plan.checkpoint is None
        self._missing = frozenset(plan.missing)
        self._log = job.output / LOG_NAME if position.rank == 0 else None
        self._before = truncate_log(self._log, plan.step) if self._log else 0.0
        self._begin = time.perf_counter()

    def on_train_begin(self, *_args: Any, optimizer: Any = None, **_kwargs: Any) -> None:
        """Give the optimizer its moments, and start the clock."""
        given = self._job.config.optimizer_from
        if given is not None and self._begins:
            take_moments(optimizer, given)
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:  # noqa: ARG002
        """Decide on saving and halting."""
        control.should_save = state.global_step in self._missing
        if state.global_step >= self._job.saves[-1]:
            control.should_training_stop = True

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Write one line of the log.

        Raises:
            NumericalError: The loss is not finite.
        """
        if not logs or "loss" not in logs:
            return
        loss, step = float(logs["loss"]), state.global_step
        if not math.isfinite(loss):
            raise NumericalError(
                "the training diverged",
                where=f"step {step}",
                got=f"loss {loss}",
                expected="a finite loss",
                hint="lower learning_rate or gradient_clip, add warmup_steps, or start from the "
                "last checkpoint with another configuration",
            )
        if self._log is None:
            return
        seconds = self._before + time.perf_counter() - self._begin
        entry = {
            "step": step,
            "loss": round(loss, 6),
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": round(float(logs["grad_norm"]), 6) if "grad_norm" in logs else None,
            "seconds": round(seconds, 3),
        }
        entry |= {
            key: round(float(value), 6)
            for key, value in logs.items()
            if key in ("reward", "reward_std", "kl", "completions/mean_length", "entropy")
        }
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class CheckpointMixin:
    """Checkpoints as a Hugging Face trainer leaves them, in the dtype asked for.

    Beside a rounded model, `training_weights.pt` holds the weights that the run goes on with.
    """

    job: TrainingJob
    model: Any
    args: Any
    optimizer: Any
    lr_scheduler: Any

    @property
    def _zero(self) -> bool:
        return bool(self.job.config.runtime.zero_stage == 3)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """The schedule of `learning_rate_factor`; see there."""
        if self.lr_scheduler is None:
            config, total = self.job.config, self.job.total_steps
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer if optimizer is not None else self.optimizer,
                # torch counts finished steps.
                lambda done: learning_rate_factor(config, done + 1, total),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; where ZeRO-3 is not to gather it, only what stands beside the weights."""
        if self._zero and not self.job.config.runtime.zero_gather:
            if self.args.should_save:
                directory = Path(output_dir or self.args.output_dir)
                self._save_beside(directory)
            return
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_beside(self, directory: Path) -> None:
        # The shards themselves are written with the optimizer's.
        directory.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        settings = model.peft_config["default"] if hasattr(model, "peft_config") else model.config
        settings.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        self._tokenizer().save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def _tokenizer(self) -> Any:
        return self.processing_class  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        dtype = getattr(torch, self.job.config.save_dtype)
        content = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, state_dict=_rounded(content, dtype))  # type: ignore[misc]
        settings = directory / "config.json"
        if settings.is_file():
            values = json_in(settings)
            values["dtype"] = self.job.config.save_dtype
            values.pop("torch_dtype", None)
            write_text(settings, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._zero or not self.args.should_save:
            return
        if self.job.config.save_dtype != "float32":
            trained = {
                name: parameter.detach()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            torch.save(trained, Path(output_dir) / _EXACT_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        exact = Path(resume_from_checkpoint) / _EXACT_NAME
        if not exact.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        loaded = torch.load(exact, map_location="cpu", weights_only=True, mmap=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(loaded[name])


def _rounded(content: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Copies on the CPU in a dtype; tensors that share memory still do."""
    known: dict[tuple[int, tuple[int, ...]], Any] = {}
    result = {}
    for name, tensor in content.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in known or not tensor.numel():
            known[key] = tensor.detach().to("cpu", dtype)
        result[name] = known[key]
    return result


def note(job: TrainingJob, position: Ranks, lines: Sequence[str]) -> None:
    """Tell the user something, from rank 0."""
    if position.rank == 0 and lines:
        with (job.scratch / "notes.txt").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)

"""What one worker of a fine-tuning does. Imports no Ray."""

from __future__ import annotations

from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.training.config import SftConfig
from arm_ray.training.data import SampleStream, StreamDataset, make_collator
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


class SftTrainer(CheckpointMixin, Trainer):  # type: ignore[misc, unused-ignore]
    """The Hugging Face trainer over a stream of samples whose order is fixed."""

    def __init__(self, job: TrainingJob, **kwargs: Any) -> None:
        self.job = job
        super().__init__(**kwargs)
        # Of the patched forward; the trainer looks at a signature that PEFT hides.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> SequentialSampler:
        stream: Any = self.train_dataset
        return SequentialSampler(stream)


def train_sft(job: TrainingJob, stream: SampleStream) -> None:
    """Train in this worker until the last step of the session; collective over all workers.

    Args:
        job: What to do.
        stream: All samples of the run.

    Raises:
        ArmRayError: Too little memory, a loss that is not finite, or checkpoints that cannot be
            gone on from.
    """
    config: SftConfig = job.config
    position = prepare_process(job)
    plan = plan_resumption(job, position)
    if not plan.missing:
        return
    # Before the model: with ZeRO-3, they make that it is sharded while it is loaded.
    arguments = TrainingArguments(**argument_values(job, position.world))
    model, reason = load_model(job)
    tokenizer = load_tokenizer(str(job.model))
    notes = [f"going on after step {plan.step}"] if plan.checkpoint else []
    if reason:
        notes.append(f"logits are computed for all tokens, because of the model {reason}")
    note(job, position, notes)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = SftTrainer(
        job,
        model=model,
        args=arguments,
        train_dataset=StreamDataset(stream),
        data_collator=make_collator(pad_id, config.packing),
        processing_class=tokenizer,
        callbacks=[StepCallback(job, plan, position)],
    )
    trainer.train(resume_from_checkpoint=plan.checkpoint)

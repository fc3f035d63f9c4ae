"""Supervised fine-tuning of all parameters, in one process: a checkpoint series to merge.

::

    python -m jobs.sft CONFIG.yaml [key=value ...]

It writes ``OUTPUT/checkpoint-N/`` in the layout of the Hugging Face Trainer, one line per step in
``OUTPUT/train_log.jsonl``, and does nothing when all checkpoints are there already.

A row is ``prompt + completion + eos``; only the completion and the eos carry loss. The logits
are computed at those positions alone, because a vocabulary of 49,152 makes the others dear.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from arm_ray.config import read_yaml, validate
from arm_ray.errors import (
    ArmRayError,
    CalibrationError,
    ConfigError,
    NotACheckpointError,
    RunDirectoryError,
)


class DataConfig(BaseModel):
    """Where the training rows are: a JSON Lines file with a prompt and a completion per row."""

    model_config = ConfigDict(extra="forbid")

    path: Path
    prompt_column: str = "prompt"
    completion_column: str = "completion"


class SftConfig(BaseModel):
    """One fine-tuning run. Relative paths are relative to the current directory."""

    model_config = ConfigDict(extra="forbid")

    model: Path
    """Directory of the model to start from."""
    output: Path
    data: DataConfig
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the linear warm-up. ``cosine`` falls to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    steps: int = Field(ge=1)
    save_steps: int | list[int]
    """Every so many steps, or exactly these steps."""
    batch_size: int = Field(default=16, ge=1)
    max_length: int = Field(default=512, ge=2)
    """Tokens per row, the eos included; longer rows are cut on the right."""
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    seed: int = 0
    device: str = "auto"
    """``auto`` is CUDA where there is a GPU, otherwise the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products (autocast). Weights and AdamW's moments are always float32."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """``eager`` is the faster of the two for short bfloat16 rows on a CPU."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    log_every: int = Field(default=5, ge=1)
    """Steps between two printed lines."""

    def steps_to_save(self) -> list[int]:
        """The steps after which a checkpoint is written, ascending."""
        if isinstance(self.save_steps, int):
            chosen = list(range(self.save_steps, self.steps + 1, max(self.save_steps, 1)))
        else:
            chosen = sorted(set(self.save_steps))
        if not chosen or chosen[0] < 1 or chosen[-1] > self.steps:
            raise ConfigError(
                "no checkpoint, or one outside the run, would be saved",
                where="save_steps",
                got=self.save_steps,
                expected=f"steps between 1 and steps = {self.steps}",
            )
        return chosen


class Row(NamedTuple):
    """One training example: token ids, of which the first ``prompt_length`` carry no loss."""

    ids: list[int]
    prompt_length: int


class Batch(NamedTuple):
    """``B`` rows padded on the right to ``T`` tokens, all of shape ``[B, T]``."""

    input_ids: Tensor
    attention_mask: Tensor
    is_label: Tensor


def load_config(path: Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Read a YAML file and apply ``dotted.key=value`` overrides to it.

    Raises:
        ConfigError: The file is missing or no mapping, or a key or value is wrong.
    """
    config = validate(SftConfig, read_yaml(path), overrides, source=str(path))
    config.steps_to_save()
    return config


def read_rows(path: Path, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """The prompts and completions in the given columns of a JSON Lines file.

    Raises:
        CalibrationError: The file is missing or empty, or a row lacks a column.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CalibrationError("cannot read the data", where=path, got=error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError("a row is no JSON", where=where, got=error) from error
        if not isinstance(row, dict):
            raise CalibrationError("a row is no JSON object", where=where, got=type(row).__name__)
        for column in columns:
            if not isinstance(row.get(column), str):
                raise CalibrationError(
                    f"a row has no text in column {column!r}",
                    where=where,
                    got=f"columns {sorted(row)}",
                    expected=f"columns {sorted(columns)}",
                    hint="name the columns in the data section of the configuration",
                )
        rows.append((row[columns[0]], row[columns[1]]))
    if not rows:
        raise CalibrationError("the data holds no rows", where=path)
    return rows


def encode(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Row:
    """Token ids of ``prompt + completion + eos``, cut on the right at ``max_length``.

    Prompt and completion are tokenised apart, so that the prompt has the same ids as at inference.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids = [*prompt_ids, *completion_ids, tokenizer.eos_token_id]
    return Row(ids[:max_length], min(len(prompt_ids), max_length))


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    is_label = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
        attention_mask[i, : len(row.ids)] = 1
        is_label[i, row.prompt_length : len(row.ids)] = True
    return Batch(input_ids, attention_mask, is_label)


def label_losses(model: Any, batch: Batch) -> Tensor:
    """Negative log-likelihood of every label token, in nats, float32, shape ``[labels]``.

    The hidden state at position ``t - 1`` predicts token ``t``; only those of labels reach the
    ``lm_head``.
    """
    device = model.device
    input_ids = batch.input_ids.to(device)
    is_label = batch.is_label[:, 1:].to(device)
    hidden = model.get_decoder()(
        input_ids=input_ids, attention_mask=batch.attention_mask.to(device), use_cache=False
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][is_label])
    return cross_entropy(logits.float(), input_ids[:, 1:][is_label], reduction="none")


def pick_device(name: str) -> torch.device:
    """The device a setting names; ``auto`` prefers CUDA."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in ``precision``; nothing to do for float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def _learning_rate(config: SftConfig, step: int) -> float:
    """The rate at ``step`` (counted from 1)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _batches(rows: Sequence[Row], config: SftConfig, pad_id: int) -> Iterator[Batch]:
    """Batches without end, shuffled anew by the seed in each epoch; the odd rest is dropped.

    Rows are sorted by length within chunks of 16 batches, and the batches of a chunk shuffled:
    that saves a third of the tokens, which would be padding.
    """
    size = min(config.batch_size, len(rows))
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order = order[: len(rows) // size * size]
        for start in range(0, len(order), 16 * size):
            by_length = sorted(order[start : start + 16 * size], key=lambda i: len(rows[i].ids))
            batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield collate([rows[j] for j in batches[i]], pad_id)


def _is_complete(checkpoint: Path) -> bool:
    # A checkpoint is renamed into place as a whole, with this file written last.
    return (checkpoint / "trainer_state.json").is_file()


def _save(model: Any, tokenizer: Any, config: SftConfig, step: int, history: list[Any]) -> None:
    """Write one checkpoint beside its place and rename it, so that it is whole or absent."""
    target = config.output / f"checkpoint-{step}"
    if _is_complete(target):
        return
    temporary = config.output / f".checkpoint-{step}.part"
    for left_over in (temporary, target):
        shutil.rmtree(left_over, ignore_errors=True)
    # A copy, so that rounding what is saved never touches the weights that train on.
    copied = copy.deepcopy(model).to(dtype=getattr(torch, config.save_dtype))
    copied.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    state = {"global_step": step, "max_steps": config.steps, "log_history": history}
    (temporary / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    os.replace(temporary, target)


def _claim_output(config: SftConfig) -> None:
    """Make the output directory this run's own, or refuse one that holds another run."""
    record = config.output / "sft_config.json"
    mine = config.model_dump_json(indent=2, exclude={"log_every"})
    if record.is_file() and record.read_text(encoding="utf-8") != mine:
        raise RunDirectoryError(
            "the output directory holds a run with another configuration",
            where=record,
            hint="remove the directory or choose another output",
        )
    config.output.mkdir(parents=True, exist_ok=True)
    record.write_text(mine, encoding="utf-8")


def _load(config: SftConfig, device: torch.device) -> tuple[Any, Any]:
    """Model with float32 weights, and tokenizer."""
    if not (config.model / "config.json").is_file():
        raise NotACheckpointError("the path holds no model", where=config.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, attn_implementation=config.attention
    )
    return model.to(device), AutoTokenizer.from_pretrained(config.model)


def train(config: SftConfig) -> list[Path]:
    """Train and save; returns the checkpoint directories, in order.

    Raises:
        RunDirectoryError: The output holds a run with another configuration.
        NotACheckpointError: ``model`` holds no model.
        CalibrationError: The data cannot be used.
    """
    saves = config.steps_to_save()
    checkpoints = [config.output / f"checkpoint-{step}" for step in saves]
    columns = (config.data.prompt_column, config.data.completion_column)
    texts = read_rows(config.data.path, columns)
    _claim_output(config)
    if all(_is_complete(path) for path in checkpoints):
        print(f"nothing to do: {len(saves)} checkpoints in {config.output}")
        return checkpoints

    # Squared gradients of rare tokens' rows are denormal numbers, on which a CPU is many times
    # slower. Threads take the setting from the one that starts them, so it comes first.
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    model, tokenizer = _load(config, device)
    encoded = [encode(tokenizer, *text, config.max_length) for text in texts]
    rows = [row for row in encoded if len(row.ids) > row.prompt_length]
    if not rows:
        raise CalibrationError(
            "no row has a completion within max_length", where=config.data.path,
            got=f"max_length = {config.max_length}",
        )  # fmt: skip
    print(
        f"training {config.model} on {len(rows)} rows ({len(encoded) - len(rows)} dropped: prompt "
        f"fills max_length), {config.steps} steps of {config.batch_size} on {device}"
    )
    # Dropout, where a model has any, stays on.
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = _batches(rows, config, pad_id)
    history: list[dict[str, float]] = []
    begin = time.perf_counter()
    with (config.output / "train_log.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, saves[-1] + 1):
            batch, rate = next(batches), _learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast(device, config.precision):
                loss = label_losses(model, batch).mean()
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - begin
            entry = {"step": step, "loss": round(loss.item(), 6), "learning_rate": rate,
                     "grad_norm": round(norm.item(), 6), "seconds": round(seconds, 3)}  # fmt: skip
            history.append(entry)
            log.write(json.dumps(entry) + "\n")
            if step % config.log_every == 0 or step == saves[-1]:
                left = seconds / step * (saves[-1] - step)
                print(
                    f"step {step}/{saves[-1]}  loss {entry['loss']:.4f}  lr {rate:.2e}  "
                    f"{seconds / step:.2f} s/step  {left:.0f} s left",
                    flush=True,
                )
            if step in saves:
                _save(model, tokenizer, config, step, history)
    print(f"saved steps {saves} in {config.output} after {time.perf_counter() - begin:.0f} s")
    return checkpoints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in {"-h", "--help"}:
        print("usage: python -m jobs.sft CONFIG.yaml [key=value ...]")
        return 0 if given else 2
    try:
        transformers.logging.disable_progress_bar()
        train(load_config(Path(given[0]), given[1:]))
    except ArmRayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

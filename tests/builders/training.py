"""A tiny model and word problems to train it on, and a plain training loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.training.config import SftConfig, parse_training_config
from arm_ray.training.data import (
    SampleStream,
    encode_rows,
    layout_of,
    make_collator,
    make_stream,
    read_data,
)
from tests.builders.models import WORDS, save, save_tokenizer, tiny_model

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_base(folder: Path, family: str = "smollm2") -> Path:
    """A random model of two layers with its tokenizer."""
    save_tokenizer(save(tiny_model(family, seed=1, num_layers=2), folder))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def make_rows(path: Path, count: int = 21) -> Path:
    """Prompts and completions of different lengths, no prompt twice."""
    with path.open("w") as file:
        for i in range(count):
            prompt = f"{i} " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 5))
            completion = " ".join(WORDS[(2 * i + k) % len(WORDS)] for k in range(1 + i % 7))
            file.write(json.dumps({"prompt": prompt, "completion": " " + completion}) + "\n")
    return path


def content(base: Path, data: Path, output: Path) -> dict[str, Any]:
    """A run of 6 steps that saves steps 3 and 6."""
    return {
        "model": str(base), "output": str(output), "data": {"path": str(data)},
        "learning_rate": 3e-3, "warmup_steps": 2, "schedule": "linear", "batch_size": 8,
        "steps": 6, "save_steps": [3, 6], "max_length": 64, "save_dtype": "float32",
        "precision": "float32",
        "runtime": {"device": "cpu", "max_failures": 0, "cpus_per_worker": 1},
    }  # fmt: skip


def make_config(values: dict[str, Any], *overrides: str) -> SftConfig:
    return parse_training_config(SftConfig, values, overrides)


def stream_of(config: SftConfig) -> SampleStream:
    rows, columns = read_data(config.data)
    encoded, _ = encode_rows(
        load_tokenizer(config.model), rows, layout_of(config.data, columns),
        max_length=config.max_length, too_long=config.too_long, where=config.data.path,
    )  # fmt: skip
    return make_stream(
        encoded, batch_size=config.batch_size, seed=config.seed, steps=config.steps, epochs=None
    )


def plain_losses(config: SftConfig) -> tuple[list[float], Any]:
    """Loss of every step by a plain loop over full logits, and the model at the end."""
    model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).train()
    stream, collate = stream_of(config), make_collator(0, packed=False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    steps, warmup = config.steps or 0, config.warmup_steps
    losses = []
    for step in range(1, steps + 1):
        decay: Callable[[float], float] = {
            "constant": lambda done: 1.0,
            "linear": lambda done: 1.0 - done,
            "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        }[config.schedule]
        factor = step / warmup if step <= warmup else decay((step - warmup) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        first = (step - 1) * config.batch_size
        batch = collate([stream[i] for i in range(first, first + config.batch_size)])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss: Any = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]

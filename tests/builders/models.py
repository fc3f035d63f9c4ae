"""Tiny random models of each family, and their checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
# vLLM's attention on CPUs wants heads of 32 or more.
SERVED = {"hidden_size": 128, "intermediate_size": 160}
WORDS = ("seven", "red", "apples", "and", "two", "green", "ones", "are", "in", "Ann", "has", "left")
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> configuration class, settings beside SIZES
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3.2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": ROPE}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2.5": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
}


def tiny_model(
    family: str, seed: int, num_layers: int = 3, sizes: dict[str, int] | None = None
) -> PreTrainedModel:
    """A random model; norms and biases are random as well, so that no tensor is trivial."""
    cls, extra = FAMILIES[family]
    config = cls(**{**SIZES, **(sizes or {})}, num_hidden_layers=num_layers, **extra)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.15 * noise)
    return model


def fine_tuned(model: PreTrainedModel, seed: int, scale: float = 0.03) -> PreTrainedModel:
    """A copy with every parameter moved a little, as training would."""
    copy: PreTrainedModel = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return copy


def save(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a copy of a model as a Hugging Face checkpoint in `dtype`."""
    copy: Any = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tokenizer(path: Path) -> Path:
    """A byte-level BPE tokenizer of 320 tokens with a chat template, in a checkpoint directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    fast.save_pretrained(path)
    return path


def write_texts(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """A JSON Lines file of random short texts of different lengths."""
    choose = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            text = " ".join(choose.choices(WORDS, k=choose.randint(2, 20)))
            file.write(json.dumps({"text": text}) + "\n")
    return path

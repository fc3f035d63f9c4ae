"""Tiny random models of each family, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
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


def tiny_model(family: str, seed: int, num_layers: int = 3) -> PreTrainedModel:
    """A random model; norms and biases are random as well, so that no tensor is trivial."""
    cls, extra = FAMILIES[family]
    config = cls(**SIZES, num_hidden_layers=num_layers, **extra)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.15 * noise)
    return model


def fine_tuned(model: PreTrainedModel, seed: int, scale: float = 0.03) -> PreTrainedModel:
    """A copy with every parameter moved a little, as training would."""
    copy = type(model)(model.config).eval()
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
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> Callable[..., list[Path]]:
    """Make a base and `count` candidates of a family on disk."""

    def make(
        family: str,
        count: int = 2,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        num_layers: int = 3,
    ) -> list[Path]:
        base = tiny_model(family, seed=1, num_layers=num_layers)
        models = [base, *(fine_tuned(base, seed=10 + i) for i in range(count))]
        names = ["base", *(f"checkpoint-{10 * (i + 1)}" for i in range(count))]
        return [
            save(model, tmp_path / name, dtype, max_shard_size)
            for model, name in zip(models, names, strict=True)
        ]

    return make

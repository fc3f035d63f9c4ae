"""Checkpoints of random weights in the shape of real models, for benchmarks of speed and memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}


def _shape(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# The `config.json` of Qwen2.5's sizes, as far as it matters for shapes; and a tiny one.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(256, 640, 4, 8, 2, 1024, True),
    "1.5b": _shape(1536, 8960, 28, 12, 2, 151936, True),
    "3b": _shape(2048, 11008, 36, 16, 2, 151936, True),
    "7b": _shape(3584, 18944, 28, 28, 4, 152064, False),
    "14b": _shape(5120, 13824, 48, 40, 8, 152064, False),
    "72b": _shape(8192, 29568, 80, 64, 8, 152064, False),
}


def file_parts(sizes: Mapping[str, int], max_bytes: int) -> Iterator[tuple[str, ...]]:
    """Consecutive tensors in files of at most `max_bytes`, unless one tensor is larger."""
    part: list[str] = []
    total = 0
    for name, size in sizes.items():
        if part and total + size > max_bytes:
            yield tuple(part)
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield tuple(part)


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    seed: int,
    base: Path | None = None,
    *,
    device: str = "cpu",
    max_file_bytes: int = 5 * 10**8,
) -> None:
    """Write random bfloat16 weights tensor by tensor; with `base`, those plus small changes.

    Args:
        path: The checkpoint's directory; one that is whole stays as it is.
        config: Its `config.json`.
        seed: Of the weights.
        base: A checkpoint of the same shape, which the weights are close to.
        device: Where the numbers are drawn.
        max_file_bytes: Of one weight file.
    """
    import torch
    from transformers import AutoConfig

    from arm_ray.checkpoints.huggingface import INDEX_NAME, open_checkpoint
    from arm_ray.checkpoints.weight_file import TensorSpec, write_json, write_weight_file
    from arm_ray.model.layout import model_layout

    if (path / INDEX_NAME).exists():
        return
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write_json(path / "config.json", dict(config))
    layout = model_layout(AutoConfig.from_pretrained(path))
    origin = open_checkpoint(base) if base else None
    generator = torch.Generator(device).manual_seed(seed)

    def values(spec: TensorSpec) -> torch.Tensor:
        if origin is None and "norm" in spec.name:
            return torch.ones(spec.shape, dtype=torch.bfloat16)
        drawn = torch.randn(spec.shape, generator=generator, dtype=torch.bfloat16, device=device)
        if origin is None:
            return drawn.mul_(0.02).cpu()
        old = origin.read([spec.name])[spec.name]
        return drawn.mul_(0.002).add_(old.to(device)).cpu()

    specs = {n: TensorSpec(n, torch.bfloat16, shape) for n, shape in layout.shapes.items()}
    sizes = {name: spec.num_bytes for name, spec in specs.items()}
    parts = list(file_parts(sizes, max_file_bytes))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        chosen = [specs[tensor] for tensor in part]
        write_weight_file(path / name, chosen, (values(spec) for spec in chosen))
        weight_map |= dict.fromkeys(part, name)
    # Last: a directory with an index is a whole checkpoint.
    total = sum(sizes.values())
    write_json(path / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

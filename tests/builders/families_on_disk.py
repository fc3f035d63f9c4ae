"""Tiny checkpoints of any family that transformers has: a base, candidates and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arm_ray.model.gate import tiny_model_config
from tests.builders.families import config_of
from tests.builders.merge_case import MergeCase
from tests.builders.models import SIZES, save_tokenizer, write_texts

# Vision towers, in sizes of a test.
_VISION: dict[str, Any] = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_position_embeddings": 16,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
}


def write_family(root: Path, family: str, **settings: Any) -> MergeCase:
    """Write a base and two candidates of a family, with everything in them random.

    Args:
        root: The directory.
        family: transformers' name of it.
        settings: Of the text's configuration.
    """
    config = config_of(family)
    text = config.get_text_config(decoder=True)
    for key, value in settings.items():
        setattr(text, key, value)
    tiny = tiny_model_config(config)
    own = tiny.get_text_config(decoder=True)
    own.vocab_size = SIZES["vocab_size"]
    if own is not tiny:
        vision = tiny.vision_config
        for key, value in _VISION.items():
            if hasattr(vision, key):
                setattr(vision, key, value)
        if hasattr(vision, "out_hidden_size"):
            vision.out_hidden_size = own.hidden_size
    case = MergeCase(root)
    base = random_model(tiny, 1)
    save_tokenizer(_save(base, root / "base"))
    for index in range(2):
        path = root / f"checkpoint-{10 * (index + 1)}"
        case.candidates.append(_save(moved(base, 10 + index), path))
    write_texts(root / "calibration.jsonl")
    return case


def random_model(config: Any, seed: int) -> Any:
    """A model with random numbers in every parameter and buffer of floating point."""
    from arm_ray.model.architecture import architecture_of

    kind = type(architecture_of(config).model)
    model = kind._from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_((1.0 if "norm" in name else 0.0) + 0.15 * noise)
    return model


def moved(model: Any, seed: int, scale: float = 0.03) -> Any:
    """A copy with every parameter moved a little, as training would."""
    copy = type(model)._from_config(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in copy.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return copy


def _save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path

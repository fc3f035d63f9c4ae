"""Weights of a checkpoint on disk, and comparisons of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        # Copies: the library maps files into memory, and a test may overwrite the file.
        tensors.update({name: t.clone() for name, t in load_file(file).items()})
    return tensors


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())

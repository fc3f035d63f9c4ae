"""Random tensors."""

from __future__ import annotations

import torch


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coarse(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: zeros, ties in magnitude, entries that cancel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()

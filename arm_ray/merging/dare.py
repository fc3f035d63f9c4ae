"""DARE: entries of a task vector dropped at random, the others scaled up.

Randomness is counter-based: element `e` of a whole tensor is decided by word `e` of a stream of
32-bit words that belongs to the seed, the iteration, the tensor and the contributor. So it does not
matter which rows are thinned where, or in what order.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks
from arm_ray.merging.operator_settings import DareSettings

# Words that one step of Philox' counter gives.
_WORDS = 8
_BLOCK = 1 << 16


def drop(
    vector: Tensor,
    rows: slice,
    shape: tuple[int, ...],
    name: str,
    contributor: str,
    iteration: int,
    settings: DareSettings,
) -> Tensor:
    """One task vector, thinned. With `rescale: exact` its mean over all seeds is the whole.

    Args:
        vector: `τ`, float32: the whole tensor or some rows of it; overwritten where contiguous.
        rows: Which rows.
        shape: Of the whole tensor.
        name: Of the tensor.
        contributor: Name of the state.
        iteration: 1-based number.
        settings: The section `dare`.

    Returns:
        The entries that are not dropped times `1 / (1 − p)`, or times what keeps `Σ |τ|`.
    """
    if settings.drop_rate == 0.0:
        return vector
    vector = vector.contiguous()
    scale = 1.0 / (1.0 - settings.drop_rate) if settings.rescale == "exact" else 1.0
    key = stream(settings.seed, iteration, name, contributor)
    limit = math.ceil(settings.drop_rate * 2.0**32)
    position = (rows.start or 0) * math.prod(shape[1:])
    before, after = [], []
    for (block,) in in_blocks([vector], _BLOCK):
        drawn = words(key, position, len(block))
        position += len(block)
        kept = torch.from_numpy(drawn >= limit).to(block.device)
        if settings.rescale == "l1":
            before.append(block.abs().sum(dtype=torch.float64))
        block.mul_(kept)
        if settings.rescale == "l1":
            after.append(block.abs().sum(dtype=torch.float64))
        elif scale != 1.0:
            block.mul_(scale)
    if settings.rescale == "l1":
        remaining = float(sum(after))
        # Where nothing remains, nothing can be kept up.
        vector.mul_(float(sum(before)) / remaining if remaining > 0.0 else 1.0)
    return vector


def stream(seed: int, iteration: int, name: str, contributor: str) -> int:
    """The key of the stream of random words of a contributor's tensor in an iteration."""
    label = json.dumps([seed, iteration, name, contributor])
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")


def words(key: int, position: int, count: int) -> np.ndarray:
    """Words `position …` of a key's stream, `[count]` uint32."""
    counter, skipped = divmod(position, _WORDS)
    steps = -(-(skipped + count) // _WORDS)
    generator = np.random.Philox(key=key, counter=counter)
    raw = generator.random_raw(steps * _WORDS // 2).astype("<u8", copy=False).view("<u4")
    return raw[skipped : skipped + count]

"""Exact order statistics of magnitudes in two passes, over one tensor or a whole model.

The bit patterns of non-negative float32 numbers, read as integers, are in the order of the numbers.
A histogram of their first 16 of 31 bits finds the bin that holds the element of a given rank, and a
histogram of the other 15 bits inside that bin finds the element. Histograms of pieces add up, so
neither sorting nor the whole model in one place is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks

ROUNDS = 2
_LOW_BITS = 15
_FIRST_BINS = 1 << 16
_LAST_BINS = 1 << _LOW_BITS
# A histogram is added up once for each block, which has to be worth it.
_BLOCK = 1 << 18


def rank_of(count: int, keep: float) -> int:
    """The 1-based rank of the smallest of `count` magnitudes that is kept; 0: all are.

    The rule of TIES' authors: `k = d − int(d K)`, and what is as large as the k-th smallest stays.
    """
    return count - int(count * keep)


def measure(number: int, values: Sequence[Tensor], known: Mapping[str, object]) -> Tensor:
    """One round's histograms of a piece: `[n, 65536]`, then `[n, 32768]`, int64.

    Args:
        number: The round, 0 or 1.
        values: Float32; their magnitudes count. One for each contributor.
        known: What `conclude` has found in round 0; not read in that round.
    """
    if number == 0:
        return torch.stack([_first(v) for v in values])
    bins = cast(tuple[int, ...], known["bins"])
    return torch.stack([_last(v, bin_) for v, bin_ in zip(values, bins, strict=True)])


def conclude(
    number: int, counts: Tensor, known: Mapping[str, object], keep: float
) -> dict[str, object]:
    """What is known after a round: `bins` and `ranks` (in the bin), then `thresholds`.

    Args:
        number: The round, 0 or 1.
        counts: The round's histograms, added up over all pieces.
        known: What was known before.
        keep: The fraction that survives.
    """
    result = dict(known)
    if number == 0:
        found = [_locate(row, rank_of(int(row.sum()), keep)) for row in counts]
        result["bins"], result["ranks"] = (tuple(column) for column in zip(*found, strict=True))
        return result
    bins = cast(tuple[int, ...], known["bins"])
    ranks = cast(tuple[int, ...], known["ranks"])
    bits = [
        bin_ << _LOW_BITS | _locate(row, rank)[0]
        for row, bin_, rank in zip(counts, bins, ranks, strict=True)
    ]
    result["thresholds"] = tuple(torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist())
    return result


def thresholds(values: Sequence[Tensor], keep: float) -> tuple[float, ...]:
    """Of each tensor by itself: the smallest magnitude that is kept."""
    known: Mapping[str, object] = {}
    for number in range(ROUNDS):
        known = conclude(number, measure(number, values, known), known, keep)
    return cast(tuple[float, ...], known["thresholds"])


def _first(values: Tensor) -> Tensor:
    counts = torch.zeros(_FIRST_BINS, dtype=torch.int64, device=values.device)
    for (block,) in in_blocks([values], _BLOCK):
        counts += torch.bincount(_bits(block) >> _LOW_BITS, minlength=_FIRST_BINS)
    return counts


def _last(values: Tensor, bin_: int) -> Tensor:
    counts = torch.zeros(_LAST_BINS, dtype=torch.int64, device=values.device)
    for (block,) in in_blocks([values], _BLOCK):
        inside = _bits(block) - (bin_ << _LOW_BITS)
        counts += torch.bincount(inside[inside >> _LOW_BITS == 0], minlength=_LAST_BINS)
    return counts


def _bits(block: Tensor) -> Tensor:
    # Without the sign.
    return block.view(torch.int32) & 0x7FFFFFFF


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of a 1-based rank, and its rank in there. Rank 0: before all."""
    if rank == 0:
        return 0, 0
    upto = counts.cumsum(0)
    bin_ = int(torch.searchsorted(upto, rank))
    return bin_, rank - int(upto[bin_] - counts[bin_])

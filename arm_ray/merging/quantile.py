"""Exact order statistics of magnitudes in two passes, over one tensor or a whole model.

The bit patterns of non-negative float32 numbers, read as integers, are in the order of the numbers.
A histogram of their first 16 of 31 bits finds the bin that holds the element of a given rank, and a
histogram of the other 15 bits inside that bin finds the element. Histograms of pieces add up, so
neither sorting nor the whole model in one place is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from arm_ray.merging.blocks import in_blocks

ROUNDS = 2
_LOW_BITS = 15
_FIRST_BINS = 1 << 16
_LAST_BINS = 1 << _LOW_BITS
# A histogram is added up once for each block, which has to be worth it.
_BLOCK = 1 << 20


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
        return _histograms(
            values, _FIRST_BINS, lambda bits, _: bits.bitwise_right_shift_(_LOW_BITS)
        )
    firsts = [bin_ << _LOW_BITS for bin_ in cast(tuple[int, ...], known["bins"])]
    # What is outside the bin goes into one more at either end: faster than to leave it out.
    counts = _histograms(
        values,
        _LAST_BINS + 2,
        lambda bits, index: bits.sub_(firsts[index] - 1).clamp_(0, _LAST_BINS + 1),
    )
    return counts[:, 1:-1]


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


def _histograms(
    values: Sequence[Tensor], bins: int, bin_of: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """How many numbers of each tensor are in each bin: `[n, bins]`, int64.

    Args:
        values: Float32.
        bins: How many.
        bin_of: From the bits of numbers without the sign, int32, which it may overwrite, and the
            index of their tensor.
    """
    counts = torch.zeros((len(values), bins), dtype=torch.int64, device=values[0].device)
    for index, (row, numbers) in enumerate(zip(counts, values, strict=True)):
        for (block,) in in_blocks([numbers], _BLOCK):
            bits = block.view(torch.int32) & 0x7FFFFFFF
            row += torch.bincount(bin_of(bits, index), minlength=bins)
    return counts


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of a 1-based rank, and its rank in there. Rank 0: before all."""
    if rank == 0:
        return 0, 0
    upto = counts.cumsum(0)
    bin_ = int(torch.searchsorted(upto, rank))
    return bin_, rank - int(upto[bin_] - counts[bin_])

"""Going over large tensors in blocks that stay in a CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# More than a core's own cache holds: with smaller ones, calls take longer than what they compute.
_BLOCK = 1 << 19
# A launch costs far more than an element there.
BLOCK_GPU = 1 << 24


def in_blocks(tensors: Sequence[Tensor], size: int = _BLOCK) -> Iterator[list[Tensor]]:
    """The same stretch of several tensors of one size, flat, stretch by stretch.

    Args:
        tensors: At least one; of any shape. Blocks of a contiguous tensor are views of it.
        size: Elements of a block on a CPU.
    """
    count = tensors[0].numel()
    step = size if tensors[0].device.type == "cpu" else max(size, BLOCK_GPU)
    flat = [t.reshape(-1) for t in tensors]
    if 0 < count <= step:
        yield flat
        return
    for start in range(0, count, step):
        yield [t[start : start + step] for t in flat]


def added_up(parts: Iterable[Sequence[Tensor]]) -> list[float] | None:
    """The same few numbers of block after block, added up in float64; None: there is no block."""
    sums: Tensor | None = None
    for part in parts:
        found = torch.stack([*part]).double()
        sums = found if sums is None else sums + found
    return None if sums is None else sums.tolist()


def weighted_sum_(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_i ΔW_i`; overwrites the vectors, of which the first (made contiguous) is the result.

    Products are rounded before they are added, so that no element depends on whether the hardware
    fused the two, and pieces of rows give the bits of the whole.
    """
    first, *others = [v.contiguous() for v in vectors]
    for total, *terms in in_blocks([first, *others]):
        total.mul_(weights[0])
        for term, weight in zip(terms, weights[1:], strict=True):
            total += term.mul_(weight)
    return first


def combination(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_i A_i`, a tensor of its own; products are rounded first, as in `weighted_sum_`.

    As `A_0 + Σ w_i (A_i − A_0) + (Σ w_i − 1) A_0`: checkpoints of one run lie close together, and
    their differences are small and exact.
    """
    result = torch.empty_like(models[0], memory_format=torch.contiguous_format)
    surplus = math.fsum([*weights, -1.0])
    for total, first, second, *others in in_blocks([result, *models]):
        torch.sub(second, first, out=total).mul_(weights[1])
        for other, weight in zip(others, weights[2:], strict=True):
            total += (other - first).mul_(weight)
        if surplus != 0.0:
            total += first * surplus
        total += first
    return result


def gram(
    tensors: Sequence[Tensor], added: Tensor | None = None, *, within_blocks: torch.dtype
) -> Tensor:
    """Inner products of tensors with each other, `[n, n]` float64 on the CPU.

    Args:
        tensors: Float32, of one size.
        added: What is added to each of them first.
        within_blocks: Of the products in a block; blocks always add up in float64.
    """
    count = len(tensors)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]

    def products(block: Sequence[Tensor]) -> list[Tensor]:
        models = [t if t.dtype == within_blocks else t.to(within_blocks) for t in block]
        if added is not None:
            offset = models.pop()
            models = [t + offset for t in models]
        return [torch.dot(models[i], models[j]) for i, j in pairs]

    every = [*tensors] if added is None else [*tensors, added]
    values = added_up(map(products, in_blocks(every))) or [0.0] * len(pairs)
    found = dict(zip(pairs, values, strict=True))
    rows = [[found[min(i, j), max(i, j)] for j in range(count)] for i in range(count)]
    return torch.tensor(rows, dtype=torch.float64)

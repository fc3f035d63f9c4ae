"""Cosines between consecutive states, summed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements per block: small enough that the float64 copies stay in cache.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class SimilaritySums:
    """Inner products of one tensor, in float64, for two cosines.

    With `W` the new state, `P` the state before and `B` the base.

    Attributes:
        weights: `<W, P>`, `<W, W>`, `<P, P>`.
        task_vectors: `<W − B, P − B>`, `<W − B, W − B>`, `<P − B, P − B>`.
    """

    weights: tuple[float, float, float]
    task_vectors: tuple[float, float, float]


def similarity_sums(new: Tensor, previous: Tensor, base: Tensor) -> SimilaritySums:
    """Inner products of one tensor of three states, each float32 of the same shape.

    The task vectors are subtracted in float64. Blocks of a fixed size are summed in a fixed order.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=new.device)
    flat = [t.reshape(-1) for t in (new, previous, base)]
    for start in range(0, new.numel(), _BLOCK):
        w, p, b = (t[start : start + _BLOCK].to(torch.float64) for t in flat)
        dw, dp = w - b, p - b
        pairs = ((w, p), (w, w), (p, p), (dw, dp), (dw, dw), (dp, dp))
        sums += torch.stack([torch.dot(x, y) for x, y in pairs])
    values = sums.tolist()
    return SimilaritySums((*values[:3],), (*values[3:],))


def cosine(products: Iterable[tuple[float, float, float]]) -> float | None:
    """Cosine from the inner products of all tensors; None where one of the sides is zero.

    The sums are exact (`math.fsum`), so they do not depend on how tensors were spread over actors.
    """
    columns = list(zip(*products, strict=True))
    if not columns:
        return None
    inner, left, right = (math.fsum(column) for column in columns)
    if left <= 0.0 or right <= 0.0:
        return None
    return max(-1.0, min(1.0, inner / math.sqrt(left) / math.sqrt(right)))

"""Cosines between consecutive states, summed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arm_ray.merging.alignment import aligned
from arm_ray.merging.blocks import added_up, in_blocks

# Elements of one inner product on a CPU; on a GPU `blocks.BLOCK_GPU`.
COMPARE_BLOCK = 1 << 17


@dataclass(frozen=True)
class SimilaritySums:
    """Squared norms over a tensor, or part of one, from which two cosines follow.

    With `W` the new state, `P` the state before and `B` the base: `|W|²`, `|P|²`, `|W − P|²`,
    `|W − B|²` and `|P − B|²`. Inner products follow from these without cancellation:
    `2 <W, P> = |W|² + |P|² − |W − P|²`, and `W − P` is also the difference of the task vectors.
    """

    new: float
    previous: float
    change: float
    new_task_vector: float
    previous_task_vector: float

    @property
    def is_finite(self) -> bool:
        """Whether the new tensor held only finite numbers, of squares that do not overflow."""
        return math.isfinite(self.new)


def similarity_sums(new: Tensor, previous: Tensor, base: Tensor) -> SimilaritySums:
    """The sums of one tensor of three states, each float32 of the same shape.

    Blocks of a fixed size are summed in a fixed order. Within one, a float32 product is accurate:
    it adds up in many lanes; blocks add up in float64.

    Args:
        new: `W`.
        previous: `P`; may be the same tensor as `base`, which then costs nothing twice.
        base: `B`.
    """
    from_base = previous is base
    compared = [new, previous] if from_base else [new, previous, base]
    found = added_up(map(_squares, in_blocks(compared, COMPARE_BLOCK))) or [0.0] * 5
    return SimilaritySums(*found[:3], *(found[3:] or [found[2], 0.0]))


def _squares(block: Sequence[Tensor]) -> list[Tensor]:
    # On a CPU each call costs other threads Python's lock, so there are as few as can be.
    w, p, *rest = map(aligned, block)
    norms = [_square(w), _square(p), _square(w - p)]
    for b in rest:
        norms += [_square(w - b), _square(p - b)]
    return norms


def _square(flat: Tensor) -> Tensor:
    return torch.dot(flat, flat)


def cosines(parts: Iterable[SimilaritySums]) -> tuple[float | None, float | None]:
    """cos(W, P) and cos(W − B, P − B) over all tensors; None where one of the sides is zero.

    The sums over tensors are exact (`math.fsum`), so they do not depend on how tensors were
    spread over actors.
    """
    collected = list(parts)

    def total(name: str) -> float:
        return math.fsum(getattr(part, name) for part in collected)

    change = total("change")
    return (
        _cosine(total("new"), total("previous"), change),
        _cosine(total("new_task_vector"), total("previous_task_vector"), change),
    )


def _cosine(left: float, right: float, change: float) -> float | None:
    if left <= 0.0 or right <= 0.0:
        return None
    a, b = math.sqrt(left), math.sqrt(right)
    # 1 - cos, so that small angles keep their digits.
    angle = (change - (a - b) ** 2) / (2.0 * a * b)
    return max(-1.0, 1.0 - (angle if angle > 0.0 or math.isnan(angle) else 0.0))

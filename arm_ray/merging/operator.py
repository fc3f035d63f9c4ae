"""What a merge operator is: a pure function on one tensor, and what it needs to be given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from arm_ray.merging.rotation import SignRule


@dataclass(frozen=True)
class MergeSettings:
    """Settings of the operators.

    Attributes:
        coefficient: λ.
        sign: Sign rule of the rotation.
        rank_tolerance: Relative threshold for zero singular values.
    """

    coefficient: float = 0.7
    sign: SignRule = "positive_diagonal"
    rank_tolerance: float = 1.0e-6


@dataclass(frozen=True)
class TensorInputs:
    """One tensor of every state that an iteration merges, or some rows of one.

    A tensor without activations may come in several pieces of consecutive rows.

    Attributes:
        name: Hugging Face name, for messages and logs.
        reference: `W_ref`, float32, any shape.
        contributors: The `W_i`, float32, of the reference's shape.
        divisor: `m`.
        reference_activation: `A_ref` `[d_out, N]` float64, for the weight of a linear module in
            the decoder layers where the operator asked for activations; else None.
        contributor_activations: The `A_i`, one for each contributor; empty where
            `reference_activation` is None.
        rows: Which rows of the whole tensor these are.
    """

    name: str
    reference: Tensor
    contributors: Sequence[Tensor]
    divisor: int
    reference_activation: Tensor | None = None
    contributor_activations: Sequence[Tensor] = ()
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass
class MergedTensor:
    """What an operator returns.

    Attributes:
        tensor: `W_new`, float32, of the reference's shape. Never one of the inputs.
        rotated: Number of contributors whose task vector was rotated.
        rank_deficient: Ranks `(r, full)` of the contributors whose shift was rank-deficient.
    """

    tensor: Tensor
    rotated: int = 0
    rank_deficient: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Operator:
    """A named merge operator.

    Attributes:
        name: Its value in `method.operator`.
        merge: The pure function.
        needs_activations: Whether `merge` wants the mean outputs of the linear modules.
    """

    name: str
    merge: Callable[[TensorInputs, MergeSettings], MergedTensor]
    needs_activations: bool

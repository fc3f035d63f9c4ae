"""Numbers that are not finite, or far too large, end an iteration before it makes a state.

Nothing here changes a bit of what is computed: each check is one reduction over data that is in
memory anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from arm_ray.errors import NumericalError
from arm_ray.merging.similarity import SimilaritySums

# A norm that is more than this many times the largest that it can come from has exploded. Operators
# that rescale what they keep stay far below it: DARE's sparsest settings give about 30.
MOST_GROWTH = 1e3
# Squares per element below which a norm is rounding, of whatever it is compared with.
_ROUNDING = 1e-24


def looks_finite(tensor: Tensor) -> bool:
    """Whether a tensor is surely finite; a sum that overflows leaves it open."""
    return math.isfinite(float(tensor.sum()))


def check_merged(
    name: str, sums: SimilaritySums, inputs: Mapping[str, Tensor], iteration: int
) -> None:
    """Refuse rows of a merged tensor that are not finite, or whose norm has exploded.

    Args:
        name: The tensor's.
        sums: What they are, compared with the state before.
        inputs: State or candidate -> its rows, of all that were merged.
        iteration: Which.

    Raises:
        NumericalError: Names the tensor, the iteration and what was merged.
    """
    where = f"iteration {iteration}: {', '.join(inputs)}"
    if not sums.is_finite:
        odd = _far_larger(inputs)
        raise NumericalError(
            f"merging {name} gave NaN, infinity or numbers too large",
            where=where,
            got=None if odd is None else f"{odd} holds numbers far larger than the others'",
            hint="use a smaller method.coefficient"
            + ("" if odd is None else f", or leave {odd} out")
            + "; the last finished state stays, and the same command goes on after it",
            subject=odd,
        )
    most = MOST_GROWTH**2
    square = sums.new
    # Nearly always enough, and known already.
    if square <= most * sums.previous:
        return
    squares = {state: float(torch.linalg.vector_norm(t)) ** 2 for state, t in inputs.items()}
    largest = max(squares.values(), default=0.0)
    count = max((t.numel() for t in inputs.values()), default=1)
    if square <= most * largest or square <= _ROUNDING * count:
        return
    raise NumericalError(
        f"merging {name} gave numbers far larger than those that it was made of",
        where=where,
        got=f"a norm of {math.sqrt(square):.3g}",
        expected=f"at most {MOST_GROWTH:g} times the largest of its inputs', "
        f"{math.sqrt(largest):.3g}",
        hint="use a smaller method.coefficient, and look at the operator's settings; the last "
        "finished state stays",
    )


def _far_larger(inputs: Mapping[str, Tensor]) -> str | None:
    """The one of several inputs whose numbers have another magnitude; None: there is none."""
    most = {state: float(rows.abs().max()) for state, rows in inputs.items() if rows.numel()}
    order = sorted(most, key=lambda state: most[state])
    if len(order) < 2 or most[order[-1]] <= MOST_GROWTH * most[order[-2]]:
        return None
    return order[-1]


def check_activations(squares: Mapping[str, float], place: str, iteration: int, dtype: str) -> None:
    """Refuse hidden states that are not finite, or far larger in one model than in another.

    Args:
        squares: State or candidate -> squared norm of its hidden states, of the same samples.
        place: Where they come out, in words: "layer 3".
        iteration: Which.
        dtype: Of the forward pass.

    Raises:
        NumericalError: Names the place, the iteration and the state or candidate.
    """
    for state, square in squares.items():
        if not math.isfinite(square):
            raise NumericalError(
                f"the activations of {place} are NaN, infinite or too large",
                where=f"{state}, iteration {iteration}",
                got=f"compute_dtype {dtype}",
                hint="set precision.compute_dtype to float32 or bfloat16; if that is so already, "
                f"{state} is broken: leave it out. The last finished state stays",
                subject=state,
            )
    known = {state: square for state, square in squares.items() if square > 0.0}
    if not known:
        return
    state = max(known, key=lambda name: known[name])
    least = min(known, key=lambda name: known[name])
    growth = math.sqrt(known[state] / known[least])
    if growth > MOST_GROWTH:
        raise NumericalError(
            f"the activations of {place} have exploded",
            where=f"{state}, iteration {iteration}",
            got=f"a norm {growth:.3g} times that of {least}",
            expected=f"at most {MOST_GROWTH:g} times",
            hint=f"{state} is not of the same run, or diverged: leave it out, or use a smaller "
            "method.coefficient. The last finished state stays",
            subject=state,
        )


def check_finite_rows(tensor: Tensor, name: str, state: str) -> None:
    """Refuse rows of a merged state that are not finite.

    Raises:
        NumericalError: Names the tensor and the state.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(
            f"the tensor {name} holds NaN or infinity",
            where=state,
            hint="arm-ray verify --repair makes the run's states again",
            subject=state,
        )


def names_of(layers: Sequence[int]) -> str:
    """Layers in words: "layer 3", "layers 3 to 5"."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"

"""AlphaRL's prediction (Cai et al., 2025): the rank-1 update that an accuracy would go with.

The contributors are checkpoints `s = 1 … S` of one run in time order, `y_s` their accuracies. Of
each linear weight, with `σ_s, u_s, v_s` the leading singular triple of `W_s − W_ref`:

    a_s = ± σ_s u_s                                  signs so that neighbours do not point apart
    one component of partial least squares: rows a_s on y, columns scaled to unit deviation
    y ≈ b z + c, z the scores;  z* = (y* − c) / b;   a* = the row with score z*
    W_new = W_S + a* v_Sᵀ                            or W_ref + a* v_Sᵀ (`onto: base`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from arm_ray.errors import ConfigError
from arm_ray.merging.operator import Operator, TaskVectors
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.svd import row_blocks, singular_values_and_vectors, upright


def update(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`W_new − W_ref`; the coefficient λ plays no part.

    Tensors that are not weights of linear modules take the last checkpoint's value, and with
    `onto: base` the reference's.

    Raises:
        ConfigError: An iteration merges another number of states than there are accuracies.
    """
    chosen = settings.alpharl_prediction
    last = given.vectors[-1]
    onto = last if chosen.onto == "last" else torch.zeros_like(last)
    if not given.inputs.is_linear:
        return onto
    assert chosen.accuracies is not None
    assert chosen.target is not None
    if len(given.vectors) != len(chosen.accuracies):
        raise ConfigError(
            "an iteration merges another number of states than there are accuracies",
            where="method.alpharl_prediction.accuracies",
            got=f"{len(given.vectors)} states in iteration {given.inputs.iteration}",
            expected=len(chosen.accuracies),
            hint="give it all candidates: schedule.anchor_iterations = schedule.max_iterations",
        )
    lefts, right = _leading(given.vectors)
    accuracies = torch.tensor(chosen.accuracies, dtype=torch.float64, device=last.device)
    predicted = predict(lefts, accuracies, chosen.target)
    return onto + torch.outer(predicted.to(onto.dtype), right.to(onto.dtype))


def predict(rows: Tensor, accuracies: Tensor, target: float) -> Tensor:
    """The row that goes with the accuracy `target`, by one component of partial least squares.

    Where the rows do not depend on the accuracies, it is their mean.

    Args:
        rows: `[S, n]` float64.
        accuracies: `[S]` float64, not all equal.
        target: `y*`.
    """
    mean, deviation = rows.mean(0), rows.std(0)
    # Columns that do not change but for rounding say nothing, and keep their value.
    changes = deviation > 1e-12 * rows.abs().amax(0)
    deviation = torch.where(changes, deviation, torch.ones_like(deviation))
    scaled = (rows - mean) / deviation
    centred = accuracies - accuracies.mean()
    weights = scaled.T @ centred
    scores = scaled @ (weights / weights.norm().clamp(min=torch.finfo(torch.float64).tiny))
    spread = scores @ scores
    if float(spread) == 0.0:
        return mean
    loadings = scaled.T @ scores / spread
    slope = scores @ centred / spread
    score = (target - accuracies.mean()) / slope
    row: Tensor = score * loadings * deviation + mean
    return row


def _leading(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The `a_s` `[S, d_out]` with their signs chained back from the last, and `v_S` `[d_in]`."""
    lefts: list[Tensor] = []
    right = vectors[-1].new_zeros(vectors[-1].shape[1], dtype=torch.float64)
    following: Tensor | None = None
    for index in reversed(range(len(vectors))):
        left, v = _leading_pair(vectors[index])
        if index == len(vectors) - 1:
            right = v
        # A checkpoint without any change has no direction; its neighbours are compared past it.
        if following is not None and float(left @ following) < 0.0:
            left = -left
        if bool(left.any()):
            following = left
        lefts.append(left)
    return torch.stack(lefts[::-1]), right


def _leading_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`σ_1 u_1` `[d_out]` and `v_1` `[d_in]`, float64; zeros for a zero matrix."""
    sigma, vectors = singular_values_and_vectors(upright(matrix))
    tall, leading = matrix.shape[0] >= matrix.shape[1], vectors[:, 0]
    if float(sigma[0]) == 0.0:
        zeros = sigma.new_zeros
        return zeros(matrix.shape[0]), zeros(matrix.shape[1])
    other = _times(upright(matrix), leading)
    return (other, leading) if tall else (leading * sigma[0], other / sigma[0])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.cat([block @ vector for _, block in row_blocks(matrix)])


def _check(settings: MethodSettings, candidates: int) -> list[str]:
    chosen, key = settings.alpharl_prediction, "method.alpharl_prediction"
    problems = []
    if chosen.accuracies is None:
        problems.append(f"{key}.accuracies: is not set; one for each candidate, in time order")
    elif len(chosen.accuracies) != candidates:
        problems.append(
            f"{key}.accuracies: got {len(chosen.accuracies)}, expected one for each of the "
            f"{candidates} states that an iteration merges"
        )
    elif len(set(chosen.accuracies)) == 1:
        problems.append(f"{key}.accuracies: are all equal, so that nothing follows from them")
    if chosen.target is None:
        problems.append(f"{key}.target: is not set; the accuracy to predict the weights for")
    return problems


OPERATOR = Operator(
    "alpharl_prediction",
    update,
    whole_tensors=True,
    uses_coefficient=False,
    candidates_only=True,
    min_models=2,
    check=_check,
)

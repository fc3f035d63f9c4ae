"""Means on the sphere: SLERP of two models, and two means of more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from arm_ray.merging.blocks import combination, gram, in_blocks
from arm_ray.merging.operator import OnModels, Operator, Statistics, Sums, TaskVectors
from arm_ray.merging.operator_settings import SlerpSettings
from arm_ray.merging.settings import MethodSettings

# The coefficients of models in their mean, from their inner products `[n, n]` float64.
Weigh = Callable[[np.ndarray, MethodSettings], list[float]]
# Tensors of no larger norm have no direction.
_SMALLEST_NORM = 1e-8
# Models whose cosine is beyond are merged on a line.
_LARGEST_COSINE = 0.9995
# Elements of a model in float64 at once, where each row has an angle of its own.
_ROWS = 1 << 20


def slerp(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """`[sin((1 − t) θ) A + sin(t θ) B] / sin θ − W_ref`, θ the angle between the models A and B.

    Where one of them is zero or they are (anti)parallel, `(1 − t) A + t B − W_ref`. In a window
    the reference is A. With `of: task_vectors` the same formula merges the task vectors, to which
    the reference is added. With `over: rows` each row has a θ of its own.
    """
    chosen = settings.slerp
    if chosen.over == "rows":
        return _slerp_rows(given, chosen)
    return _merge(given, chosen.of == "weights")


def _arc_weights(products: np.ndarray, settings: MethodSettings) -> list[float]:
    found = _on_arc(torch.from_numpy(products)[None], settings.slerp.t)
    return [float(c) for c in found[0]]


def _on_arc(products: Tensor, t: float) -> Tensor:
    """The coefficients `[n, 2]` float64 of two models, from their inner products `[n, 2, 2]`."""
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms.prod(dim=1)
    cosine = products[:, 0, 1] / torch.where(lengths > 0.0, lengths, 1.0)
    is_curved = (norms.min(dim=1).values > _SMALLEST_NORM) & (cosine.abs() <= _LARGEST_COSINE)
    angle = torch.acos(torch.where(is_curved, cosine, 0.0))
    ends = torch.tensor([1.0 - t, t], dtype=torch.float64, device=products.device)
    curved = torch.sin(ends * angle[:, None]) / torch.sin(angle)[:, None]
    return torch.where(is_curved[:, None], curved, ends)


def _slerp_rows(given: TaskVectors, settings: SlerpSettings) -> Tensor:
    """The same row by row; a vector's or a number's is one row."""
    reference = given.inputs.reference
    vectors = [v.contiguous() for v in given.vectors]
    if given.inputs.includes_reference:
        vectors.insert(0, torch.zeros_like(reference))
    rows = len(reference) if reference.ndim > 1 else 1
    matrices = [tensor.reshape(rows, -1) for tensor in (*vectors, reference)]
    result = torch.empty_like(matrices[0])
    step = max(1, _ROWS // max(1, result.shape[1]))
    for start in range(0, rows, step):
        *ends, base = (matrix[start : start + step].double() for matrix in matrices)
        if settings.of == "weights":
            ends = [end + base for end in ends]
        models = torch.stack(ends, dim=1)
        products = (models[:, :, None] * models[:, None]).sum(3)
        merged = (_on_arc(products, settings.t)[:, :, None] * models).sum(1)
        result[start : start + step] = merged - base if settings.of == "weights" else merged
    return result.view(reference.shape)


def spherical_mean(given: TaskVectors, settings: MethodSettings) -> Tensor:
    """A mean of the models' directions, as long as the mean of their norms, minus `W_ref`.

    With `u_i = A_i / |A_i|`, `w_i` the weights (of sum 1) and `log_μ`, `exp_μ` the logarithm and
    exponential on the unit sphere, from `μ = Σ w_i u_i`, normalised:

    - `karcher` repeats `μ ← exp_μ(Σ w_i log_μ(u_i))`;
    - `projection` does one such step with `u_i − <u_i, μ> μ` in the place of the logarithm.

    Where a model is zero or μ is, the mean is the ordinary one.
    """
    return _merge(given, settings.spherical_mean.of == "weights")


def _mean_weights(products: np.ndarray, settings: MethodSettings) -> list[float]:
    mean, count = settings.spherical_mean, len(products)
    weights = np.array(mean.weights or (1.0,) * count, dtype=np.float64)
    if len(weights) != count:
        raise ValueError(f"weights: got {len(weights)}, expected one for each of {count} models")
    weights /= weights.sum()
    norms = np.sqrt(np.diag(products))
    if norms.min() <= _SMALLEST_NORM:
        return [float(w) for w in weights]
    # All that happens, happens in the span of the models. So μ is kept as its coefficients on
    # the u_i, and all lengths and angles follow from the inner products.
    cosines = products / np.outer(norms, norms)
    length = _length(weights, cosines)
    if length == 0.0:
        return [float(w) for w in weights]
    center = weights / length
    if mean.kind == "karcher":
        for _ in range(mean.max_steps):
            step = _mean_tangent(center, weights, cosines, logarithm=True)
            center = _exponential(center, step, cosines)
            if _length(step, cosines) < mean.step_tolerance:
                break
    else:
        step = _mean_tangent(center, weights, cosines, logarithm=False)
        center = _exponential(center, step, cosines)
    return [float(c) for c in center * (weights @ norms) / norms]


def _length(point: np.ndarray, cosines: np.ndarray) -> float:
    """Of a point given by its coefficients on the `u_i`; 0 if too short for a direction."""
    length = math.sqrt(max(0.0, float(point @ cosines @ point)))
    return length if length > _SMALLEST_NORM else 0.0


def _mean_tangent(
    center: np.ndarray, weights: np.ndarray, cosines: np.ndarray, *, logarithm: bool
) -> np.ndarray:
    """`Σ w_i v_i`, with `v_i` the logarithm of `u_i` at μ or its projection; as coefficients."""
    total = np.zeros_like(center)
    for index, weight in enumerate(weights):
        cosine = min(1.0, max(-1.0, float(cosines[index] @ center)))
        tangent = -cosine * center
        tangent[index] += 1.0
        sine = math.sqrt((1.0 - cosine) * (1.0 + cosine))
        # θ / sin θ: 1 where μ is u_i. Opposite of it there is no direction to go.
        if logarithm and sine > _SMALLEST_NORM:
            tangent *= math.atan2(sine, cosine) / sine
        total += weight * tangent
    return total


def _exponential(center: np.ndarray, step: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """`cos|v| μ + sin|v| v / |v|`, normalised."""
    length = _length(step, cosines)
    if length == 0.0:
        return center
    moved = math.cos(length) * center + math.sin(length) / length * step
    return np.asarray(moved / _length(moved, cosines))


def _merge(given: TaskVectors, of_weights: bool) -> Tensor:
    """`Σ c_i A_i − W_ref`, with coefficients from the inner products of the models.

    With `A_i = W_ref + ΔW_i` that is `Σ c_i ΔW_i + (Σ c_i − 1) W_ref`: one pass for the inner
    products, one for the sum.
    """
    reference = given.inputs.reference
    vectors = [v.contiguous() for v in given.vectors]
    weights = cast(Sequence[float], given.inputs.statistics["weights"])
    surplus = math.fsum([*weights, -1.0]) if of_weights else 0.0
    weights = weights[len(weights) - len(vectors) :]
    if not vectors:
        return torch.zeros_like(reference)
    for total, *terms, base in in_blocks([*vectors, reference]):
        total.mul_(weights[0])
        for term, weight in zip(terms, weights[1:], strict=True):
            total.add_(term, alpha=weight)
        # Zero where they are merged on a line.
        if surplus != 0.0:
            total.add_(base, alpha=surplus)
    return vectors[0]


def _on_models(applies: Callable[[MethodSettings], bool], precision: torch.dtype) -> OnModels:
    """`Σ c_i A_i`, with coefficients from the inner products of the models."""

    def measure(models: Sequence[Tensor], _settings: MethodSettings) -> Sums:
        return {"products": gram([m.contiguous() for m in models], within_blocks=precision)}

    def merge(
        models: Sequence[Tensor], known: Mapping[str, object], _settings: MethodSettings
    ) -> Tensor:
        return combination(models, cast(Sequence[float], known["weights"]))

    return OnModels(applies, measure, merge)


def _products(given: TaskVectors, of_weights: bool, precision: torch.dtype) -> Sums:
    """Inner products of the models, or of their task vectors, `[n, n]` float64."""
    reference = given.inputs.reference
    models = [v.contiguous() for v in given.vectors]
    if given.inputs.includes_reference:
        models.insert(0, torch.zeros((), device=reference.device).expand_as(reference))
    added = reference if of_weights else None
    return {"products": gram(models, added, within_blocks=precision)}


def _statistics(
    of_weights: Callable[[MethodSettings], bool],
    precision: torch.dtype,
    weigh: Weigh,
    rounds: Callable[[MethodSettings], int] = lambda _settings: 1,
) -> Statistics:
    def conclude(
        _number: int, sums: Sums, known: Mapping[str, object], settings: MethodSettings
    ) -> Mapping[str, object]:
        return {**known, "weights": weigh(sums["products"].numpy(), settings)}

    return Statistics(
        rounds=lambda settings, _contributors: rounds(settings),
        measure=lambda _number, given, settings: _products(given, of_weights(settings), precision),
        conclude=conclude,
        by_tensor=lambda _settings: True,
    )


def _check(settings: MethodSettings, num_models: int) -> list[str]:
    weights = settings.spherical_mean.weights
    if weights is None or len(weights) == num_models:
        return []
    return [
        f"method.spherical_mean.weights: got {len(weights)} weights,"
        f" expected one for each of {num_models} models"
    ]


OPERATOR = Operator(
    "slerp",
    slerp,
    # Beyond the largest cosine it does not matter, below it float32 gives the angle.
    statistics=_statistics(
        lambda settings: settings.slerp.of == "weights",
        torch.float32,
        _arc_weights,
        lambda settings: int(settings.slerp.over == "tensor"),
    ),
    on_models=_on_models(
        lambda settings: settings.slerp.of == "weights" and settings.slerp.over == "tensor",
        torch.float32,
    ),
    whole_tensors=lambda settings: settings.slerp.over == "rows",
    uses_coefficient=False,
    min_models=2,
    max_models=2,
)
SPHERICAL_MEAN = Operator(
    "spherical_mean",
    spherical_mean,
    statistics=_statistics(
        lambda settings: settings.spherical_mean.of == "weights", torch.float64, _mean_weights
    ),
    on_models=_on_models(lambda settings: settings.spherical_mean.of == "weights", torch.float64),
    uses_coefficient=False,
    min_models=2,
    check=_check,
)

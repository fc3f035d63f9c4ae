"""Steps that set entries of a task vector to zero before an operator merges it.

DARE drops at random (`dare`). DELLA drops at random too, small entries more often than large ones.
Breadcrumbs drops the largest and the smallest.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from arm_ray.merging import dare
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.operator_settings import BreadcrumbsSettings, DellaSettings
from arm_ray.merging.settings import THINNING, MethodSettings

# Elements whose ranks are found at once.
_BLOCK = 1 << 20


def thins(settings: MethodSettings) -> bool:
    """Whether entries of task vectors are dropped."""
    return bool({*THINNING} & {*settings.steps})


def needs_whole_tensors(settings: MethodSettings, ndim: int) -> bool:
    """Whether that takes a tensor whole, and not rows of it.

    Args:
        settings: Of the method.
        ndim: The tensor's dimensions.
    """
    steps = settings.steps
    if "della" in steps:
        # The entries of a vector are ranked among themselves, those of a matrix row by row.
        return settings.della.rescale == "l1" or ndim < 2
    return "breadcrumbs" in steps or ("dare" in steps and settings.dare.rescale == "l1")


def thinned(settings: MethodSettings, inputs: TensorInputs, vectors: list[Tensor]) -> list[Tensor]:
    """Task vectors without the entries that are dropped; what was given is overwritten."""
    shape = tuple(inputs.reference.shape) if inputs.shape is None else inputs.shape
    # Without names, contributors are told apart by their place.
    names = inputs.contributor_names or tuple(map(str, range(len(vectors))))
    found = []
    for vector, name in zip(vectors, names, strict=True):
        place = (inputs.rows, shape, inputs.name, name, inputs.iteration)
        if "dare" in settings.steps:
            found.append(dare.drop(vector, *place, settings.dare))
        elif "della" in settings.steps:
            found.append(drop_small(vector, *place, settings.della))
        else:
            found.append(drop_outliers(vector, settings.breadcrumbs))
    return found


def problems(settings: MethodSettings) -> list[str]:
    """What is wrong with the settings of a step that drops entries: a sentence each."""
    epsilon = settings.della.epsilon
    if "della" not in settings.steps:
        return []
    # A part without any drop is left alone; between 0 and another rate are small ones.
    wrong = [
        rate
        for rates in settings.values("della.drop_rate").values()
        for rate in rates
        if max(rates) > 0.0 and not (1.0 - rate - epsilon > 0.0 and 1.0 - rate + epsilon <= 1.0)
    ]
    return [
        f"method.della.epsilon: got {epsilon} with drop_rate {rate}; "
        "1 - drop_rate - epsilon must be above 0, and 1 - drop_rate + epsilon at most 1"
        for rate in dict.fromkeys(wrong)
    ]


def drop_small(
    vector: Tensor,
    rows: slice,
    shape: tuple[int, ...],
    name: str,
    contributor: str,
    iteration: int,
    settings: DellaSettings,
) -> Tensor:
    """DELLA's thinning: entries dropped at random, small ones of a row more often.

    Of `n` entries of a row, that of rank `r` (0: the smallest) stays with the chance

        q_r = (1 − p) + ε (2 r / (n − 1) − 1)

    and is divided by it, so that its mean over all seeds is the whole. Equal entries are ranked in
    their order.

    Args:
        vector: `ΔW`, float32: the whole tensor or some rows of it.
        rows: Which rows.
        shape: Of the whole tensor.
        name: Of the tensor.
        contributor: Name of the state.
        iteration: 1-based number.
        settings: The section `della`.
    """
    if settings.drop_rate == 0.0:
        return vector
    width = math.prod(shape[1:]) if len(shape) > 1 else max(1, math.prod(shape))
    matrix = vector.contiguous().view(-1, width)
    key = dare.stream(settings.seed, iteration, name, contributor)
    # A vector is one row, and whole.
    position = (rows.start or 0) * width if len(shape) > 1 else 0
    keep, before, after = 1.0 - settings.drop_rate, 0.0, 0.0
    for first in range(0, len(matrix), max(1, _BLOCK // width)):
        block = matrix[first : first + max(1, _BLOCK // width)]
        ranks = block.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
        spread = 2.0 * ranks / (width - 1) - 1.0 if width > 1 else torch.zeros_like(ranks)
        chances = keep + settings.epsilon * spread
        words = dare.words(key, position + first * width, block.numel()).reshape(block.shape)
        kept = torch.from_numpy(words.astype(np.int64)).to(block.device) < chances * 2.0**32
        if settings.rescale == "l1":
            before += float(block.abs().sum(dtype=torch.float64))
        block.mul_(kept)
        if settings.rescale == "l1":
            after += float(block.abs().sum(dtype=torch.float64))
        elif settings.rescale == "exact":
            block.div_(chances)
    if settings.rescale == "l1" and after > 0.0:
        matrix.mul_(before / after)
    return matrix.view(vector.shape)


def drop_outliers(vector: Tensor, settings: BreadcrumbsSettings) -> Tensor:
    """Breadcrumbs' thinning: the largest and the smallest entries of a whole tensor dropped.

    Of `n` entries `⌊γ n⌋` of largest magnitude are dropped, and of the others so many of the
    smallest that `⌊keep · n⌋` are left. Where there are too few others, fewer of the largest are
    dropped. What is as large as the smallest or largest that stays, stays too.
    """
    flat = vector.contiguous().view(-1)
    count = flat.numel()
    kept = int(settings.keep * count)
    top = min(int(settings.largest * count), count - kept)
    bottom = count - kept - top
    if kept == 0:
        return vector.zero_()
    sizes = flat.abs()
    lowest = torch.kthvalue(sizes, bottom + 1).values
    highest = torch.kthvalue(sizes, count - top).values
    return flat.mul_((sizes >= lowest) & (sizes <= highest)).view(vector.shape)

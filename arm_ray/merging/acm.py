"""ACM: coefficients from the mutual information of activations (Yao et al., 2025).

Activations are rounded to bfloat16 and taken as class labels. With `I_j` the information, in nats,
that the activations of sample `j` in two models share at one place of the network,

    λ = 1 − mean_j σ(t (I_j − x))

where `x` is the largest `I_j` of that place (the released code), of all places, or 0 (the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arm_ray.merging.operator_settings import AcmSettings

_CODES = 1 << 16


def label_codes(values: Tensor) -> Tensor:
    """Class labels of activations: the bits of their bfloat16, 0 to 65535, int64, flat."""
    # Adding zero turns −0 into +0, which is the same value.
    rounded = (values.to(torch.bfloat16) + 0.0).contiguous().view(torch.int16).reshape(-1)
    return rounded.to(torch.int64) & (_CODES - 1)


def mutual_information(one: Tensor, other: Tensor) -> float:
    """`Σ p(u, v) ln(p(u, v) / (p(u) p(v)))` of paired labels, in nats; the exact plug-in estimate.

    Args:
        one: `[n]` int64 labels from `label_codes`.
        other: `[n]`, of the same elements in the other model.
    """
    _, joint = torch.unique(one * _CODES + other, return_counts=True)
    marginals = [torch.bincount(codes, minlength=_CODES) for codes in (one, other)]
    information = _entropy(marginals[0]) + _entropy(marginals[1]) - _entropy(joint)
    return max(0.0, information)


def coefficient(information: Tensor, shift: float | None, settings: AcmSettings) -> float:
    """λ of one place.

    Args:
        information: `[N]` float64, of each sample of the mini-batch.
        shift: Largest information of all places, for `shift: global`.
        settings: t, and what is subtracted.
    """
    if settings.shift == "per_layer":
        shift = float(information.max())
    elif settings.shift == "none":
        shift = 0.0
    assert shift is not None
    return 1.0 - float(torch.sigmoid(settings.t * (information - shift)).mean())


def _entropy(counts: Tensor) -> float:
    counts = counts[counts > 0].to(torch.float64)
    total = counts.sum()
    return float(torch.log(total) - (counts * torch.log(counts)).sum() / total)


@dataclass(frozen=True)
class LayerCoefficients:
    """What a method with this step asks of the forward passes, and what it makes of it.

    It wants every layer's output of all inputs, and compares the contributors' with the
    reference's.

    Attributes:
        settings: The step's.
    """

    settings: AcmSettings

    @property
    def needs_all_layers(self) -> bool:
        """Whether a layer's coefficient depends on the information of all layers."""
        return self.settings.shift == "global"

    @property
    def max_elements(self) -> int:
        """Values of one sample that are looked at, at one place."""
        return self.settings.max_elements

    def labels(self, values: Tensor) -> Tensor:
        """Class labels of one sample's activations `[tokens, width]`: `[n]` int64."""
        return label_codes(values)[: self.max_elements]

    def information(self, one: Tensor, other: Tensor) -> float:
        """See `mutual_information`."""
        return mutual_information(one, other)

    def coefficient(self, information: Tensor, largest: float | None) -> float:
        """See `coefficient`."""
        return coefficient(information, largest, self.settings)

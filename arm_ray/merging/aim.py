"""AIM: hold back the update of the input channels that the base uses most (Nobari et al., 2025).

With `a_j` the mean magnitude of a module's input channel `j` on the calibration samples,

    s_j = a_j / max a        r_j = 1 − s_j (1 − ω)        W = W_ref + r ⊙ (W_merged − W_ref)

along the last axis of the module's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arm_ray.merging.settings import AimSettings


def relaxation(
    magnitudes: Tensor, weights: Tensor, lengths: Tensor, settings: AimSettings
) -> Tensor:
    """`r` `[d]` float32, between ω and 1.

    Args:
        magnitudes: `[samples, d]` mean magnitudes over each sample's tokens.
        weights: `[samples]`: how often each sample is in the mini-batch.
        lengths: `[samples]`: its tokens.
        settings: ω, and whether samples or tokens count alike.
    """
    shares = weights * lengths if settings.average == "token" else weights
    mean = shares.to(torch.float64) @ magnitudes.to(torch.float64)
    # The scale cancels. A module without any activation is not held back.
    largest = mean.max()
    salience = mean / torch.where(largest > 0.0, largest, torch.ones_like(largest))
    return (1.0 - salience * (1.0 - settings.omega)).to(torch.float32)

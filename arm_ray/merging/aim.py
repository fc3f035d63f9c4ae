"""AIM: hold back the update of the input channels that the base uses most (Nobari et al., 2025).

With `a_j` the mean magnitude of a module's input channel `j` on the calibration samples,

    s_j = a_j / max a        r_j = 1 − s_j (1 − ω)        W = W_ref + r ⊙ (W_merged − W_ref)

along the last axis of the module's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arm_ray.merging.operator_settings import AimSettings


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


@dataclass(frozen=True)
class Relaxation:
    """What a method with this step asks of the forward passes, and what it makes of it.

    Attributes:
        settings: The step's.
    """

    settings: AimSettings

    def of(self, reference: str, base: str) -> str:
        """The state whose inputs' magnitudes are wanted, of every linear module and norm."""
        return base if self.settings.activations_of == "base" else reference

    @property
    def relaxes_tied_head(self) -> bool:
        """Whether an embedding that is also the head is held back as a head.

        Then the first layer group cannot be merged before the last has been run.
        """
        return self.settings.tied == "relax"

    def factors(self, magnitudes: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """See `relaxation`."""
        return relaxation(magnitudes, weights, lengths, self.settings)

"""The losses of models on the same samples, and what tells them apart. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arm_ray.evaluation.statistics import Comparison, Estimate, compare, estimate


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """A model's losses, sample by sample.

    Attributes:
        sums: `[samples]` float64: sum of -log p over the tokens of each that count.
        tokens: `[samples]` float64: how many these are.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @classmethod
    def of(cls, columns: NDArray[np.float64]) -> SampleLosses:
        """From `[samples, 2]`. Samples without a token that counts are left out."""
        counted = columns[columns[:, 1] > 0]
        return cls(counted[:, 0], counted[:, 1])

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> float:
        """Mean over all tokens; infinite where it is not finite, or there are no tokens."""
        tokens = float(self.tokens.sum())
        value = math.fsum(self.sums.tolist()) / tokens if tokens else math.inf
        return value if math.isfinite(value) else math.inf

    @property
    def is_finite(self) -> bool:
        """Whether all are."""
        return bool(np.isfinite(self.sums).all())

    def estimate(self) -> Estimate:
        """The mean, with its interval over samples."""
        return estimate(self.sums, self.tokens)

    def minus(self, other: SampleLosses) -> Comparison:
        """The difference to another model on the same samples, with its interval."""
        return compare(self.sums, other.sums, self.tokens)

    def is_lower_than(self, other: SampleLosses) -> bool:
        """Whether the loss is lower, beyond the error of the paired difference."""
        if not self.is_finite:
            return False
        return not other.is_finite or self.minus(other).high < 0.0

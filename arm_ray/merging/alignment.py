"""Where a tensor lies in memory, which has an influence on the bits of products."""

from __future__ import annotations

from torch import Tensor

_ALIGNMENT_BYTES = 64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it lies askew in host memory.

    MKL's products depend on how their operands lie: on whether a tensor was mapped from one file or
    another, or kept since it was made. The bits of a result must not.
    """
    askew = tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT_BYTES != 0
    return tensor.clone() if askew else tensor

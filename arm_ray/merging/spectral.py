"""Functions of a matrix's singular values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arm_ray.merging.svd import row_blocks, singular_values_and_vectors, upright


def scale_singular_values(matrix: Tensor, factors: Callable[[Tensor], Tensor]) -> Tensor:
    """`U diag(f(σ) σ) Vᵀ` of a matrix `X = U diag(σ) Vᵀ`, as `X · V diag(f(σ)) Vᵀ`.

    Args:
        matrix: `X` `[d_out, d_in]`, float32.
        factors: σ (descending, float64) -> f(σ), at most about 1.

    Returns:
        Float32, contiguous.
    """
    tall = upright(matrix)
    sigma, vectors = singular_values_and_vectors(tall)
    projector = (vectors * factors(sigma)) @ vectors.T
    result = torch.empty_like(tall)
    for rows, block in row_blocks(tall):
        result[rows] = (block @ projector).float()
    return (result if tall is matrix else result.T).contiguous()

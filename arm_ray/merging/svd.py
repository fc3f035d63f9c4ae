"""Singular values and vectors of one side of a matrix, without a float64 copy of a large one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements up to which a matrix is decomposed itself; larger ones through their Gram matrix, which
# is many times cheaper and loses singular values below about 1e-8 of the largest.
SMALL = 1 << 20
# Elements of a large matrix that are in float64 at a time.
_BLOCK = 1 << 22


def upright(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, a view `[long, short]` of it with `long ≥ short`."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows in float64, a few million elements at a time."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, min(start + step, matrix.shape[0]))
        yield rows, matrix[rows].to(torch.float64)


def singular_values_and_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`σ` and `V` of `matrix = U diag(σ) Vᵀ`, for a matrix that is at least as tall as wide.

    Args:
        matrix: `[long, short]`, finite, float32 or float64.

    Returns:
        `σ` `[short]`, float64, largest first, and `V` `[short, short]`, float64, orthogonal. Of a
        matrix with more than `SMALL` elements they are the roots of the eigenvalues and the
        eigenvectors of `MᵀM`; eigenvalues that rounding can make are zero.
    """
    if matrix.numel() <= SMALL:
        _, sigma, transposed = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
        return sigma, transposed.T
    short = matrix.shape[1]
    gram = torch.zeros(short, short, dtype=torch.float64, device=matrix.device)
    for _, block in row_blocks(matrix):
        gram.addmm_(block.T, block)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = short * torch.finfo(torch.float64).eps * values[:1].clamp(min=0.0)
    return torch.where(values > noise, values, 0.0).sqrt(), vectors


def left_basis(matrix: Tensor, rank: int, tolerance: float) -> Tensor:
    """An orthonormal basis of the leading left singular subspace.

    Args:
        matrix: `[m, n]`, finite, float32 or float64.
        rank: Most dimensions.
        tolerance: Singular values at or below this fraction of the largest count as zero.

    Returns:
        `[m, r]` float64, with `r` the smaller of `rank` and the numerical rank; in any basis.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    sigma, vectors = singular_values_and_vectors(upright(matrix))
    rank = min(rank, int((sigma > tolerance * sigma[0]).sum()))
    if not tall:
        return vectors[:, :rank]
    scaled = vectors[:, :rank] / sigma[:rank]
    columns = torch.cat([block @ scaled for _, block in row_blocks(matrix)])
    # Far below the largest singular value the columns are orthogonal only roughly.
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis

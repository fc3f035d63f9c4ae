"""The rotation by the left singular vectors of an activation shift, in compact form.

ARM multiplies a task vector `ΔW` `[d_out, d_in]` by the orthogonal left factor `U`
`[d_out, d_out]` of the full singular value decomposition of the activation shift `ΔA`
`[d_out, N]` (Eqs. 3-5). The data determine only the first `N` columns of `U`. Householder QR
gives the others: with `ΔA = Q R`, `Q = H_1 … H_N`, and `R = Ũ Σ Vᵀ`,

    U = Q · blockdiag(Ũ, I)

and with the reflectors in compact WY form (`Q = I − V T Vᵀ`; Schreiber and Van Loan, 1989)
`U ΔW` costs three thin matrix products and never forms a `d_out × d_out` matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from arm_ray.merging.operator_settings import SignRule
from arm_ray.merging.svd import left_basis

# How many singular values are told of a shift.
SPECTRUM_POINTS = 16


@dataclass(frozen=True)
class RotationFacts:
    """How strong a rotation is, and what it is made from.

    Attributes:
        mean_diagonal: `tr(U) / d_out`: about cos(U ΔW, ΔW).
        rank: Numerical rank of the activation shift.
        spectrum: Singular values of the shift, descending, at `SPECTRUM_POINTS` evenly spaced
            ranks; all of them where there are fewer.
    """

    mean_diagonal: float
    rank: int
    spectrum: tuple[float, ...]


class _OrthogonalMap(ABC):
    """What rotations have in common."""

    rank: int
    full_rank: int
    facts: RotationFacts

    @property
    def is_rank_deficient(self) -> bool:
        """Whether degenerate samples reduced the rotation to fewer directions."""
        return self.rank < self.full_rank

    def apply(self, task_vector: Tensor) -> Tensor:
        """Return the rotated task vector.

        Args:
            task_vector: `ΔW` `[d_out, d_in]`, float32 or float64, which the products keep.
        """
        return self.apply_(task_vector.clone())

    @abstractmethod
    def apply_(self, task_vector: Tensor) -> Tensor:
        """Rotate a task vector in its own memory; see `apply`."""


@dataclass(frozen=True)
class Rotation(_OrthogonalMap):
    """An orthogonal `U = (I − V T Vᵀ) · blockdiag(core, I) · diag(signs)`.

    Attributes:
        core: `[r, r]` float64; acts on the first `r` rows.
        reflectors: `V`, `[d_out, r]` float64, unit lower trapezoidal; None if `r = d_out`, where
            `core` is the whole of `U`.
        factor: `T`, `[r, r]` float64, upper triangular; None if `reflectors` is None.
        signs: `[d_out]` float64 of +1 and −1, one for each column of `U`.
        rank: Numerical rank `r` of the activation shift.
        full_rank: `min(d_out, N)`: the rank it would have without degenerate samples.
        facts: What is told of it.
    """

    core: Tensor
    reflectors: Tensor | None
    factor: Tensor | None
    signs: Tensor
    rank: int
    full_rank: int
    facts: RotationFacts

    def apply_(self, task_vector: Tensor) -> Tensor:
        """Turn `ΔW` into `U ΔW` in its own memory; see `apply`."""
        dtype, r = task_vector.dtype, self.core.shape[0]
        rotated = task_vector
        # Few columns of U are flipped: most have a diagonal entry near 1.
        flipped = torch.nonzero(self.signs < 0.0)[:, 0]
        rotated[flipped] = -rotated[flipped]
        rotated[:r] = self.core.to(dtype) @ rotated[:r]
        if self.reflectors is None or self.factor is None:
            return rotated
        v = self.reflectors.to(dtype)
        return rotated.addmm_(v, self.factor.to(dtype) @ (v.T @ rotated), alpha=-1.0)

    def diagonal(self) -> Tensor:
        """The diagonal of `U`, `[d_out]` float64; its mean is about cos(U ΔW, ΔW)."""
        return _diagonal(self.core, self.reflectors, self.factor, self.signs)


def activation_rotation(
    shift: Tensor, *, sign: SignRule = "positive_diagonal", rank_tolerance: float = 1.0e-6
) -> Rotation | None:
    """Turn an activation shift into its rotation.

    The factorisation runs in float64 on the device of `shift`. Where the shift is numerically
    rank-deficient, the reflectors are those of its `r` leading left singular vectors alone, so
    that rounding noise does not rotate anything.

    Args:
        shift: `ΔA` `[d_out, N]`: column `j` is the shift of sample `j`'s mean output.
        sign: `positive_diagonal` flips columns of `U` so that `U[j, j] ≥ 0`, which of all sign
            choices is closest to the identity; `library` keeps the signs that LAPACK returns.
        rank_tolerance: Singular values at or below this fraction of the largest count as zero.

    Returns:
        The rotation, or None where the shift is zero (nothing to rotate by).

    Raises:
        ValueError: `shift` is no matrix, or is not finite.
    """
    if shift.ndim != 2:
        raise ValueError(f"shift: got {list(shift.shape)}, expected [d_out, N]")
    shift = shift.to(torch.float64)
    if not bool(torch.isfinite(shift).all()):
        raise ValueError("shift: got NaN or infinity, expected finite activations")
    d_out, num_samples = shift.shape
    full_rank = min(d_out, num_samples)
    # LAPACK would choose another path for d_out < 11 N / 6. Ours depends on N < d_out alone.
    if num_samples < d_out:
        packed, tau = torch.geqrf(shift)
        left, sigma, _ = torch.linalg.svd(packed[:num_samples].triu())
    else:
        left, sigma, _ = torch.linalg.svd(shift, full_matrices=False)
    if sigma[0] == 0.0:
        return None
    rank = int((sigma > rank_tolerance * sigma[0]).sum())
    core, reflectors, factor = left, None, None
    if num_samples < d_out:
        reflectors, factor = _compact_wy(packed, tau)
    if rank < full_rank:
        leading = left[:, :rank]
        if reflectors is not None and factor is not None:
            leading = _apply_reflectors(reflectors, factor, leading)
        packed, tau = torch.geqrf(leading)
        reflectors, factor = _compact_wy(packed, tau)
        # R of orthonormal columns is diagonal, ±1, up to rounding.
        core = torch.diag(torch.sign(packed[:rank].diagonal()))
    signs = shift.new_ones(d_out)
    diagonal = _diagonal(core, reflectors, factor, signs)
    if sign == "positive_diagonal":
        signs = torch.where(diagonal < 0.0, -signs, signs)
    facts = RotationFacts(float((diagonal * signs).mean()), rank, _spectrum(sigma))
    return Rotation(core, reflectors, factor, signs, rank, full_rank, facts)


def _spectrum(sigma: Tensor) -> tuple[float, ...]:
    """See `RotationFacts.spectrum`."""
    values: list[float] = sigma.tolist()
    if len(values) <= SPECTRUM_POINTS:
        return tuple(values)
    last = len(values) - 1
    return tuple(values[round(i * last / (SPECTRUM_POINTS - 1))] for i in range(SPECTRUM_POINTS))


@dataclass(frozen=True)
class MinimalRotation(_OrthogonalMap):
    """The rotation by the principal angles between two subspaces, and the identity elsewhere.

    With the pairs of principal vectors `a_i`, `b_i` as columns of `A` and `B` `[d_out, k]`, and
    the cosines `c_i = a_iᵀ b_i` of their angles,

        R = I − (A + B) diag(1 / (1 + c_i)) (A + B)ᵀ + 2 B Aᵀ

    turns every `a_i` into `b_i` within their plane. Nothing here is divided by a small number,
    whatever the angles.

    Attributes:
        sources: `A`, float64, orthonormal.
        targets: `B`, float64, orthonormal; `AᵀB = diag(c)`.
        cosines: `c` `[k]` float64, from 0 to 1.
        rank: Numerical rank of the activation shift.
        full_rank: `min(d_out, N)`: the rank it would have without degenerate samples.
        facts: What is told of it.
    """

    sources: Tensor
    targets: Tensor
    cosines: Tensor
    rank: int
    full_rank: int
    facts: RotationFacts

    def apply_(self, task_vector: Tensor) -> Tensor:
        """Turn `ΔW` into `R ΔW` in its own memory; see `apply`."""
        dtype = task_vector.dtype
        between = (self.sources + self.targets) / (1.0 + self.cosines).sqrt()
        # Both projections before the first product overwrites what they are of.
        shrunk = between.T.to(dtype) @ task_vector
        turned = self.sources.T.to(dtype) @ task_vector
        task_vector.addmm_(between.to(dtype), shrunk, alpha=-1.0)
        return task_vector.addmm_(self.targets.to(dtype), turned, alpha=2.0)


def minimal_rotation(
    shift: Tensor, task_vector: Tensor, *, rank_tolerance: float = 1.0e-6
) -> MinimalRotation | None:
    """The smallest rotation that takes a task vector's leading directions into the shift's.

    `r` is the numerical rank of the shift `ΔA`. The leading left singular subspace of `ΔW`, of `r`
    dimensions or of its own rank if that is smaller, is turned into the column space of `ΔA`. Of
    all orthogonal matrices that do this, the one by principal vectors is closest to the identity;
    it does not depend on signs or bases. (It is unique unless an angle is a right one.)

    Args:
        shift: `ΔA` `[d_out, N]`.
        task_vector: `ΔW` `[d_out, d_in]`, float32 or float64.
        rank_tolerance: Singular values at or below this fraction of the largest count as zero, of
            both matrices.

    Returns:
        The rotation, or None where there is nothing to rotate: one of the two is zero, or the shift
        spans everything.

    Raises:
        ValueError: `shift` is no matrix, or is not finite.
    """
    if shift.ndim != 2:
        raise ValueError(f"shift: got {list(shift.shape)}, expected [d_out, N]")
    shift = shift.to(torch.float64)
    if not bool(torch.isfinite(shift).all()):
        raise ValueError("shift: got NaN or infinity, expected finite activations")
    d_out, num_samples = shift.shape
    left, sigma, _ = torch.linalg.svd(shift, full_matrices=False)
    if sigma[0] == 0.0 or not bool(task_vector.any()):
        return None
    rank = int((sigma > rank_tolerance * sigma[0]).sum())
    if rank == d_out:
        return None
    into = left[:, :rank]
    leading = left_basis(task_vector, rank, rank_tolerance)
    x, cosines, y = torch.linalg.svd(leading.T @ into, full_matrices=False)
    cosines = cosines.clamp(max=1.0)
    # Each plane adds 2 c to the trace, and what is outside of the planes 1 for each dimension.
    mean_diagonal = 1.0 - 2.0 * float((1.0 - cosines).sum()) / d_out
    facts = RotationFacts(mean_diagonal, rank, _spectrum(sigma))
    return MinimalRotation(leading @ x, into @ y.T, cosines, rank, min(d_out, num_samples), facts)


def _compact_wy(packed: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """`V` `[d_out, r]` and `T` `[r, r]` of `Q = I − V T Vᵀ` from packed reflectors.

    `T⁻¹` is the strict upper triangle of `VᵀV` plus `diag(1 / τ)`. A column with `τ = 0` reflects
    nothing; it is zeroed, and any non-zero diagonal entry will do for it.
    """
    v = packed.tril(-1)
    v.diagonal().fill_(1.0)
    idle = tau == 0.0
    v[:, idle] = 0.0
    inverse = (v.T @ v).triu(1)
    inverse.diagonal().copy_(1.0 / torch.where(idle, torch.ones_like(tau), tau))
    identity = torch.eye(len(tau), dtype=v.dtype, device=v.device)
    return v, torch.linalg.solve_triangular(inverse, identity, upper=True)


def _apply_reflectors(v: Tensor, t: Tensor, top: Tensor) -> Tensor:
    """`(I − V T Vᵀ) [top; 0]`, `[d_out, k]`, for `top` `[r, k]`."""
    rows = top.shape[0]
    result = -(v @ (t @ (v[:rows].T @ top)))
    result[:rows] += top
    return result


def _diagonal(core: Tensor, v: Tensor | None, t: Tensor | None, signs: Tensor) -> Tensor:
    r = core.shape[0]
    if v is None or t is None:
        return core.diagonal() * signs
    product = v @ t
    # Q[:, :r] core needs whole rows of Q's left part; the other columns only their own entry.
    head = core.diagonal() - ((product[:r] @ v[:r].T) * core.T).sum(1)
    tail = 1.0 - (product[r:] * v[r:]).sum(1)
    return torch.cat([head, tail]) * signs

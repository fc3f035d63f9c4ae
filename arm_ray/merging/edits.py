"""Low-rank edits of one task vector: Timber, POME and AlphaRL's reconstruction.

All three change the singular values of `ΔW = U diag(σ) Vᵀ` and keep its singular vectors, so an
edit is a multiplication from the side of the smaller dimension. For `d_out ≥ d_in`, with gains
`g_i = σ'_i / σ_i`,

    U diag(σ') Vᵀ = ΔW (g_tail I + Σ_{i ≤ k} (g_i − g_tail) v_i v_iᵀ)

and for `d_out < d_in` the same from the left with `u_i`. Only `V` (or `U`) is computed, and the
product block by block. The edit of a rotated task vector is the rotated edit: `Q · edit(ΔW) =
edit(Q ΔW)` for every orthogonal `Q`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arm_ray.merging.operator_settings import AlphaRLSettings, PomeSettings, TimberSettings
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.svd import row_blocks, singular_values_and_vectors, upright


@dataclass(frozen=True)
class Gains:
    """What the singular values are multiplied by.

    Attributes:
        leading: `[k]` float64, of the largest ones.
        tail: Of all others.
    """

    leading: Tensor
    tail: float


def edit(vector: Tensor, name: str, is_linear: bool, settings: MethodSettings) -> Tensor:
    """A task vector after the low-rank edit that the settings ask for.

    Vectors (norms and biases) are never decomposed. Zero stays zero.

    Args:
        vector: `ΔW`, float32, whole, of any shape. Not changed.
        name: Hugging Face name of the tensor.
        is_linear: Whether it is the weight of a linear module of the decoder layers.
        settings: `edit` and the section of that name.

    Returns:
        float32, of the same shape; `vector` itself where the edit does not concern the tensor.
    """
    if settings.edit == "timber":
        return vector if vector.ndim < 2 else _timber(vector, settings.timber)
    if settings.edit == "pome":
        concerned = vector.ndim == 2 and _is_edited_by_pome(name, is_linear, settings.pome)
        return _pome(vector, settings.pome) if concerned else vector
    if settings.edit == "alpharl":
        modules = name.split(".")
        if vector.ndim == 2 and ("self_attn" in modules or "mlp" in modules):
            return _alpharl(vector, settings.alpharl)
        return torch.zeros_like(vector) if settings.alpharl.others == "drop" else vector
    return vector


def _is_edited_by_pome(name: str, is_linear: bool, settings: PomeSettings) -> bool:
    modules = name.split(".")
    if modules[-1] != "weight":
        return False
    if settings.tensors == "all_linear":
        return is_linear
    if settings.tensors == "mlp":
        return "mlp" in modules
    return modules[-2:-1] == ["up_proj"]


def _timber(vector: Tensor, settings: TimberSettings) -> Tensor:
    """`σ_i` for `i ≤ k`, `γ σ_i` beyond; more than two axes are flattened into columns.

    `k = ⌈exp(−Σ p_i ln(p_i + ε))⌉` with `p = σ / Σσ` is the effective rank.
    """
    matrix = vector.flatten(1)
    if settings.gamma == 1.0 or not bool(vector.any()):
        return vector
    sigma, vectors = singular_values_and_vectors(upright(matrix))
    share = sigma / sigma.sum()
    entropy = -float((share * torch.log(share + settings.epsilon)).sum())
    k = min(math.ceil(math.exp(entropy)), len(sigma))
    if k == len(sigma):
        return vector
    return _scaled(matrix, vectors, Gains(sigma.new_ones(k), settings.gamma)).view_as(vector)


def _pome(matrix: Tensor, settings: PomeSettings) -> Tensor:
    """`c Σ_{i ≤ k} u_i v_iᵀ`, `k` a fraction of the numerical rank.

    | scale | c |
    |---|---|
    | `fro` | `β ‖ΔW‖ / √k` |
    | `mean_sv` | `β (σ_1 + … + σ_k) / k` |
    | `spec` | `β σ_1` |
    | `raw` | `β` |

    The numerical rank counts `σ > σ_1 max(d_out, d_in) ε`, with `ε` of float32, in which task
    vectors are.
    """
    if not bool(matrix.any()):
        return matrix
    sigma, vectors = singular_values_and_vectors(upright(matrix))
    noise = max(matrix.shape) * torch.finfo(torch.float32).eps
    rank = max(1, int((sigma > noise * sigma[0]).sum()))
    k = max(1, int(settings.rank_fraction * rank))
    scale = {
        "fro": float(sigma.square().sum().sqrt()) / math.sqrt(k),
        "mean_sv": float(sigma[:k].mean()),
        "spec": float(sigma[0]),
        "raw": 1.0,
    }[settings.scale]
    return _scaled(matrix, vectors, Gains(settings.beta * scale / sigma[:k], 0.0))


def _alpharl(matrix: Tensor, settings: AlphaRLSettings) -> Tensor:
    """`α (‖ΔW‖ / ‖ΔW_k‖) ΔW_k`, with `ΔW_k` the best approximation of rank `k`."""
    if not bool(matrix.any()):
        return matrix
    sigma, vectors = singular_values_and_vectors(upright(matrix))
    squares = sigma.square()
    k = min(settings.rank, len(sigma))
    gain = settings.alpha * (squares.sum() / squares[:k].sum()).sqrt()
    return _scaled(matrix, vectors, Gains(gain.expand(k), 0.0))


def _scaled(matrix: Tensor, vectors: Tensor, gains: Gains) -> Tensor:
    """The matrix with its singular values multiplied, in a new tensor of the same dtype.

    Args:
        matrix: `[d_out, d_in]`.
        vectors: `[short, short]` float64: its singular vectors on the side of the smaller
            dimension, largest singular value first.
        gains: What is done to them.
    """
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    leading = vectors[:, : len(gains.leading)]
    weights = leading * (gains.leading - gains.tail)
    written = upright(result)
    for rows, block in row_blocks(upright(matrix)):
        product = (block @ weights) @ leading.T
        if gains.tail != 0.0:
            product.add_(block, alpha=gains.tail)
        written[rows] = product.to(matrix.dtype)
    return result

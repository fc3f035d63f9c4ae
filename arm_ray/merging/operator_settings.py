"""Settings of the single merge operators, edits and of the rotation; see `settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

SignRule = Literal["positive_diagonal", "library"]
RotationVariant = Literal["activation", "minimal", "none"]
# What the reader of a configuration does with these: no unknown keys, no changed types.
STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class RotationSettings:
    """How the left singular vectors of the activation shift become a rotation."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    variant: RotationVariant = "activation"
    """`activation`: U of the activation shift (Eqs. 3-5). `minimal`: the smallest rotation that
    takes the leading left singular subspace of the task vector onto that of the activation shift.
    `none`: the identity."""
    sign: SignRule = "positive_diagonal"
    """`positive_diagonal` flips columns so that U[j, j] >= 0; `library` keeps LAPACK's signs.
    `minimal` needs no signs."""
    rank_tolerance: Annotated[float, Ge(0.0), Lt(1.0)] = 1.0e-6
    """Singular values at or below this fraction of the largest count as zero."""
    fused: Literal["split", "whole"] = "split"
    """Projections that a model has as one matrix (q, k and v; gate and up): each is rotated by
    itself, as if it were stored by itself, or all of them as the one matrix that they are."""


@dataclass(frozen=True)
class TaskArithmeticSettings:
    """Task Arithmetic (Ilharco et al., 2023)."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    reduce: Literal["mean", "sum"] = "mean"
    """`mean` divides by the number of candidates, as the ARM paper does; `sum` is the original."""


@dataclass(frozen=True)
class TiesSettings:
    """TIES (Yadav et al., 2023): trim, elect signs, merge what agrees."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    keep: Annotated[float, Gt(0.0), Le(1.0)] = 0.2
    """Fraction of a task vector's entries that survive the trim."""
    scope: Literal["global", "per_tensor"] = "global"
    """Over what the trim's threshold is taken: a whole task vector (the original), or a tensor."""
    zero_sign: Literal["majority", "positive"] = "majority"
    """The sign elected where the kept entries cancel exactly: of all elected signs together, in the
    same scope; or +."""
    combine: Literal["mean", "sum", "max"] = "mean"
    """What is taken of the entries that agree with the elected sign."""


@dataclass(frozen=True)
class DareSettings:
    """DARE (Yu et al., 2024): drop entries at random, rescale the others."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    drop_rate: Annotated[float, Ge(0.0), Lt(1.0)] = 0.9
    """p: the chance of an entry of a task vector to be set to zero."""
    rescale: Literal["exact", "l1", "none"] = "exact"
    """`exact`: survivors are multiplied by 1 / (1 - p). `l1`: so that the tensor's sum of
    magnitudes stays what it was (mergekit's convention). `none`: they stay as they are."""
    then: Literal["task_arithmetic", "ties", "average"] = "task_arithmetic"
    """The operator that merges the thinned task vectors."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the random choice; each tensor, candidate and iteration draws its own."""


@dataclass(frozen=True)
class AimSettings:
    """AIM (Nobari et al., 2025): hold back what changes the inputs that matter to the base."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    omega: Annotated[float, Ge(0.0), Le(1.0)] = 0.4
    """ω: how much of its update the most active input channel keeps; 1 changes nothing."""
    on: Literal["task_arithmetic", "ties", "dare", "average"] = "ties"
    """The operator whose result is relaxed."""
    activations_of: Literal["reference", "base"] = "reference"
    """Whose activations tell what matters: the iteration's reference, or always the base."""
    average: Literal["sample", "token"] = "sample"
    """Whether a channel's magnitude is a mean of samples' means, or of all tokens."""
    tied: Literal["relax", "keep"] = "relax"
    """What becomes of an embedding that is also the head: relaxed as a head, or kept as merged."""


@dataclass(frozen=True)
class AcmSettings:
    """ACM (Yao et al., 2025): a coefficient per layer from mutual information."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    t: float = 0.7
    """How fast the coefficient falls with the information: λ = 1 − mean of σ(t (I − shift))."""
    shift: Literal["per_layer", "global", "none"] = "per_layer"
    """What is subtracted from the information before σ: its maximum over a layer's samples (the
    released code), over all layers', or nothing (the paper's Eq. 2)."""
    on: Literal["task_arithmetic", "ties"] = "task_arithmetic"
    """The operator whose coefficient it replaces."""
    max_elements: Annotated[int, Ge(1)] = 1 << 24
    """Activation values of one sample that the estimate looks at; tokens beyond are left out."""


@dataclass(frozen=True)
class SlerpSettings:
    """Spherical interpolation between two models, tensor by tensor."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    t: Annotated[float, Ge(0.0), Le(1.0)] = 0.5
    """0 is the first model, 1 the second."""
    of: Literal["weights", "task_vectors"] = "weights"
    """What is interpolated: the weights, or their differences from the reference."""
    over: Literal["tensor", "rows"] = "tensor"
    """What has an angle of its own: a whole tensor, or each of its rows."""


@dataclass(frozen=True)
class SphericalMeanSettings:
    """A mean of two or more models on the sphere, tensor by tensor."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    kind: Literal["karcher", "projection"] = "karcher"
    """`karcher` iterates logarithm and exponential; `projection` is one step in the tangent plane
    (mergekit's `multislerp`)."""
    of: Literal["weights", "task_vectors"] = "task_vectors"
    """In a window, one of the task vectors is zero and has no direction: then `task_vectors` gives
    the ordinary mean."""
    weights: Annotated[tuple[Annotated[float, Gt(0.0)], ...], MinLen(2)] | None = None
    """One for each model; null: all equal."""
    max_steps: Annotated[int, Ge(1)] = 10
    """Of `karcher`."""
    step_tolerance: Annotated[float, Gt(0.0)] = 1.0e-5
    """`karcher` ends when a step is shorter, in radians."""


@dataclass(frozen=True)
class OpcmSettings:
    """OPCM (Tang et al., 2025): each task vector is projected off what is merged already."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    alpha: Annotated[float, Gt(0.0), Lt(1.0)] = 0.5
    """Share of the sum of singular values; the block of the leading ones up to it is projected
    out."""


@dataclass(frozen=True)
class AverageSettings:
    """Averages over the checkpoints of a run, in their order."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    kind: Literal["uniform", "ema", "linear", "weighted", "wsm"] = "uniform"
    """`uniform` (SWA, LAWA), `ema`, `linear` (weights 1, 2, 3, …), `weighted`, or `wsm`: the
    weights that stand for a learning rate that falls over the checkpoints."""
    last: Annotated[int, Ge(1)] | None = None
    """Only the last so many of an iteration's models (LAWA's k); null: all."""
    decay: Annotated[float, Ge(0.0), Lt(1.0)] = 0.8
    """Of `ema`: the weight of what was averaged before."""
    warm_up: bool = False
    """Of `ema`: the decay of step t, which merges model t + 1, is at most (t + 1) / (t + 10)."""
    fall: Literal["linear", "minus_sqrt"] = "minus_sqrt"
    """Of `wsm`: how the learning rate falls to zero from the first checkpoint on: `1 - x`, or
    `1 - √x`."""
    weights: Annotated[tuple[Annotated[float, Ge(0.0)], ...], MinLen(1)] | None = None
    """Of `weighted`: one for each model that is averaged; divided by their sum."""


@dataclass(frozen=True)
class LoreSettings:
    """LoRE (Liu et al., 2025): a common base and low-rank task vectors, estimated together."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    mu: Annotated[float, Ge(0.0)] = 0.01
    """Weight of the nuclear norm; singular values shrink by half of it in every step."""
    steps: Annotated[int, Ge(1)] = 10
    """Rounds in which base and task vectors are estimated in turn."""
    combine: Literal["mean", "sum"] = "mean"
    """How the low-rank task vectors are added up."""


@dataclass(frozen=True)
class TwinSettings:
    """Twin-Merging (Lu et al., 2024), its static part: shared knowledge, low-rank experts."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    reduce: Literal["mean", "sum"] = "sum"
    """How task vectors add up to what is shared."""
    rank_fraction: Annotated[float, Ge(0.0), Le(1.0)] = 0.1
    """Of the smaller dimension: the rank that is left of a model's difference from the shared."""


@dataclass(frozen=True)
class OtaSettings:
    """OTA: means weighted by the optimizer's second moments."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    second_moments: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """For each candidate a directory with Adam's `exp_avg_sq` under the names of the weights, in
    `model.safetensors` or in files with an index as a model has them."""
    power: Annotated[float, Gt(0.0)] = 0.5
    """The weight of an entry is its second moment to this power."""
    epsilon: Annotated[float, Gt(0.0)] = 1.0e-26
    """Added to the weights, so that entries without any history take the plain mean."""
    density: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    """Fraction of a candidate's entries, those of largest saliency v ΔW², that take part."""


@dataclass(frozen=True)
class AlphaRLPredictionSettings:
    """AlphaRL's prediction (Cai et al., 2025): the next rank-1 update from the ones before."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    accuracies: Annotated[tuple[float, ...], MinLen(2)] | None = None
    """Of each candidate, in order; any scale."""
    target: float | None = None
    """The accuracy to predict the weights for."""
    onto: Literal["last", "base"] = "last"
    """What the predicted update is added to: the last candidate (the released code), or the
    reference."""


@dataclass(frozen=True)
class TimberSettings:
    """Timber (Wu et al., 2025): damp the singular values beyond the effective rank."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    gamma: Annotated[float, Ge(0.0), Le(1.0)] = 0.2
    """γ: what the tail is multiplied by; 1 changes nothing."""
    epsilon: Annotated[float, Gt(0.0)] = 1.0e-9
    """Inside the entropy's logarithm."""


@dataclass(frozen=True)
class PomeSettings:
    """POME (Liu et al., 2025): equal singular values in the leading directions."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    rank_fraction: Annotated[float, Gt(0.0), Le(1.0)] = 0.5
    """Of the numerical rank."""
    scale: Literal["fro", "mean_sv", "spec", "raw"] = "fro"
    """What the equal singular values are: `fro` keeps the norm of the task vector, `mean_sv` the
    sum of the kept ones, `spec` is the largest, `raw` is `beta` itself."""
    beta: Annotated[float, Gt(0.0)] = 1.0
    """Multiplies them."""
    tensors: Literal["up_proj", "mlp", "all_linear"] = "up_proj"
    """Which weights are edited; all others take the task vector as it is."""


@dataclass(frozen=True)
class AlphaRLSettings:
    """AlphaRL's reconstruction (Cai et al., 2025): the leading directions, at the full norm."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    rank: Annotated[int, Ge(1)] = 1
    """Directions of each task vector that are kept."""
    alpha: Annotated[float, Gt(0.0)] = 1.0
    """Multiplies the norm."""
    others: Literal["drop", "keep"] = "drop"
    """Tensors outside attention and MLP: their update is dropped (the released code), or kept."""


@dataclass(frozen=True)
class DellaSettings:
    """DELLA (Deep et al., 2024): drop entries at random, small ones more often, rescale the others.

    Of a row (of a vector: the whole) the chance to stay grows with the rank of the magnitude, in
    equal steps from `1 - drop_rate - epsilon` to `1 - drop_rate + epsilon`.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    drop_rate: Annotated[float, Ge(0.0), Lt(1.0)] = 0.7
    """p: the mean chance of an entry to be set to zero."""
    epsilon: Annotated[float, Ge(0.0), Lt(0.5)] = 0.1
    """How far the chances of the largest and the smallest entries of a row are from the mean."""
    rescale: Literal["exact", "l1", "none"] = "exact"
    """`exact`: each survivor is divided by its chance to stay (the paper). `l1`: the tensor's sum
    of magnitudes stays what it was (mergekit's convention). `none`: they stay as they are."""
    then: Literal["task_arithmetic", "ties", "average"] = "task_arithmetic"
    """The operator that merges the thinned task vectors."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the random choice; each tensor, candidate and iteration draws its own."""


@dataclass(frozen=True)
class BreadcrumbsSettings:
    """Model Breadcrumbs (Davari and Belilovsky, 2023): drop the largest and smallest entries."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    keep: Annotated[float, Gt(0.0), Le(1.0)] = 0.9
    """Fraction of each tensor's entries that stay."""
    largest: Annotated[float, Ge(0.0), Lt(1.0)] = 0.01
    """γ: fraction of each tensor's entries, the largest, that are dropped; fewer where `keep`
    leaves no room for them."""
    then: Literal["task_arithmetic", "ties", "average"] = "task_arithmetic"
    """The operator that merges what is left of the task vectors."""


@dataclass(frozen=True)
class SceSettings:
    """SCE (Wan et al., 2024): select by variance, weigh by energy, erase minority signs."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    select: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    """τ: fraction of a tensor's entries, those that vary most between the task vectors, that take
    part; of the entries that vary at all."""


@dataclass(frozen=True)
class ModelStockSettings:
    """Model Stock (Jang et al., 2024): the mean, drawn to the reference by the angle between."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    over: Literal["tensor", "rows"] = "tensor"
    """What has an angle of its own: a whole tensor, or each of its rows."""


@dataclass(frozen=True)
class NearswapSettings:
    """NearSwap: go to another model where it is near."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    t: Annotated[float, Gt(0.0)] = 1.0e-4
    """How far an entry may move."""


@dataclass(frozen=True)
class RamSettings:
    """RAM (Yuan et al., 2026): average what several RL runs changed, keep what one of them did."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    threshold: Annotated[float, Ge(0.0)] = 1.0e-5
    """An entry counts as changed if its magnitude in the task vector is larger."""
    rescale: Annotated[float, Ge(1.0)] = 1.05
    """r of RAM+: what one run alone changed is multiplied by up to r, the more the more of that
    run's changes others share; 1 is RAM."""


@dataclass(frozen=True)
class RelexSettings:
    """RELEX (Wei et al., 2026): a later checkpoint, predicted from those of a run so far."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    target: float | None = None
    """The training step to predict the weights of."""
    steps: Annotated[tuple[float, ...], MinLen(2)] | None = None
    """The training step of each candidate; null: 1, 2, 3, …"""
    rank: Annotated[int, Ge(1)] = 1
    """Directions of each tensor's path that are followed."""

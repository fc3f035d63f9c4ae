"""What a merge operator is: a pure function on one tensor, and what it needs to be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from arm_ray.merging.rotation import MinimalRotation, Rotation, RotationFacts
from arm_ray.merging.settings import MethodSettings

AnyRotation = Rotation | MinimalRotation


@dataclass(frozen=True)
class TensorInputs:
    """One tensor of every state that an iteration merges, or some rows of one.

    Attributes:
        name: Hugging Face name.
        reference: `W_ref`, float32, any shape.
        contributors: The `W_i`, float32, of the reference's shape.
        divisor: `m`.
        shifts: `ΔA_i = A_i − A_ref` `[d_out, N]`, one for each contributor, for the weight of a
            linear module in the decoder layers where activations were asked for; else empty.
        rows: Which rows of the whole tensor these are.
        shape: Of the whole tensor; None: these are all of it.
        is_linear: Whether it is the weight of a linear module of the decoder layers.
        contributor_names: Names of the states.
        iteration: 1-based number.
        depth: Of the tensor's layer: 0 the first, 1 the last.
        includes_reference: Whether the reference is one of the models to merge (a sliding window),
            or only what the others differ from.
        statistics: What the operator's rounds have found, over the whole model or the tensor.
        is_measured: Whether the caller has done the rounds over this tensor; else `Method.merge`
            does them.
        second_moments: Of the contributors, `[…]` float32, where asked for.
        scales: A factor for each task vector (ACM).
        coefficient: λ, in place of `method.coefficient`; None: as that says.
        factors: A further factor for each task vector (a step that is searched); empty: 1.
        blocks: Rows of each of the projections that are one below the other, where each is rotated
            by itself; empty: they are rotated as one.
        rotations: Number of a contributor and of a block -> its rotation, of those that are known.
            What is found is added, so that a tensor that is merged again is not factored again;
            None: nothing is known, and nothing kept.
        relaxation: What the update of each input channel (last axis) is multiplied by (AIM).
    """

    name: str
    reference: Tensor
    contributors: Sequence[Tensor]
    divisor: int
    shifts: Sequence[Tensor] = ()
    rows: slice = field(default_factory=lambda: slice(None))
    shape: tuple[int, ...] | None = None
    is_linear: bool = False
    contributor_names: tuple[str, ...] = ()
    iteration: int = 1
    depth: float = 0.0
    includes_reference: bool = False
    statistics: Mapping[str, object] = field(default_factory=dict)
    is_measured: bool = False
    second_moments: Sequence[Tensor] = ()
    scales: Sequence[float] = ()
    coefficient: float | None = None
    factors: Sequence[float] = ()
    blocks: tuple[int, ...] = ()
    rotations: MutableMapping[tuple[int, int], AnyRotation | None] | None = None
    relaxation: Tensor | None = None


@dataclass(frozen=True)
class TaskVectors:
    """What an operator is given of one tensor.

    Attributes:
        inputs: Where the task vectors come from; its weights are not to be changed.
        vectors: One `ΔW_i` for each contributor, float32, of the reference's shape, rotated and
            edited as the settings say. They belong to the operator, which may overwrite them.
    """

    inputs: TensorInputs
    vectors: list[Tensor]

    @property
    def members(self) -> int:
        """How many models are merged: the contributors, and the reference in a window."""
        return len(self.vectors) + self.inputs.includes_reference


Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """Numbers over a whole model, or a whole tensor, that an operator needs before it merges.

    A round goes over all tensors, or pieces of rows of them; what `measure` returns is added up
    (integers, or float64 in a fixed order) and handed to `conclude`.

    Attributes:
        rounds: How many, for so many contributors.
        measure: Of one piece, in a round (0-based): name -> tensor, int64 or float64, of the same
            shape for all pieces. The earlier rounds' findings are in `inputs.statistics`.
        conclude: A round's sums and what was known before -> what is known now.
        by_tensor: Whether the numbers are those of each tensor by itself.
    """

    rounds: Callable[[MethodSettings, int], int]
    measure: Callable[[int, TaskVectors, MethodSettings], Sums]
    conclude: Callable[[int, Sums, Mapping[str, object], MethodSettings], Mapping[str, object]]
    by_tensor: Callable[[MethodSettings], bool] = lambda _settings: False


@dataclass(frozen=True)
class OnModels:
    """How an operator merges models as they are, where there is no task vector to change.

    A linear combination of models needs no differences: this saves making them, and adding the
    reference again. The models are the contributors, in a window after the reference; none of them
    is to be changed.

    Attributes:
        applies: Whether the settings let it; else task vectors are merged.
        measure: What `Statistics.measure` is, of the models.
        merge: The models, what the rounds have found, the settings -> `W_new`, float32, of their
            shape, a tensor of its own.
    """

    applies: Callable[[MethodSettings], bool]
    measure: Callable[[Sequence[Tensor], MethodSettings], Sums]
    merge: Callable[[Sequence[Tensor], Mapping[str, object], MethodSettings], Tensor]


@dataclass
class MergedTensor:
    """What merging one tensor gave.

    Attributes:
        tensor: `W_new`, float32, of the reference's shape. Never one of the inputs.
        rotated: Number of contributors whose task vector was rotated.
        rank_deficient: Ranks `(r, full)` of the contributors whose shift was rank-deficient.
        rotations: What is told of the rotation of each contributor, block by block of rows.
    """

    tensor: Tensor
    rotated: int = 0
    rank_deficient: list[tuple[int, int]] = field(default_factory=list)
    rotations: list[RotationFacts] = field(default_factory=list)


@dataclass(frozen=True)
class Operator:
    """A merge operator: how task vectors become one update, and what that takes.

    Attributes:
        name: Its value in `method.operator`.
        update: Task vectors -> `W_new − W_ref`, float32, of the reference's shape. Pure: the same
            bits for the same input, whatever was merged before.
        whole_tensors: Whether it needs a tensor whole; else it is given rows of it at a time. Where
            that depends on the settings, a function of them.
        activations: Whether it wants the shifts of the linear modules' mean outputs.
        statistics: What it needs to know of the whole model first.
        on_models: A shorter way, where task vectors are not rotated, edited, thinned or scaled.
        second_moments: Whether it wants Adam's second moments of the contributors.
        uses_coefficient: Whether it reads `method.coefficient`; a value set for one that does not
            is refused.
        candidates_only: Whether it needs something of each model that only candidates have, and
            merged states do not. Then there can be no sliding window.
        min_models: Fewest models that it takes.
        max_models: Most models that it takes; None: any number.
        check: Further conditions on the settings and the number of models that an iteration merges:
            a list of problems, each a sentence that begins with the key. It is asked for every
            number that occurs in a schedule.
    """

    name: str
    update: Callable[[TaskVectors, MethodSettings], Tensor]
    whole_tensors: bool | Callable[[MethodSettings], bool] = False
    activations: bool = False
    statistics: Statistics | None = None
    on_models: OnModels | None = None
    second_moments: bool = False
    uses_coefficient: bool = True
    candidates_only: bool = False
    min_models: int = 1
    max_models: int | None = None
    check: Callable[[MethodSettings, int], list[str]] = lambda _settings, _num_models: []

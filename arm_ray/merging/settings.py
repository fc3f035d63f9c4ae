"""Settings of a merge method: plain values with their ranges.

The section `method` of the configuration is `MethodSettings`; the ranges in the annotations are
checked where the configuration is read. Nothing is imported here but the standard library and the
vocabulary of ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Le

from arm_ray.merging.operator_settings import (
    STRICT,
    AcmSettings,
    AimSettings,
    AlphaRLPredictionSettings,
    AlphaRLSettings,
    AverageSettings,
    BreadcrumbsSettings,
    DareSettings,
    DellaSettings,
    LoreSettings,
    ModelStockSettings,
    NearswapSettings,
    OpcmSettings,
    OtaSettings,
    PomeSettings,
    RamSettings,
    RelexSettings,
    RotationSettings,
    SceSettings,
    SlerpSettings,
    SphericalMeanSettings,
    TaskArithmeticSettings,
    TiesSettings,
    TimberSettings,
    TwinSettings,
)


@dataclass(frozen=True)
class MethodSettings:
    """Which operator merges, what is done to the task vectors before, and how strongly."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT
    operator: str = "arm"
    """How task vectors become one update: see docs/operators.md."""
    coefficient: Annotated[float, Gt(0.0), Le(10.0)] = 0.7
    """λ: the update is multiplied by it. Like other numbers of the operators, it may be a list over
    the depth or a mapping from parts of the model: see docs/operators.md."""
    rotate: Literal["auto"] | bool = "auto"
    """Whether task vectors are rotated by their activation shift first; auto: only for `arm`."""
    rotation: RotationSettings = field(default_factory=RotationSettings)
    edit: Literal["none", "timber", "pome", "alpharl"] = "none"
    """A low-rank edit of each task vector, after the rotation."""
    timber: TimberSettings = field(default_factory=TimberSettings)
    pome: PomeSettings = field(default_factory=PomeSettings)
    alpharl: AlphaRLSettings = field(default_factory=AlphaRLSettings)
    task_arithmetic: TaskArithmeticSettings = field(default_factory=TaskArithmeticSettings)
    ties: TiesSettings = field(default_factory=TiesSettings)
    dare: DareSettings = field(default_factory=DareSettings)
    aim: AimSettings = field(default_factory=AimSettings)
    acm: AcmSettings = field(default_factory=AcmSettings)
    della: DellaSettings = field(default_factory=DellaSettings)
    breadcrumbs: BreadcrumbsSettings = field(default_factory=BreadcrumbsSettings)
    sce: SceSettings = field(default_factory=SceSettings)
    model_stock: ModelStockSettings = field(default_factory=ModelStockSettings)
    nearswap: NearswapSettings = field(default_factory=NearswapSettings)
    ram: RamSettings = field(default_factory=RamSettings)
    relex: RelexSettings = field(default_factory=RelexSettings)
    slerp: SlerpSettings = field(default_factory=SlerpSettings)
    spherical_mean: SphericalMeanSettings = field(default_factory=SphericalMeanSettings)
    opcm: OpcmSettings = field(default_factory=OpcmSettings)
    average: AverageSettings = field(default_factory=AverageSettings)
    lore: LoreSettings = field(default_factory=LoreSettings)
    twin: TwinSettings = field(default_factory=TwinSettings)
    ota: OtaSettings = field(default_factory=OtaSettings)
    alpharl_prediction: AlphaRLPredictionSettings = field(default_factory=AlphaRLPredictionSettings)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an operator that another package brings."""
    by_part: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """What other keys say by part of the model: key, then part, then values over the depth. It is
    made of what those keys say; see docs/operators.md."""

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the operators that take part, outermost first: `aim`, `dare`, `ties`."""
        found = ["task_arithmetic" if self.operator == "arm" else self.operator]
        inner = {"aim": self.aim.on, "acm": self.acm.on}
        inner |= {name: getattr(self, name).then for name in THINNING}
        while found[-1] in inner:
            found.append(inner[found[-1]])
        return tuple(found)

    @property
    def rotates(self) -> bool:
        """Whether task vectors are rotated."""
        asked = self.operator == "arm" if self.rotate == "auto" else self.rotate
        return asked and self.rotation.variant != "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration samples are run through the models, as far as is known here."""
        return self.rotates or bool({"aim", "acm"} & set(self.steps))

    @property
    def gains_by_search(self) -> bool:
        """Whether a searched step is known to be better than a fixed one; see docs/study.md."""
        is_plain = self.steps == ("task_arithmetic",) and self.edit == "none"
        return is_plain and "coefficient" not in self.by_part

    @property
    def is_plain_sum(self) -> bool:
        """Whether a tensor takes no more time than a weighted sum of its task vectors."""
        return self.steps in (("task_arithmetic",), ("average",))

    def values(self, key: str) -> dict[str, tuple[float, ...]]:
        """What a key such as `dare.drop_rate` says: part -> its values over the depth.

        The number that holds elsewhere is that of the part `*`.
        """
        number: Any = self
        for name in key.split("."):
            number = number[int(name)] if name.isdigit() else getattr(number, name)
        by_part = self.by_part.get(key, {})
        return {**({} if EVERYWHERE in by_part else {EVERYWHERE: (number,)}), **by_part}

    @property
    def full_rank_reasons(self) -> list[str]:
        """Why the result is never of low rank over the base; empty: it may be."""
        single = {"ties", "ota", "sce", "nearswap", "ram", "breadcrumbs"}
        single |= {
            name
            for name in ("dare", "della")
            if any(max(rates) > 0.0 for rates in self.values(f"{name}.drop_rate").values())
        }
        on_weights = {"slerp": self.slerp.of, "spherical_mean": self.spherical_mean.of}
        reasons = []
        for step in self.steps:
            if step in single:
                reasons.append(
                    f"{step} changes single entries of a weight, so that its result is of full "
                    "rank and no adapter; choose another operator"
                )
            elif on_weights.get(step) == "weights":
                reasons.append(
                    f"{step} of weights also scales what the base has, and no adapter can; set "
                    f"method.{step}.of to task_vectors"
                )
        return reasons

    @property
    def sections_read(self) -> set[str]:
        """The sections that the operator, its steps and the edit read."""
        used = {*self.steps, self.edit}
        if self.operator == "arm" or self.rotate is True:
            used.add("rotation")
        if self.operator not in OPERATOR_NAMES:
            used.add("options")
        return used

    @property
    def unused_sections(self) -> list[str]:
        """Sections that say something although nothing here reads them."""
        used = self.sections_read
        default = MethodSettings()
        return [
            entry.name
            for entry in fields(self)
            if entry.name not in ("operator", "coefficient", "rotate", "edit", "by_part", *used)
            and (
                getattr(self, entry.name) != getattr(default, entry.name)
                or any(key.startswith(f"{entry.name}.") for key in self.by_part)
            )
        ]


OPERATOR_NAMES = (
    "arm",
    "task_arithmetic",
    "ties",
    "dare",
    "della",
    "breadcrumbs",
    "sce",
    "model_stock",
    "nearswap",
    "ram",
    "relex",
    "aim",
    "acm",
    "slerp",
    "spherical_mean",
    "opcm",
    "average",
    "lore",
    "twin",
    "ota",
    "alpharl_prediction",
)
# Steps that set entries of the task vectors to zero before another operator merges them.
THINNING = ("dare", "della", "breadcrumbs")
# The part that every tensor is of.
EVERYWHERE = "*"
# A list of which each entry may: `average.weights.0` is the first model's.
PARTWISE_LIST = "average.weights"
# Keys that may differ between parts of a model.
PARTWISE = (
    "coefficient",
    "ties.keep",
    "dare.drop_rate",
    "della.drop_rate",
    "breadcrumbs.keep",
    "sce.select",
    "nearswap.t",
    "slerp.t",
)

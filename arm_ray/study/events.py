"""What happens in a study, as typed records. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from arm_ray.events import Event


@dataclass(frozen=True)
class StudyStarted(Event):
    """The study is valid; what is there from before is not counted here."""

    name: ClassVar[str] = "study_started"
    cells: int
    merges: int
    trainings: int
    models: int


@dataclass(frozen=True)
class SeriesTrained(Event):
    """A training has ended; `error` is null where its checkpoints are there."""

    name: ClassVar[str] = "series_trained"
    series: str
    seed: int | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class CellFinished(Event):
    """A merge has ended; `state` is `merged` or `failed`. `cells` are the cells that ask for it."""

    name: ClassVar[str] = "cell_finished"
    merge: str
    state: str
    seconds: float
    cells: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True)
class ScoringFailed(Event):
    """A model is not scored; the others are."""

    name: ClassVar[str] = "scoring_failed"
    model: str
    error: str


@dataclass(frozen=True)
class StudyFinished(Event):
    """All is done that could be: `failed` counts models that are not scored."""

    name: ClassVar[str] = "study_finished"
    failed: int
    seconds: float

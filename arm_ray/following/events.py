"""What happens while a run is followed, as typed records. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from arm_ray.events import Event


@dataclass(frozen=True)
class CheckpointTaken(Event):
    """A checkpoint of the run is complete, and held by a snapshot."""

    name: ClassVar[str] = "checkpoint_taken"
    step: int
    source: str
    linked: bool
    num_bytes: int


@dataclass(frozen=True)
class CheckpointsSkipped(Event):
    """Checkpoints that are not merged at their own turn, because newer ones are there."""

    name: ClassVar[str] = "checkpoints_skipped"
    steps: tuple[int, ...]
    newest: int


@dataclass(frozen=True)
class ArrivalPublished(Event):
    """A merged model is published; values are those that models are compared by.

    `seconds` are since the arrival's merge began, `lag_seconds` since its checkpoint was taken. The
    cosines are those of its last iteration.
    """

    name: ClassVar[str] = "arrival_published"
    step: int
    members: tuple[str, ...]
    path: str
    is_best: bool
    value: float | None
    checkpoint_value: float | None
    seconds: float
    lag_seconds: float | None = None
    weight_cosine: float | None = None
    task_vector_cosine: float | None = None


@dataclass(frozen=True)
class ArrivalFailed(Event):
    """An arrival is left out; the run is followed on."""

    name: ClassVar[str] = "arrival_failed"
    step: int
    problem: str

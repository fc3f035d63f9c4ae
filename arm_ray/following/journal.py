"""What attach has done so far, in one file, so that it can go on after any stop. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from arm_ray.errors import RunDirectoryError
from arm_ray.storage.atomic import write_json
from arm_ray.storage.regular import json_in

NAME = "attach.json"
Outcome = Literal["begun", "published", "failed", "repeated"]


@dataclass(frozen=True)
class Arrival:
    """One checkpoint that was merged with others.

    Attributes:
        number: From 1, in the order of merging.
        step: Of the checkpoint.
        version: Digest of its marker: a restarted trainer writes a step again.
        members: Snapshots that met, the new one last.
        states: Arrivals whose merged states took part, by number.
        draw: Number of its mini-batch in the stream of arrivals.
        outcome: `begun` until it is published, or given up; `repeated`: given up because of another
            checkpoint, and begun anew without that one.
        value: What models are compared by; null without scores.
        checkpoint_value: The same of the checkpoint.
        is_best: Whether `best` was pointed to it.
        problem: Why it was given up.
    """

    number: int
    step: int
    version: str
    members: tuple[str, ...]
    states: tuple[int, ...]
    draw: int
    outcome: Outcome = "begun"
    value: float | None = None
    checkpoint_value: float | None = None
    is_best: bool = False
    problem: str | None = None

    @property
    def name(self) -> str:
        """Name of its merge's directory."""
        return f"{self.number:04d}-step-{self.step:06d}"


@dataclass
class Journal:
    """All arrivals, and which checkpoints have been taken in what order.

    Attributes:
        path: The file.
        arrivals: In order; only the last may have begun without an end.
        taken: Version of each checkpoint that was taken or passed over, in the order of taking:
            step -> digest of its marker.
        skipped: Steps that were left out.
        in_order: Steps that were there at the start, and are merged one after another.
        broken: Version of each checkpoint that cannot be merged.
    """

    path: Path
    arrivals: list[Arrival] = field(default_factory=list)
    taken: dict[int, str] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    in_order: list[int] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def is_broken(self, step: int) -> bool:
        """Whether the checkpoint of a step, as it was taken last, cannot be merged."""
        return step in self.broken and self.broken[step] == self.taken.get(step)

    def begin(self, arrival: Arrival) -> None:
        """Add an arrival."""
        self.arrivals.append(arrival)
        self.save()

    def end(self, **changes: Any) -> Arrival:
        """Change the last arrival."""
        self.arrivals[-1] = replace(self.arrivals[-1], **changes)
        self.save()
        return self.arrivals[-1]

    @property
    def unfinished(self) -> Arrival | None:
        """The arrival that was being worked on."""
        last = self.arrivals[-1] if self.arrivals else None
        return last if last is not None and last.outcome == "begun" else None

    @property
    def published(self) -> list[Arrival]:
        """Arrivals that came to their end."""
        return [arrival for arrival in self.arrivals if arrival.outcome == "published"]

    @property
    def best(self) -> Arrival | None:
        """The arrival that `best` was pointed to last."""
        chosen = [arrival for arrival in self.arrivals if arrival.is_best]
        return chosen[-1] if chosen else None

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "version": 1,
            "arrivals": [asdict(arrival) for arrival in self.arrivals],
            "taken": list(self.taken.items()),
            "skipped": self.skipped,
            "in_order": self.in_order,
            "broken": list(self.broken.items()),
        }
        write_json(self.path, content)


def open_journal(directory: Path) -> Journal:
    """Read the journal of a directory; an empty one where there is none.

    Raises:
        RunDirectoryError: It is there and cannot be understood.
    """
    path = directory / NAME
    try:
        content = json_in(path)
    except FileNotFoundError:
        return Journal(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        return Journal(
            path,
            [_arrival(given) for given in content["arrivals"]],
            {int(step): str(digest) for step, digest in content["taken"]},
            [int(step) for step in content["skipped"]],
            [int(step) for step in content["in_order"]],
            {int(step): str(digest) for step, digest in content["broken"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from None


def _arrival(given: Mapping[str, Any]) -> Arrival:
    lists = {"members": tuple(given["members"]), "states": tuple(given["states"])}
    return Arrival(**{**given, **lists})


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    return RunDirectoryError(
        "the record of what was merged cannot be read",
        where=path,
        got=error
        if isinstance(error, OSError | ValueError)
        else "content that attach does not write",
        hint="restore it, or choose another output",
    )

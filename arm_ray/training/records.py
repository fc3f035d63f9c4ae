"""What a training run leaves beside its checkpoints, and which checkpoints are whole. No torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import arm_ray.errors
from arm_ray.errors import ArmRayError, WorkerError
from arm_ray.events import Event
from arm_ray.storage.atomic import write_text
from arm_ray.storage.regular import json_in, log_objects

LOG_NAME = "train_log.jsonl"
STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.pt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class TrainingStarted(Event):
    """The inputs are valid and the workers are about to be placed."""

    name: ClassVar[str] = "training_started"
    version: str
    job: str
    rows: int
    kept: int
    steps: int
    saves: tuple[int, ...]
    workers: int
    device: str


@dataclass(frozen=True)
class TrainingFinished(Event):
    """The session reached its last step; `loss` is that step's, null where nothing was done."""

    name: ClassVar[str] = "training_finished"
    step: int
    loss: float | None
    seconds: float
    checkpoints: tuple[str, ...]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole: the trainer writes its state last, and it parses."""
    try:
        state = json_in(checkpoint / STATE_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def checkpoint_steps(output: Path) -> dict[int, Path]:
    """Step -> directory of all checkpoints in a run, whole or not, by step."""
    found = {}
    for path in output.glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def remove_incomplete(output: Path) -> list[Path]:
    """Remove what a killed run left half written; returns what was removed."""
    removed = [path for path in checkpoint_steps(output).values() if not is_complete(path)]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def missing_saves(output: Path, saves: Sequence[int], kept: int | None) -> list[int]:
    """The steps whose checkpoints are still to be written.

    Args:
        output: The run.
        saves: The steps that are saved, ascending.
        kept: Checkpoints kept (`save_total_limit`), the older ones having been removed; None: all.
    """
    whole = {step for step, path in checkpoint_steps(output).items() if is_complete(path)}
    newest = max((step for step in saves if step in whole), default=0)
    due = set(saves if kept is None else saves[-kept:])
    return [step for step in saves if step > newest or (step in due and step not in whole)]


def resume_point(output: Path, missing: Sequence[int]) -> tuple[int, Path] | None:
    """The last complete checkpoint before the first missing one, or None."""
    before = [
        (step, path)
        for step, path in checkpoint_steps(output).items()
        if missing and step < missing[0] and is_complete(path)
    ]
    return before[-1] if before else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a training log; a line that was cut off by a crash is left out."""
    try:
        return [entry for entry in log_objects(path) if "step" in entry]
    except OSError:
        return []


def truncate_log(path: Path, step: int) -> float:
    """Remove entries after a step; returns the seconds that the run took up to there."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return float(kept[-1].get("seconds", 0.0)) if kept else 0.0


def write_error(path: Path, error: ArmRayError) -> None:
    """Keep an error for the process that started this one, unless there is an earlier one."""
    if path.is_file():
        return
    fields = {key: getattr(error, key) for key in ("what", "where", "got", "expected", "hint")}
    write_text(path, json.dumps({"type": type(error).__name__, **fields}))


def read_error(path: Path) -> ArmRayError | None:
    """The error that a worker kept, as what it was, or None."""
    try:
        content = json_in(path)
    except (OSError, ValueError):
        return None
    kind = getattr(arm_ray.errors, str(content.pop("type")), WorkerError)
    error: ArmRayError = kind(content.pop("what"), **content)
    return error

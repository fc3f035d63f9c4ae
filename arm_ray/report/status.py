"""How a run stands, from its directory alone: stage, iteration, time to go, scores, warnings."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from arm_ray.report.run_facts import (
    SELECTION,
    Score,
    iterations_of,
    main_scores,
    number,
    numbers,
    scores_of,
    warnings_of,
)
from arm_ray.report.run_record import RunRecord, open_record
from arm_ray.report.words import duration
from arm_ray.storage.room import LOCK_NAME

State = Literal["running", "finished", "halted", "failed", "stopped", "foreign"]
# Scores and warnings that are shown: the newest.
_MOST = 12
_STAGES: Mapping[str, str] = {
    "run_planned": "placing the layer shards",
    "run_started": "the first iteration",
    "step_chosen": "merging with the chosen step",
    "model_selected": "writing the model",
    "model_written": "ending",
    "study_started": "training or merging",
    "series_trained": "merging",
    "cell_finished": "merging or scoring",
    "checkpoint_taken": "merging an arrival",
    "arrival_published": "waiting for a checkpoint",
    "arrival_failed": "waiting for a checkpoint",
    "training_started": "training",
}


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        path: Its directory.
        kind: What wrote it.
        state: `running`; `finished`; `halted` as asked (`--stop-after`); `failed` with an error;
            `stopped`: it has no end, and no process of this machine works in it; `foreign`: no run.
        told: The same in a sentence.
        stage: What goes on, or came last.
        iteration: The last one that is complete; None: it has none.
        iterations: How many there may be.
        eta_s: Seconds until its end at most, by what iterations took, or by the plan.
        busy: Of each shard the share of the last iteration in which it worked, 0 to 1.
        age_s: Seconds since the last event.
        pid: Of the process that works in it, on this machine.
        scores: The models of the main task.
        warnings: The newest.
        missing: What cannot be read.
        parts: Runs that are part of it.
    """

    path: str
    kind: str
    state: State
    told: str
    stage: str
    iteration: int | None
    iterations: int | None
    eta_s: float | None
    busy: Sequence[float]
    age_s: float | None
    pid: int | None
    scores: Sequence[Score]
    warnings: Sequence[str]
    missing: Sequence[str]
    parts: Sequence[Status] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def status_of(path: Path, now: float | None = None, *, is_running: bool = False) -> Status:
    """How the run in a directory stands.

    Args:
        path: The directory.
        now: Seconds since 1970; None: by the clock.
        is_running: Whether it is known from elsewhere that it runs: on another machine, perhaps.

    Raises:
        RunDirectoryError: There is no such directory.
    """
    now = time.time() if now is None else now
    return _status(open_record(path), now, is_running=is_running)


def _status(record: RunRecord, now: float, *, is_running: bool = False) -> Status:
    parts = [_status(part, now) for part in record.parts.values()]
    pid = worker_of(record.path)
    if pid is None:
        pid = next((part.pid for part in parts if part.pid is not None), None)
    last = record.events[-1] if record.events else None
    when = number(last.get("time")) if last is not None else None
    age = None if when is None else max(0.0, now - when)
    state = _state(record, is_worked_on=pid is not None)
    if state == "stopped" and is_running:
        state = "running"
    iterations = iterations_of(record)
    done = iterations[-1].number if iterations else None
    most = (record.last("run_started") or {}).get("max_iterations")
    scores: list[Score] = []
    missing = list(record.missing)
    with contextlib.suppress(OSError, ValueError):
        scores = main_scores(scores_of(record))
    newest = iterations[-1].event if iterations else {}
    seconds = number(newest.get("seconds"))
    busy = numbers(newest.get("busy_seconds"))
    return Status(
        str(record.path),
        record.kind,
        state,
        _told(state, record, pid, age),
        _stage(record, state, parts),
        done,
        most if isinstance(most, int) else None,
        _eta(record, now) if state == "running" else None,
        [round(min(1.0, b / seconds), 3) for b in busy] if seconds else [],
        None if age is None else round(age, 1),
        pid,
        scores[-_MOST:],
        warnings_of(record)[-_MOST:],
        missing,
        parts,
    )


def _state(record: RunRecord, *, is_worked_on: bool) -> State:
    if record.kind == "unknown":
        return "foreign"
    if is_worked_on:
        return "running"
    last = record.last(
        "run_started",
        "run_finished",
        "run_failed",
        "study_started",
        "study_finished",
        "training_started",
        "training_finished",
    )
    name = None if last is None else last.get("event")
    if name == "run_failed":
        return "failed"
    if name in ("study_finished", "training_finished"):
        return "finished"
    if last is not None and name == "run_finished":
        return "halted" if last.get("reason") == "stop_after" else "finished"
    if record.kind == "evaluation":
        asked = {str(name) for name in record.section("models")}
        scored = {str(event.get("model")) for event in record.of("model_scored")}
        return "finished" if asked and asked <= scored else "stopped"
    if record.kind == "pipeline":
        ended = record.last("stage_finished")
        is_over = ended is not None and str(ended.get("stage", "")).startswith("scores")
        return "finished" if is_over else "stopped"
    return "stopped"


def _told(state: State, record: RunRecord, pid: int | None, age: float | None) -> str:
    since = "" if age is None else f"; its last event is {duration(age)} old"
    if state == "running" and pid is None:
        return f"running, as its cluster says{since}"
    if state == "running":
        return f"running: process {pid} of this machine works in it{since}"
    if state == "foreign":
        return "this directory holds no run of arm_ray"
    if state == "failed":
        failed = record.last("run_failed") or {}
        return f"failed: {failed.get('message')}"
    if state == "halted":
        return "halted as asked; the same command without --stop-after goes on"
    if state == "finished":
        return "finished"
    if record.kind == "attach":
        return f"not followed at the moment: no process of this machine works in it{since}"
    return (
        "not finished, and no process of this machine works in it: it was killed or interrupted, "
        f"or runs on another machine{since}. The same command goes on"
    )


def _stage(record: RunRecord, state: State, parts: Sequence[Status]) -> str:
    for part in parts:
        if part.state == "running":
            return f"{Path(part.path).name}: {part.stage}"
    last = next((e for e in reversed(record.events) if e.get("event") != "warning"), None)
    if last is None:
        return "nothing has happened yet"
    name = str(last.get("event"))
    if state in ("finished", "halted"):
        reason = str(last.get("reason", "")).replace("_", " ")
        return f"ended: {reason}" if reason else "ended"
    if name == "iteration_finished":
        return f"after iteration {last.get('iteration')}"
    if name == "model_scored":
        return f"scored {last.get('model')}"
    if name == "stage_finished":
        return f"after {last.get('stage')}"
    return _STAGES.get(name, name.replace("_", " "))


def _eta(record: RunRecord, now: float) -> float | None:
    """Seconds until the end at most, by the iterations that are done, or by the plan."""
    started = record.last("run_started")
    most = None if started is None else started.get("max_iterations")
    if started is None or not isinstance(most, int):
        return None
    iterations = [t for t in iterations_of(record) if t.number >= started.get("first_iteration", 1)]
    last = iterations[-1].event if iterations else started
    begun = number(last.get("time"))
    since = 0.0 if begun is None else max(0.0, now - begun)
    taken = [s for t in iterations if (s := number(t.event.get("seconds"))) is not None]
    if taken:
        left = (most - iterations[-1].number) * sum(taken) / len(taken)
        return round(max(0.0, left - since), 1)
    plan = record.last("run_planned")
    seconds = None if plan is None else number(plan.get("seconds"))
    return None if seconds is None else round(max(0.0, seconds - since), 1)


def worker_of(path: Path) -> int | None:
    """The process of this machine that works in a run's directory; None: none, or not to be known.

    It is looked up, and nothing is locked: a run that starts meanwhile is not in its way. 0 stands
    for a process of another container.
    """
    try:
        found = (path / LOCK_NAME).stat()
        table = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return None
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in table.splitlines():
        fields = line.split()
        # `1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF`; with `->` those that wait for it.
        if "->" not in fields and len(fields) >= 6 and fields[5] == wanted:
            return max(0, int(fields[4]))
    return None


def lines_of(status: Status, depth: int = 0) -> Iterator[str]:
    """A status for people, line by line."""
    indent = "  " * depth
    yield f"{indent}{status.kind} {status.path}"
    yield f"{indent}  {status.told}"
    if status.state == "foreign":
        return
    if status.state != "finished":
        yield f"{indent}  stage       {status.stage}"
    if status.iteration is not None or status.iterations is not None:
        of = "" if status.iterations is None else f" of {status.iterations}"
        yield f"{indent}  iteration   {status.iteration or 0}{of}"
    if status.eta_s is not None:
        yield f"{indent}  to go       {duration(status.eta_s)} at most"
    if status.busy:
        shares = ", ".join(f"{100 * share:.0f} %" for share in status.busy)
        yield f"{indent}  shards busy {shares}"
    for index, score in enumerate(status.scores):
        head = "scores" if index == 0 else ""
        yield f"{indent}  {head:<11} {_score_text(score)}"
    for warning in status.warnings:
        yield f"{indent}  warning     {warning}"
    for text in status.missing:
        yield f"{indent}  missing     {text}"
    for part in status.parts:
        yield from lines_of(part, depth + 1)


def _score_text(score: Score) -> str:
    factor, digits = (1.0, 4) if score.is_loss else (100.0, 1)
    unit = "" if score.is_loss else " %"
    interval = ""
    if score.low is not None and score.high is not None:
        low, high = (f"{factor * v:.{digits}f}" for v in (score.low, score.high))
        interval = f" ({low} to {high})"
    task = "" if score.task == SELECTION else f"{score.task} "
    shown = f"{factor * score.mean:.{digits}f}{unit}{interval}"
    return f"{score.title}: {task}{score.metric} {shown}"

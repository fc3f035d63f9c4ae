"""All that the page shows of a run, in the order in which people ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from arm_ray.report.page.comparison import Finding, differences_of, finding_of
from arm_ray.report.page.parts import Figure, Section, seconds_text, size_text, table_of
from arm_ray.report.page.process import (
    angles_section,
    command_section,
    costs_section,
    lineage_section,
    modules_section,
    timeline_section,
)
from arm_ray.report.page.results import (
    answers_section,
    progress_section,
    scores_section,
    training_section,
)
from arm_ray.report.run_facts import (
    SELECTION,
    Score,
    chosen_of,
    iterations_of,
    number,
    numbers,
    scores_of,
    stages_of,
    warnings_of,
)
from arm_ray.report.run_record import RunRecord


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it.

    Attributes:
        record: What it left.
        prefix: Of the ids on the page.
        finding: The verdict.
        scores: All scores.
        chosen: Name of the published model.
        facts: Name and value of what a reader looks for first.
        sections: The rest.
        parts: Runs that are part of it.
    """

    record: RunRecord
    prefix: str
    finding: Finding
    scores: Sequence[Score]
    chosen: str | None
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    parts: Sequence[RunView] = field(default=())


def view_of(record: RunRecord, prefix: str = "run") -> RunView:
    """All that the page shows of a run."""
    missing = list(record.missing)
    scores = _told(lambda: scores_of(record), [], "the scores", missing)
    chosen = chosen_of(record, scores)
    differences = _told(
        lambda: differences_of(record, scores, chosen), [], "the paired differences", missing
    )
    finding = _told(
        lambda: finding_of(record, scores, chosen, differences),
        Finding("unknown", "What the run has come to cannot be told.", ""),
        "the verdict",
        missing,
    )
    made: list[Section] = []
    makers: list[tuple[str, Callable[[], Section | None]]] = [
        ("scores", lambda: scores_section(record, prefix, scores, chosen, differences)),
        ("progress", lambda: progress_section(record, prefix, scores, chosen)),
        ("training", lambda: training_section(record, prefix)),
        ("angles", lambda: angles_section(record, prefix)),
        ("modules", lambda: modules_section(record, prefix)),
        ("answers", lambda: answers_section(record, prefix, scores, chosen)),
        ("timeline", lambda: timeline_section(record, prefix)),
        ("costs", lambda: costs_section(record, prefix)),
        ("lineage", lambda: lineage_section(record, prefix, chosen)),
        ("command", lambda: command_section(record, prefix)),
    ]
    for name, make in makers:
        section = _told(make, None, f"the section `{name}`", missing)
        if section is not None:
            made.append(section)
    parts = [
        view_of(part, f"{prefix}-{number}")
        for number, part in enumerate(record.parts.values(), start=1)
        if part.kind != "evaluation"
    ]
    warnings = warnings_of(record)
    if missing or warnings:
        rows = [["missing", text] for text in missing] + [["warning", text] for text in warnings]
        table = table_of(["", ""], rows)
        made.insert(
            0 if missing else len(made),
            Section(f"{prefix}-notes", "What is missing, and warnings", [Figure(table=table)]),
        )
    return RunView(record, prefix, finding, scores, chosen, _facts(record, scores), made, parts)


def _told(make: Callable[[], Any], default: Any, what: str, missing: list[str]) -> Any:
    """What is made; where a file or an event is not as it should be, that is told instead."""
    try:
        return make()
    except Exception as error:  # of files that anybody may have changed: any kind
        text = " ".join(str(error).split())[:200]
        missing.append(f"Of {what} nothing can be shown ({type(error).__name__}: {text}).")
        return default


def _facts(record: RunRecord, scores: Sequence[Score]) -> list[tuple[str, str]]:
    """Name and value of what a reader looks for first."""
    started, finished = record.last("run_started") or {}, record.last("run_finished") or {}
    iterations = iterations_of(record)
    found: list[tuple[str, str]] = [("kind", record.kind)]
    if started.get("operator"):
        found.append(("operator", str(started["operator"])))
    if started.get("num_shards"):
        shards = f"{started['num_shards']} on {started.get('device')}"
        found.append(("shards", f"{shards}, {started.get('compute_dtype')}"))
    if iterations:
        found.append(("iterations", f"{iterations[-1].number} of {started.get('max_iterations')}"))
    if finished.get("reason"):
        found.append(("ended", str(finished["reason"]).replace("_", " ")))
    stages = stages_of(record)
    seconds = number(finished.get("seconds")) or (sum(stages.values()) if stages else None)
    if seconds is not None:
        found.append(("time", seconds_text(seconds)))
    peaks = numbers(finished.get("peak_shard_bytes"))
    if peaks:
        found.append(("memory of a shard", size_text(max(peaks))))
    if scores:
        found.append(
            (
                "models scored",
                str(
                    len(
                        {s.model for s in scores if s.task != SELECTION}
                        or {s.model for s in scores}
                    )
                ),
            )
        )
    if record.events and number(record.events[-1].get("time")):
        # Times beyond all calendars are none.
        with contextlib.suppress(OverflowError, OSError, ValueError):
            when = datetime.fromtimestamp(record.events[-1]["time"], timezone.utc)
            found.append(("last event", f"{when:%Y-%m-%d %H:%M} UTC"))
    version = next(
        (
            str(e["version"])
            for e in record.of("run_started", "training_started")
            if e.get("version")
        ),
        None,
    )
    if version is not None:
        found.append(("arm_ray", version))
    return found

"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from arm_ray.identity import flat
from arm_ray.report.page import charts
from arm_ray.report.page.parts import Figure, Section, seconds_text, size_text, table_of
from arm_ray.report.page.view import RunView
from arm_ray.report.run_facts import Score, iterations_of, number, numbers

# Settings that name places differ in all runs.
_PLACES = ("output", "tracking.run")


def compared_sections(views: Sequence[RunView]) -> list[Section]:
    """The runs in one table, their published models by task, and the settings that differ."""
    figures = [Figure(None, _overview(views))]
    tasks = dict.fromkeys(s.task for view in views for s in view.scores)
    for index, task in enumerate(tasks):
        rows = _published(views, task)
        if len(rows) > 1:
            chart = charts.scores_chart(f"compared-{index}", rows, None)
            chart = replace(
                chart, note="Of each run the published model; the base and best checkpoint once."
            )
            figures.append(Figure(chart, _scores(rows)))
    sections = [Section("compared", "The runs beside each other", figures)]
    differing = _settings(views)
    if differing:
        columns = ["setting", *(view.record.name for view in views)]
        table = table_of(columns, differing)
        sections.append(Section("settings", "Settings that differ", [Figure(None, table)]))
    return sections


def _overview(views: Sequence[RunView]) -> Any:
    rows = []
    for view in views:
        record = view.record
        finished = record.last("run_finished") or {}
        iterations = iterations_of(record)
        seconds = number(finished.get("seconds"))
        peaks = numbers(finished.get("peak_shard_bytes"))
        rows.append(
            [
                record.name,
                record.kind,
                str((record.last("run_started") or {}).get("operator", "–")),
                view.chosen or "–",
                str(len(iterations)) if iterations else "–",
                seconds_text(seconds),
                size_text(max(peaks, default=None)),
                view.finding.headline,
            ]
        )
    columns = ["run", "kind", "operator", "model", "iterations", "time", "memory", "verdict"]
    return table_of(columns, rows, (4, 5, 6))


def _published(views: Sequence[RunView], task: str) -> list[Score]:
    """Of each run the published model; the base and the best checkpoint of the first that has."""
    found: list[Score] = []
    for role in ("base", "checkpoint"):
        for view in views:
            of_task = [s for s in view.scores if s.task == task and s.role == role]
            if of_task:
                found.append(min(of_task, key=lambda s: s.rank))
                break
    for view in views:
        chosen = view.chosen
        found += [
            replace(s, title=f"{view.record.name}: {s.title}")
            for s in view.scores
            if s.task == task and s.model == chosen
        ]
    metrics = {s.metric for s in found}
    return found if len(metrics) == 1 else []


def _scores(scores: Sequence[Score]) -> Any:
    rows = [
        [
            s.title,
            s.role,
            *(
                "–" if v is None else f"{charts.shown(v, s.is_loss):.4f}"
                for v in (s.mean, s.low, s.high)
            ),
        ]
        for s in scores
    ]
    return table_of(["model", "what", scores[0].metric, "low", "high"], rows, (2, 3, 4))


def _settings(views: Sequence[RunView]) -> list[list[str]]:
    """The settings that are not the same in all runs that have a configuration."""
    known: list[Mapping[str, str]] = [
        {key: str(value) for key, value in flat(view.record.config)} for view in views
    ]
    keys = dict.fromkeys(key for settings in known for key in settings)
    rows = []
    for key in keys:
        if key in _PLACES or key.endswith(".path"):
            continue
        values = [settings.get(key, "–") for settings in known]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows

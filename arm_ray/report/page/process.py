"""The sections that say how a run came about: angles, modules, timeline, costs, lineage."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from arm_ray.report.page import mechanics
from arm_ray.report.page.parts import (
    Figure,
    Section,
    Table,
    plain_text,
    seconds_text,
    size_text,
    table_of,
)
from arm_ray.report.run_facts import (
    Iteration,
    Work,
    iterations_of,
    main_session,
    number,
    numbers,
    stages_of,
    study_rows,
    texts,
    titles_of,
    work_of,
)
from arm_ray.report.run_record import JOURNAL_NAME, RunRecord
from arm_ray.storage.regular import json_in


def angles_section(record: RunRecord, prefix: str) -> Section | None:
    """Cosines and angles of consecutive states."""
    iterations = iterations_of(record)
    if not iterations:
        return None
    rows = []
    for t in iterations:
        cells = [str(t.number), str(t.event.get("regime", "")).replace("_", " ")]
        for name in ("weight_cosine", "task_vector_cosine"):
            cosine, angle = number(t.event.get(name)), t.angle(name)
            cells += ["–" if cosine is None else f"{cosine:.7f}"]
            cells += ["–" if angle is None else f"{angle:.4f}°"]
        rows.append(cells)
    table = table_of(
        ["iteration", "regime", "cos(W)", "angle", "cos(task vectors)", "angle"],
        rows,
        (0, 2, 3, 4, 5),
    )
    chart = None
    if len(iterations) > 1:
        chart = mechanics.angles_chart(f"{prefix}-angles", iterations)
    return Section(
        f"{prefix}-angles", "Cosine and angle", [Figure(chart, table, "Consecutive states")]
    )


def modules_section(record: RunRecord, prefix: str) -> Section | None:
    """Rotation strength, update norm and spectra by layer and module."""
    iterations = iterations_of(record)
    if not iterations:
        return None
    if not any(t.modules for t in iterations):
        note = "The events of this run do not say what became of each module: an older version."
        return Section(f"{prefix}-modules", "Layers and modules", (), note)
    last = [t for t in iterations if t.modules][-1]
    found = [
        mechanics.heat_chart(
            f"{prefix}-rotation", "Rotation strength", "angle", "angle, degrees", iterations, False
        ),
        mechanics.heat_chart(
            f"{prefix}-update", "Update norm", "update", "|W_t − W_t−1| / |W_t−1|", iterations, True
        ),
        mechanics.spectrum_chart(f"{prefix}-spectra", iterations),
    ]
    tables = [
        _module_table(last, "angle", "°"),
        _module_table(last, "update", ""),
        _spectrum_table(last),
    ]
    figures = [Figure(chart, table) for chart, table in zip(found, tables, strict=True) if chart]
    note = (
        "Rotation strength is arccos(tr(U) / d_out): about the angle by which ARM turns a task "
        "vector. Means over contributors and experts."
    )
    if found[0] is None:
        note = "Nothing was rotated: this operator, or these settings, use no rotation."
    return Section(f"{prefix}-modules", "Layers and modules", figures, note)


def _module_table(iteration: Iteration, key: str, unit: str) -> Table:
    """A value by layer (rows) and module (columns), of one iteration."""
    modules = list(
        dict.fromkeys(
            str(m.get("module"))
            for m in iteration.modules
            if number(m.get(key)) is not None and m.get("layer") is not None
        )
    )
    cells: dict[Any, dict[str, str]] = {}
    for m in iteration.modules:
        value = number(m.get(key))
        if value is not None and m.get("layer") is not None:
            cells.setdefault(m["layer"], {})[str(m.get("module"))] = f"{value:.4g}{unit}"
    rows = [[str(layer), *(row.get(name, "–") for name in modules)] for layer, row in cells.items()]
    return table_of(
        [f"layer (iteration {iteration.number})", *modules], rows, range(1, len(modules) + 1)
    )


def _spectrum_table(iteration: Iteration) -> Table:
    rows = []
    for m in iteration.modules:
        values = numbers(m.get("spectrum"))
        if values and m.get("layer") is not None:
            rank = number(m.get("rank"))
            rows.append(
                [
                    str(m["layer"]),
                    str(m.get("module")),
                    "–" if rank is None else f"{rank:g}",
                    *(f"{values[round(i * (len(values) - 1))]:.4g}" for i in (0, 0.25, 0.5, 1)),
                ]
            )
    columns = ["layer", "module", "rank", "largest σ", "at 1/4", "at 1/2", "smallest σ"]
    return table_of(columns, rows, (0, 2, 3, 4, 5, 6))


def timeline_section(record: RunRecord, prefix: str) -> Section | None:
    """Which actor did what, and when."""
    work = _all_work(record)
    if not work:
        return None
    kept = main_session(work)
    chart = mechanics.timeline_chart(f"{prefix}-timeline", kept)
    note = (
        "" if len(kept) == len(work) else "The session in which most was done; others are left out."
    )
    return Section(f"{prefix}-timeline", "Timeline", [Figure(chart, _work_table(kept))], note)


def _all_work(record: RunRecord) -> list[Work]:
    found = work_of(record)
    for part in record.parts.values():
        if record.kind == "pipeline" and part.kind in ("merge", "evaluation"):
            found += [
                Work(
                    f"{part.name}: {w.actor}" if part.kind == "merge" else w.actor,
                    w.kind,
                    w.start,
                    w.seconds,
                    w.what,
                )
                for w in work_of(part)
            ]
    return found


def _work_table(work: Sequence[Work]) -> Table:
    """Seconds of each actor by kind of work, and how busy it was."""
    begin = min(w.start for w in work)
    whole = max(w.start + w.seconds for w in work) - begin
    sums: dict[tuple[str, str], float] = {}
    for w in work:
        sums[w.actor, w.kind] = sums.get((w.actor, w.kind), 0.0) + w.seconds
    rows = [
        [actor, kind, seconds_text(seconds), f"{100 * seconds / whole:.0f} %" if whole else "–"]
        for (actor, kind), seconds in sums.items()
    ]
    return table_of(["actor", "work", "time", "of the whole"], rows, (2, 3))


def costs_section(record: RunRecord, prefix: str) -> Section | None:
    """Time, bytes and memory, beside the plan."""
    iterations, plan = iterations_of(record), record.last("run_planned") or {}
    finished = record.last("run_finished") or {}
    figures = []
    if iterations:
        planned = numbers(plan.get("iteration_seconds"))
        measured = [number(t.event.get("seconds")) or 0.0 for t in iterations]
        peaks, planned_peaks = (
            numbers(finished.get("peak_shard_bytes")),
            numbers(plan.get("peak_shard_bytes")),
        )
        totals = {
            key: sum(number(t.event.get(key)) or 0.0 for t in iterations)
            for key in ("bytes_written", "sent_bytes", "network_bytes", "fetched_bytes")
        }
        totals["bytes_written"] += sum(
            number(e.get("num_bytes")) or 0.0 for e in record.of("model_written")
        )
        rows = [
            _beside(
                "iterations, time", sum(measured), sum(planned) if planned else None, seconds_text
            ),
            _beside("whole run, time", number(finished.get("seconds")), None, seconds_text),
            _beside(
                "largest memory of a shard",
                max(peaks, default=None),
                max(planned_peaks, default=None),
                size_text,
            ),
            _beside(
                "states and model written",
                totals["bytes_written"],
                number(plan.get("written_bytes")),
                size_text,
            ),
            _beside(
                "hidden states sent between shards",
                totals["sent_bytes"],
                number(plan.get("sent_bytes")),
                size_text,
            ),
            _beside("of these to another node", totals["network_bytes"], None, size_text),
            _beside("weights fetched from elsewhere", totals["fetched_bytes"], None, size_text),
        ]
        table = table_of(["", "measured", "planned", "measured / planned"], rows, (1, 2, 3))
        device = plan.get("device")
        caption = "" if not device else f"Planned with the rates of the device {device}"
        if device and record.section("calibration"):
            caption += ", for samples of the greatest length there can be"
        figures.append(Figure(None, table, caption))
        figures.append(
            Figure(None, _iteration_costs(iterations, planned), "Iteration by iteration")
        )
    rows = [
        [
            str(e.get("model")),
            seconds_text(e.get("seconds")),
            seconds_text(e.get("reload_seconds")),
            plain_text(e.get("samples")),
            plain_text(e.get("tokens")),
        ]
        for e in record.of("model_scored")
    ]
    if rows:
        columns = ["model", "scored in", "until loaded", "samples", "tokens"]
        figures.append(Figure(None, table_of(columns, rows, (1, 2, 3, 4)), "Scoring"))
    rows = [[stage, seconds_text(seconds)] for stage, seconds in stages_of(record).items()]
    if rows:
        figures.append(Figure(None, table_of(["stage", "time"], rows, (1,)), "Stages"))
    if record.kind == "study":
        figures += _study_costs(record)
    note = "" if plan or not iterations else "No plan was written down: an older version."
    return Section(f"{prefix}-costs", "Time, bytes and memory", figures, note) if figures else None


def _study_costs(record: RunRecord) -> Iterator[Figure]:
    rows, told = [], set()
    for row in study_rows(record):
        if row.get("kind") == "merged" and row.get("model") not in told:
            told.add(row.get("model"))
            rows.append(
                [
                    str(row.get("model")),
                    plain_text(row.get("iterations")),
                    seconds_text(row.get("forward_seconds")),
                    seconds_text(row.get("merge_seconds")),
                    seconds_text(row.get("wall_seconds")),
                    str(row.get("ended") or "–"),
                ]
            )
    if rows:
        columns = ["merge", "iterations", "forward", "merging", "wall", "ended"]
        yield Figure(None, table_of(columns, rows, (1, 2, 3, 4)), "Merges of the study")


def _iteration_costs(iterations: Sequence[Iteration], planned: Sequence[float]) -> Table:
    rows = []
    for index, t in enumerate(iterations):
        seconds = number(t.event.get("seconds")) or 0.0
        busy = numbers(t.event.get("busy_seconds"))
        share = 100 * sum(busy) / (len(busy) * seconds) if busy and seconds else None
        rows.append(
            [
                str(t.number),
                seconds_text(seconds),
                seconds_text(planned[index]) if len(planned) == len(iterations) else "–",
                seconds_text(t.event.get("forward_seconds")),
                seconds_text(t.event.get("merge_seconds")),
                "–" if share is None else f"{share:.0f} %",
                size_text(number(t.event.get("bytes_written"))),
            ]
        )
    columns = ["iteration", "time", "planned", "forward", "merging", "shards busy", "written"]
    return table_of(columns, rows, range(7))


def _beside(
    what: str, measured: float | None, planned: float | None, shown: Callable[[Any], str]
) -> list[str]:
    ratio = "–"
    if measured is not None and planned:
        ratio = f"{measured / planned:.2f}"
    return [what, shown(measured), shown(planned), ratio]


def lineage_section(record: RunRecord, prefix: str, chosen: str | None) -> Section | None:
    """What was made of what."""
    figures = []
    if record.kind == "merge":
        figures = _merge_lineage(record, chosen)
    elif record.kind == "attach":
        figures = _arrival_lineage(record)
    elif record.kind == "evaluation" or record.kind == "pipeline":
        holder = record.parts.get("evaluation", record)
        rows = [[str(name), str(path)] for name, path in holder.section("models").items()] or [
            [str(e.get("model")), str(e.get("path"))] for e in holder.of("model_scored")
        ]
        if rows:
            figures = [Figure(None, table_of(["model", "path"], rows), "What was scored")]
    return Section(f"{prefix}-lineage", "Lineage", figures) if figures else None


def _arrival_lineage(record: RunRecord) -> list[Figure]:
    """Of attach, what each arrival was made of, by its journal."""
    try:
        content = json_in(record.path / JOURNAL_NAME)
    except (OSError, ValueError):
        return []
    arrivals = content.get("arrivals") if isinstance(content, dict) else None
    rows = [
        [
            str(given.get("number")),
            str(given.get("step")),
            ", ".join(texts(given.get("members"))),
            ", ".join(f"arrival {number}" for number in texts(given.get("states"))) or "base",
            str(given.get("version")),
            str(given.get("outcome")),
        ]
        for given in (arrivals if isinstance(arrivals, list) else [])
        if isinstance(given, dict)
    ]
    if not rows:
        return []
    columns = ["arrival", "step", "members", "onto", "digest of its checkpoint's marker", ""]
    return [Figure(None, table_of(columns, rows, (0, 1)), "What each arrival was made of")]


def _merge_lineage(record: RunRecord, chosen: str | None) -> list[Figure]:
    candidates = texts(record.config.get("candidates"))
    named = {"base": str(record.config.get("base", "–"))}
    named |= {f"candidate-{i}": path for i, path in enumerate(candidates, start=1)}
    if record.config.get("initial_state"):
        named["initial"] = str(record.config["initial_state"])
    calibration = record.section("calibration").get("path")
    if calibration:
        named["calibration"] = str(calibration)
    rows = [[name, path, record.inputs.get(name, "–")] for name, path in named.items()]
    rows += [[n, "–", d] for n, d in record.inputs.items() if n not in named]
    titles = titles_of(record)
    made, marked = [], []
    for index, t in enumerate(iterations_of(record)):
        state = f"state-{t.number:04d}"
        if state == chosen:
            marked.append(index)
        members = [titles.get(name, name) for name in texts(t.event.get("contributors"))]
        reference = str(t.event.get("reference"))
        made.append(
            [
                state,
                titles.get(reference, reference),
                ", ".join(members),
                str(t.event.get("regime", "")).replace("_", " "),
                "published" if state == chosen else "",
            ]
        )
    figures = [Figure(None, table_of(["name", "from", "digest"], rows), "What was merged")]
    if made:
        table = table_of(["state", "reference", "contributors", "regime", ""], made, (), marked)
        figures.append(Figure(None, table, "Which states were made of what"))
    return figures


def command_section(record: RunRecord, prefix: str) -> Section | None:
    """The command, and the configuration."""
    verbs = {"merge": "merge", "evaluation": "evaluate", "study": "study", "attach": "attach"}
    shown = []
    if record.config_text and record.kind in verbs:
        file = shlex.quote(str(record.path / "config.yaml"))
        shown.append(
            (
                "The same run again, or on from where it stopped",
                f"arm-ray {verbs[record.kind]} {file}",
            )
        )
    if record.config_text:
        shown.append(("Configuration", record.config_text))
    return Section(f"{prefix}-command", "Command and configuration", texts=shown) if shown else None

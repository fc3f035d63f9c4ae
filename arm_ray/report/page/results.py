"""The sections that say what a run has come to: scores, progress, answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from arm_ray.report.page import charts
from arm_ray.report.page.answers import changed_answers
from arm_ray.report.page.comparison import Difference, settings_of
from arm_ray.report.page.parts import (
    Figure,
    Section,
    Table,
    plain_text,
    seconds_text,
    table_of,
)
from arm_ray.report.run_facts import Score, iterations_of, number, numbers, texts
from arm_ray.report.run_record import RunRecord, json_lines
from arm_ray.schedule import iteration_of

# Rows of a plot at most: the best ones.
_MOST_ROWS = 40


def scores_section(
    record: RunRecord,
    prefix: str,
    scores: Sequence[Score],
    chosen: str | None,
    differences: Sequence[Difference],
) -> Section | None:
    """Scores with intervals, and the published model against each other one."""
    if not scores:
        return None
    figures = []
    for index, task in enumerate(dict.fromkeys(s.task for s in scores)):
        of_task = [s for s in scores if s.task == task]
        shown = of_task
        if len(shown) > _MOST_ROWS:
            best = {s.model for s in sorted(of_task, key=lambda s: s.rank)[:_MOST_ROWS]}
            shown = [s for s in of_task if s.model in best or s.model == chosen or s.role == "base"]
        chart = charts.scores_chart(f"{prefix}-scores-{index}", shown, chosen)
        figures.append(Figure(chart, _scores_table(of_task, chosen)))
        found = [d for d in differences if d.other.task == task]
        if found:
            figures.append(
                _differences(record, f"{prefix}-differences-{index}", found, of_task, chosen)
            )
    note = f"Intervals: {100 * settings_of(record).confidence:g} %, by bootstrap over problems."
    return Section(f"{prefix}-scores", "Scores", figures, note)


def _differences(
    record: RunRecord,
    name: str,
    found: Sequence[Difference],
    of_task: Sequence[Score],
    chosen: str | None,
) -> Figure:
    """Paired differences of a task, as a plot and a table."""
    task = found[0].other.task
    if record.kind == "study":
        best = sorted(found, key=lambda d: -d.gain)[:_MOST_ROWS]
        title = f"Each merge minus the best checkpoint of its run on {task}"
        return Figure(charts.differences_chart(name, best, title, ""), _differences_table(found))
    ours = next((s.title for s in of_task if s.model == chosen), str(chosen))
    few = found
    if len(found) > _MOST_ROWS:
        few = sorted(found, key=lambda d: d.other.rank)[:_MOST_ROWS]
    title = f"{ours} minus the others on {task}, problem by problem"
    return Figure(charts.differences_chart(name, few, title), _differences_table(found))


def _scores_table(scores: Sequence[Score], chosen: str | None) -> Table:
    rows, marked = [], []
    for index, s in enumerate(scores):
        if s.model == chosen:
            marked.append(index)
        name = s.title if s.title == s.model else f"{s.title} ({s.model})"
        rows.append(
            [
                name,
                s.role,
                _score(s.mean, s.is_loss),
                "–" if s.low is None else _score(s.low, s.is_loss),
                "–" if s.high is None else _score(s.high, s.is_loss),
                "–" if s.count is None else str(s.count),
            ]
        )
    metric = "loss" if scores[0].is_loss else f"{scores[0].metric}, %"
    return table_of(
        ["model", "what", metric, "low", "high", "problems"], rows, (2, 3, 4, 5), marked
    )


def _differences_table(found: Sequence[Difference]) -> Table:
    rows = []
    for d in found:
        c, is_loss = d.comparison, d.other.is_loss
        p = "–" if math.isnan(c.p_value) else "< 0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}"
        difference, low, high = (
            _score(v, is_loss, signed=True) for v in (c.difference, c.low, c.high)
        )
        rows.append([d.other.title, difference, low, high, p, str(c.num_problems)])
    return table_of(
        ["against", "difference", "low", "high", "p, two-sided", "problems"], rows, range(1, 6)
    )


def _score(value: float, is_loss: bool, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return format(value, f"{sign}.4f") if is_loss else format(100 * value, f"{sign}.1f")


def progress_section(
    record: RunRecord, prefix: str, scores: Sequence[Score], chosen: str | None
) -> Section | None:
    """Scores and losses by iteration; of attach by arrival."""
    figures = []
    for index, task in enumerate(dict.fromkeys(s.task for s in scores)):
        of_task = [s for s in scores if s.task == task]
        states = sorted(
            ((t, s) for s in of_task if (t := iteration_of(s.model)) is not None),
            key=lambda pair: pair[0],
        )
        if len(states) > 1:
            others = [s for s in of_task if s.role != "merged"]
            chart = charts.progress_chart(
                f"{prefix}-progress-{index}", f"{task} by iteration", states, others, chosen
            )
            figures.append(Figure(chart, _scores_table([s for _, s in states], chosen)))
    figures += _steps(record, prefix)
    figures += _arrivals(record, prefix)
    return Section(f"{prefix}-progress", "By iteration", figures) if figures else None


def _steps(record: RunRecord, prefix: str) -> Iterator[Figure]:
    """Of searched steps, the losses that chose them."""
    rows: list[list[str]] = []
    states: list[tuple[int, Score]] = []
    for iteration in iterations_of(record):
        step = iteration.step
        if not step:
            continue
        blocks = [numbers(block) for block in step.get("coefficients") or ()]
        given = "; ".join(", ".join(f"{c:g}" for c in block) for block in blocks)
        bounds = [number(step.get(key)) for key in ("gain", "gain_low", "gain_high")]
        gain, low, high = ("–" if b is None else f"{b:+.4f}" for b in bounds)
        tried, checked = step.get("tried") or (), step.get("checked") or ()
        first = checked[0] if checked and isinstance(checked[0], dict) else {}
        loss = number(first.get("loss"))
        rows.append(
            [
                str(iteration.number),
                str(step.get("search")),
                given or "none",
                "–" if loss is None else f"{loss:.4f}",
                gain,
                f"{low} to {high}",
                str(len(tried)),
            ]
        )
        if loss is not None:
            states.append(
                (
                    iteration.number,
                    Score(
                        f"state-{iteration.number:04d}",
                        f"state-{iteration.number:04d}",
                        "merged",
                        "loss on samples that did not choose the step",
                        "loss",
                        loss,
                        number(first.get("low")),
                        number(first.get("high")),
                    ),
                )
            )
    if not rows:
        return
    table = table_of(
        ["iteration", "search", "coefficients", "loss", "gain", "interval", "tried"],
        rows,
        (0, 3, 4, 6),
    )
    chart = None
    if len(states) > 1:
        chart = charts.progress_chart(
            f"{prefix}-steps", "Loss of the chosen steps by iteration", states, [], None
        )
    yield Figure(chart, table, "Steps that were chosen by the loss of calibration samples")


def _arrivals(record: RunRecord, prefix: str) -> Iterator[Figure]:
    """Of attach: what models are compared by, arrival by arrival."""
    events = list(record.of("arrival_published"))
    failed = list(record.of("arrival_failed"))
    if not events and not failed:
        return
    rows: list[list[str]] = []
    merged: list[tuple[int, float]] = []
    beside: list[tuple[int, float]] = []
    marked: list[int] = []
    best: Any = None
    for index, event in enumerate(events):
        value, other = number(event.get("value")), number(event.get("checkpoint_value"))
        step = event.get("step")
        if event.get("is_best"):
            best = step
        cosine = number(event.get("weight_cosine"))
        rows.append(
            [
                str(step),
                ", ".join(texts(event.get("members"))),
                "–" if value is None else f"{value:.4f}",
                "–" if other is None else f"{other:.4f}",
                "yes" if event.get("is_best") else "",
                "–" if cosine is None else f"{cosine:.7f}",
                seconds_text(event.get("seconds")),
            ]
        )
        if event.get("is_best"):
            marked = [index]
        if isinstance(step, int):
            for found, kept in ((value, merged), (other, beside)):
                if found is not None:
                    kept.append((step, found))
    chart = None
    if merged:
        chart = charts.arrivals_chart(f"{prefix}-arrivals", merged, beside, best)
    for event in failed:
        rows.append([str(event.get("step")), f"left out: {event.get('problem')}", *[""] * 5])
    yield Figure(
        chart,
        table_of(
            ["step", "members", "merged", "checkpoint", "best", "cos(W)", "time"],
            rows,
            (0, 2, 3, 5, 6),
            marked,
        ),
        "Arrivals",
    )


def training_section(record: RunRecord, prefix: str) -> Section | None:
    """Of a training, its loss."""
    if record.kind != "training":
        return None
    log = json_lines(record.path / "train_log.jsonl")
    chart = charts.training_chart(f"{prefix}-training", log)
    if chart is None:
        return None
    rows = [
        [str(r.get("step")), plain_text(r.get("loss")), plain_text(r.get("learning_rate"))]
        for r in log
    ]
    table = table_of(["step", "loss", "learning rate"], rows, (0, 1, 2))
    return Section(f"{prefix}-training", "Training", [Figure(chart, table)])


def answers_section(
    record: RunRecord, prefix: str, scores: Sequence[Score], chosen: str | None
) -> Section | None:
    """Answers that changed."""
    found = changed_answers(record, scores, chosen)
    if not found:
        return None
    return Section(f"{prefix}-answers", "Changed answers", answers=found)

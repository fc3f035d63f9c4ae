"""Answers that changed: the base, the best checkpoint and the merged model, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arm_ray.evaluation.records import Record, per_problem, read_records
from arm_ray.evaluation.tasks import problem_key, question_text
from arm_ray.report.run_facts import SELECTION, Score, scored_record
from arm_ray.report.run_record import RunRecord, json_lines
from arm_ray.secrets import hidden
from arm_ray.storage.urls import is_url

Change = Literal["gained", "lost"]
# Longest text of one answer, and rows and characters of all tables: a page stays small.
_LONGEST, _MOST_ROWS, _MOST_CHARACTERS = 1500, 120, 1_200_000
# Of a held-out loss, the smallest change in nats per token that is worth a row.
_LOSS_CHANGE = 0.05


@dataclass(frozen=True)
class Answer:
    """What one model made of a problem.

    Attributes:
        text: Its completion, perhaps cut; empty for a loss.
        verdict: Its score in words.
        is_right: Whether it is right; None where that is not asked.
        taken: What was taken for its answer; empty where nothing was, or it is all of the text.
    """

    text: str
    verdict: str
    is_right: bool | None
    taken: str = ""


@dataclass(frozen=True)
class ChangedAnswer:
    """A problem that the merged model answers otherwise than the best checkpoint.

    Attributes:
        problem: Key of the problem.
        question: Its text, where the data are still there; else empty.
        change: Whether the merged model is better or worse on it.
        size: By how much, to sort by.
        answers: Of the models, in their order.
    """

    problem: str
    question: str
    change: Change
    size: float
    answers: Sequence[Answer]


@dataclass(frozen=True)
class ChangedAnswers:
    """The changed answers of a task.

    Attributes:
        task: Name.
        is_loss: Whether they are samples with a loss, and no completions.
        models: Titles of the models that are shown.
        rows: The largest changes first.
        counts: How many there are of each change, also those that are left out.
        equal: Problems on which nothing changed.
    """

    task: str
    is_loss: bool
    models: Sequence[str]
    rows: Sequence[ChangedAnswer]
    counts: Mapping[Change, int] = field(default_factory=dict)
    equal: int = 0

    @property
    def left_out(self) -> int:
        """Changed answers that are not shown."""
        return sum(self.counts.values()) - len(self.rows)


def changed_answers(
    record: RunRecord, scores: Sequence[Score], chosen: str | None
) -> list[ChangedAnswers]:
    """What changed from the best checkpoint to the published model, task by task."""
    directory = scored_record(record).scores
    if chosen is None or directory is None:
        return []
    found: list[ChangedAnswers] = []
    tasks = list(dict.fromkeys(s.task for s in scores if s.model == chosen and s.task != SELECTION))
    for task in tasks:
        of_task = [s for s in scores if s.task == task]
        ours = next(s for s in of_task if s.model == chosen)
        checkpoints = [s for s in of_task if s.role == "checkpoint" and s.model != chosen]
        base = next((s for s in of_task if s.role == "base" and s.model != chosen), None)
        rival = min(checkpoints, key=lambda s: s.rank, default=base)
        if rival is None:
            continue
        shown = [s for s in (base, rival) if s is not None]
        models = list({s.model: s for s in [*shown, ours]}.values())
        try:
            rows = [read_records(directory / s.model, task) for s in models]
            changes = _changed(models, rows, questions_of(scored_record(record), task))
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if changes is not None:
            found.append(changes)
    return _within(found)


def _changed(
    models: Sequence[Score], rows: Sequence[Sequence[Record]], questions: Mapping[str, str]
) -> ChangedAnswers | None:
    metric, is_loss = models[-1].metric, models[-1].is_loss
    values = [per_problem(records, metric) for records in rows]
    ours, theirs = values[-1], values[-2]
    first = [{r.problem: r for r in reversed(records)} for records in rows]
    changed, counts, equal = [], {"gained": 0, "lost": 0}, 0
    for problem in ours.keys() & theirs.keys():
        gain = theirs[problem] - ours[problem] if is_loss else ours[problem] - theirs[problem]
        if abs(gain) < (_LOSS_CHANGE if is_loss else 1e-9):
            equal += 1
            continue
        change: Change = "gained" if gain > 0.0 else "lost"
        counts[change] += 1
        answers = [
            _answer(by_problem.get(problem), value.get(problem), is_loss)
            for by_problem, value in zip(first, values, strict=True)
        ]
        question = hidden(_cut(questions.get(problem, "")))
        changed.append(ChangedAnswer(problem, question, change, abs(gain), answers))
    if not ours.keys() & theirs.keys():
        return None
    changed.sort(key=lambda row: (-row.size, len(row.problem), row.problem))
    kept = [row for row in changed if row.change == "gained"][: _MOST_ROWS // 2]
    kept += [row for row in changed if row.change == "lost"][: _MOST_ROWS // 2]
    kept.sort(key=lambda row: (-row.size, len(row.problem), row.problem))
    titles = [s.title for s in models]
    return ChangedAnswers(
        models[-1].task,
        is_loss,
        titles,
        kept,
        {"gained": counts["gained"], "lost": counts["lost"]},
        equal,
    )


def _answer(record: Record | None, value: float | None, is_loss: bool) -> Answer:
    if record is None or value is None:
        return Answer("", "not scored", None)
    if is_loss:
        return Answer("", f"{value:.3f} nats/token", None)
    told = "right" if value == 1.0 else "wrong" if value == 0.0 else f"{100 * value:.0f} % right"
    short = record.answer or ""
    taken = "" if "\n" in short or len(short) > 60 else hidden(short)
    return Answer(_cut(hidden(record.completion)), told, value >= 0.5, taken)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"


def _within(found: Sequence[ChangedAnswers]) -> list[ChangedAnswers]:
    """As many rows of all tasks as a small page holds."""
    kept, room = [], _MOST_CHARACTERS
    for task in found:
        rows = []
        for row in task.rows:
            room -= len(row.question) + sum(len(a.text) for a in row.answers) + 200
            if room < 0:
                break
            rows.append(row)
        kept.append(
            ChangedAnswers(task.task, task.is_loss, task.models, rows, task.counts, task.equal)
        )
    return kept


def questions_of(record: RunRecord, task: str) -> dict[str, str]:
    """Problem -> its question, of a task whose data are a local file that is still there."""
    for given in record.section("evaluation").get("tasks") or ():
        settings = given if isinstance(given, dict) else {"name": given}
        if settings.get("name") != task:
            continue
        path = settings.get("path")
        if not isinstance(path, str) or is_url(path) or not path.endswith(".jsonl"):
            return {}
        return dict(_questions(Path(path).expanduser(), settings))
    return {}


def _questions(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    column = settings.get("question_column") or "question"
    for index, row in enumerate(json_lines(path)):
        text = row.get(str(column)) or row.get("prompt")
        text = text or question_text(str(settings.get("name")), row)
        if text is None and isinstance(row.get("messages"), list):
            text = json.dumps(row["messages"][:-1], ensure_ascii=False)
        if text is None:
            continue
        expected = row.get("completion") or row.get(str(settings.get("answer_column") or "answer"))
        if isinstance(expected, str) and expected:
            text = f"{text}\n→ {expected}"
        yield problem_key(row, index), str(text)

"""What a run's events say, as plain values: scores, iterations, modules, spans and costs.

Events of older versions lack fields, and of a run that was gone on with, iterations come again: the
last one counts. Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from arm_ray.report.run_record import Event, RunRecord, json_lines
from arm_ray.schedule import BASE, iteration_of, state_name
from arm_ray.storage.regular import json_in

Role = Literal["base", "checkpoint", "merged"]
ROLES: tuple[Role, ...] = ("base", "checkpoint", "merged")
# What attach calls its models: with the number of the arrival.
_ARRIVAL = re.compile(r"^(checkpoint|merged)-\d+-step-(\d+)$")
# What the loss of `select.promise` and of searched steps is called among the tasks.
SELECTION = "selection samples"


@dataclass(frozen=True)
class Score:
    """A number of a model, with its interval where there is one.

    Attributes:
        model: Name.
        title: What people know it by.
        role: What it is.
        task: What it was scored on.
        metric: `loss` (nats per token, smaller is better) or a part of 1.
        mean: The number.
        low: Lower end of its interval.
        high: Upper end.
        count: Problems.
    """

    model: str
    title: str
    role: Role
    task: str
    metric: str
    mean: float
    low: float | None = None
    high: float | None = None
    count: int | None = None

    @property
    def is_loss(self) -> bool:
        """Whether smaller is better."""
        return self.metric == "loss"

    @property
    def rank(self) -> float:
        """Smaller is better, whatever the metric."""
        return self.mean if self.is_loss else -self.mean


@dataclass(frozen=True)
class Iteration:
    """One iteration of a merge.

    Attributes:
        number: 1-based.
        event: `iteration_finished`.
        step: `step_chosen`; empty where steps are fixed.
    """

    number: int
    event: Event
    step: Event = field(default_factory=dict)

    def angle(self, name: str) -> float | None:
        """The angle of a cosine (`weight_cosine`, `task_vector_cosine`), in degrees."""
        cosine = number(self.event.get(name))
        return None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))

    @property
    def modules(self) -> Sequence[Mapping[str, Any]]:
        """What became of each weight matrix; see `events.ModuleChange`."""
        found = self.event.get("modules")
        return [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []


@dataclass(frozen=True)
class Work:
    """What an actor did, and when: seconds since 1970, and how many."""

    actor: str
    kind: str
    start: float
    seconds: float
    what: str


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(value: Any) -> list[float]:
    """The finite numbers of a list; empty for anything else."""
    given = value if isinstance(value, list | tuple) else []
    return [found for item in given if (found := number(item)) is not None]


def texts(value: Any) -> list[str]:
    """The texts of a list; empty for anything else."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def titles_of(record: RunRecord) -> dict[str, str]:
    """Name of a checkpoint in a merge -> the last part of its path, where that tells them apart."""
    candidates = texts(record.config.get("candidates"))
    names = [text.rstrip("/").rpartition("/")[2].rpartition(":")[2] for text in candidates]
    if len(set(names)) < len(names):
        return {}
    return {f"candidate-{i}": name for i, name in enumerate(names, start=1) if name}


def role_of(record: RunRecord, model: str, path: str = "") -> Role:
    """What a scored model is: the base, a checkpoint, or one that was merged."""
    if model == BASE or model.startswith("base-"):
        return "base"
    if iteration_of(model) is not None or model.startswith("merged-"):
        return "merged"
    if record.kind == "study":
        kinds = {row.get("model"): row.get("kind") for row in study_rows(record)}
        found = kinds.get(model)
        return found if found in ROLES else "checkpoint"
    given = path or str(record.section("models").get(model, ""))
    if given:
        place = Path(given)
        # `model/` of a merge, or a state of it, has the merge's configuration above.
        for above in (place, *list(place.parents)[:2]):
            if (above / "inputs.json").is_file() or above.parent.name == "merges":
                return "merged"
    return "checkpoint"


def study_rows(record: RunRecord) -> list[dict[str, Any]]:
    """The results of a study, a row for each model and task."""
    return json_lines(record.path / "results.jsonl") if record.kind == "study" else []


def scored_record(record: RunRecord) -> RunRecord:
    """The run whose records hold the scores: of a pipeline its evaluation, else itself."""
    if record.kind == "pipeline":
        return record.parts.get("evaluation", record)
    return record


def scores_of(record: RunRecord) -> list[Score]:
    """All scores, model by model: from the records, the events, and the choice of the model."""
    if record.kind == "study":
        return list(_study_scores(record))
    holder = scored_record(record)
    titles = titles_of(record)
    paths: dict[str, str] = {}
    said: dict[tuple[str, str], Score] = {}
    for event in (*holder.of("model_scored"),):
        model = str(event.get("model"))
        paths[model] = str(event.get("path", ""))
        scores = event.get("scores")
        for task, metrics in (scores if isinstance(scores, dict) else {}).items():
            if not isinstance(metrics, dict) or not metrics:
                continue
            metric, value = next(iter(metrics.items()))
            mean = number(value)
            if mean is not None:
                role = role_of(holder, model, paths[model])
                title = titles.get(model, model)
                said[model, task] = Score(model, title, role, task, metric, mean)
    for model, task, summary in _summaries(holder):
        metrics = summary.get("metrics")
        if not isinstance(metrics, dict) or not metrics:
            continue
        metric, value = next(iter(metrics.items()))
        value = value if isinstance(value, dict) else {}
        mean = number(value.get("mean"))
        if mean is None:
            continue
        said[model, task] = Score(
            model,
            titles.get(model, model),
            role_of(holder, model, paths.get(model, "")),
            task,
            metric,
            mean,
            number(value.get("low")),
            number(value.get("high")),
            summary.get("num_problems") if isinstance(summary.get("num_problems"), int) else None,
        )
    selected = _ordered(_selection_scores(record, titles))
    return [*_ordered(_with_steps(said.values())), *selected]


def _with_steps(scores: Iterable[Score]) -> list[Score]:
    """Arrivals of attach by their training steps, where that tells them apart."""
    given = list(scores)
    named = [_ARRIVAL.sub(lambda m: f"{m[1]} step {int(m[2])}", s.title) for s in given]
    keys = [(name, s.task) for name, s in zip(named, given, strict=True)]
    if len(set(keys)) < len(keys):
        return given
    return [replace(s, title=name) for s, name in zip(given, named, strict=True)]


def _summaries(holder: RunRecord) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Model, task and numbers of all that is complete in a directory of scores."""
    directory = holder.scores
    if directory is None:
        return
    for file in sorted(directory.glob("*/*.json")):
        try:
            content = json_in(file)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and "metrics" in content:
            yield file.parent.name, str(content.get("task", file.stem)), content


def _selection_scores(record: RunRecord, titles: Mapping[str, str]) -> Iterator[Score]:
    event = record.last("model_selected")
    if event is None:
        return
    count = event.get("samples")
    for state in event.get("compared") or ():
        mean = number(state.get("loss")) if isinstance(state, dict) else None
        if mean is None:
            continue
        name = str(state.get("state"))
        yield Score(
            name,
            titles.get(name, name),
            role_of(record, name),
            SELECTION,
            "loss",
            mean,
            number(state.get("low")),
            number(state.get("high")),
            count if isinstance(count, int) else None,
        )


def _study_scores(record: RunRecord) -> Iterator[Score]:
    seen = set()
    for row in study_rows(record):
        mean, role = number(row.get("mean")), row.get("kind")
        model, task = str(row.get("model")), str(row.get("task"))
        if mean is None or role not in ROLES or (model, task) in seen:
            continue
        seen.add((model, task))
        count = row.get("n") if isinstance(row.get("n"), int) else None
        low, high = number(row.get("low")), number(row.get("high"))
        title = study_title(row)
        yield Score(model, title, role, task, str(row.get("metric")), mean, low, high, count)


def study_title(row: Mapping[str, Any]) -> str:
    """A row's place in the grid of its study in words: the axes are the columns before `kind`."""
    if row.get("kind") == "base":
        return str(row.get("model"))
    parts: list[str] = []
    seeds: list[str] = []
    for key, value in row.items():
        if key == "kind":
            break
        if value is None:
            continue
        named = isinstance(value, bool | int | float)
        text = f"{key} {value}".replace("_", " ") if named else str(value)
        # What tells merges apart at a glance comes first.
        (seeds if key.endswith("seed") else parts).append(text)
    if row.get("checkpoint") is not None:
        parts.append(f"checkpoint {row['checkpoint']}")
    return ", ".join([*parts, *seeds]) or str(row.get("model"))


def _ordered(scores: Any) -> list[Score]:
    """The base, checkpoints, then what is merged; each by the numbers in their names."""
    return sorted(scores, key=lambda s: (ROLES.index(s.role), _natural(s.title), s.task))


def _natural(text: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", text)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts if p]


def chosen_of(record: RunRecord, scores: Sequence[Score]) -> str | None:
    """Name of the model that the run publishes; of several merges the best of the merged ones."""
    selected = record.last("model_selected")
    if selected is not None:
        return str(selected.get("model"))
    written = record.last("model_written")
    if written is not None and str(written.get("state", "")).isdigit():
        return state_name(int(written["state"]))
    merged = [s for s in main_scores(scores) if s.role == "merged"]
    # Of attach, what `best` points to.
    best = [e.get("step") for e in record.of("arrival_published") if e.get("is_best")]
    promoted = [s for s in merged if best and s.model.endswith(f"-step-{best[-1]:06d}")]
    if promoted:
        return promoted[-1].model
    return min(merged, key=lambda s: s.rank).model if merged else None


def main_task(scores: Sequence[Score]) -> str | None:
    """The task that models are told apart by: a held-out loss where there is one."""
    tasks = list(dict.fromkeys(s.task for s in scores))
    losses = [s.task for s in scores if s.is_loss and s.task != SELECTION]
    return next(iter(losses), next(iter(tasks), None))


def main_scores(scores: Sequence[Score]) -> list[Score]:
    """The scores of the main task."""
    task = main_task(scores)
    return [s for s in scores if s.task == task]


def iterations_of(record: RunRecord) -> list[Iteration]:
    """The iterations of a merge, in order."""
    steps = {event.get("iteration"): event for event in record.of("step_chosen")}
    found: dict[int, Iteration] = {}
    for event in record.of("iteration_finished"):
        which = event.get("iteration")
        if isinstance(which, int):
            found[which] = Iteration(which, event, steps.get(which, {}))
    return [found[which] for which in sorted(found)]


def work_of(record: RunRecord) -> list[Work]:
    """When the actors of a run did what, as far as its events say."""
    found: list[Work] = []
    for iteration in iterations_of(record):
        if not iteration.event.get("spans"):
            # Of an older version: when it was, and not who worked.
            found += _ending(iteration.event, "shards", "merge", f"iteration {iteration.number}")
        for shard, spans in enumerate(iteration.event.get("spans") or (), start=1):
            for span in spans:
                if isinstance(span, list) and len(span) == 3 and len(numbers(span[1:])) == 2:
                    kind, start, seconds = span
                    what = f"iteration {iteration.number}"
                    found.append(Work(f"shard {shard}", str(kind), start, seconds, what))
    for event in record.of("model_scored"):
        found += _ending(event, "engines", "score", f"scored {event.get('model')}")
    for event in record.of("stage_finished"):
        found += _ending(event, str(event.get("stage")), "stage", str(event.get("stage")))
    for event in record.of("model_written"):
        found += _ending(event, "driver", "stage", "model written")
    for event in record.of("arrival_published"):
        found += _ending(event, "arrivals", "merge", f"step {event.get('step')}")
    for event in record.of("series_trained"):
        series = f"{event.get('series')}, seed {event.get('seed')}"
        found += _ending(event, "training", "stage", series)
    for event in record.of("cell_finished"):
        found += _ending(event, "merges", "merge", str(event.get("merge")))
    return found


def _ending(event: Event, actor: str, kind: str, what: str) -> list[Work]:
    """Work that an event has ended."""
    end, seconds = number(event.get("time")), number(event.get("seconds"))
    if end is None or seconds is None:
        return []
    return [Work(actor, kind, end - seconds, seconds, what)]


def stages_of(record: RunRecord) -> dict[str, float]:
    """Stage of a pipeline -> its seconds; what is done already is passed at once when run again."""
    stages: dict[str, float] = {}
    for event in record.of("stage_finished"):
        stage, seconds = str(event.get("stage")), number(event.get("seconds")) or 0.0
        stages[stage] = max(stages.get(stage, 0.0), seconds)
    return stages


def main_session(work: Sequence[Work]) -> list[Work]:
    """The session in which most was done: a run that is gone on with may have long pauses."""
    ordered = sorted(work, key=lambda w: w.start)
    sessions: list[list[Work]] = []
    begin = end = 0.0
    for item in ordered:
        if not sessions or item.start - end > max(600.0, 0.5 * (end - begin)):
            sessions.append([])
            begin = item.start
        sessions[-1].append(item)
        end = max(end, item.start + item.seconds)
    return max(sessions, key=lambda found: sum(w.seconds for w in found), default=[])


def warnings_of(record: RunRecord) -> list[str]:
    """The warnings of a run, each once, in order."""
    return list(dict.fromkeys(str(event.get("message")) for event in record.of("warning")))

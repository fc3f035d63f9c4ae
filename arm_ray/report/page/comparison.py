"""The published model against all others on the same problems, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arm_ray.evaluation.records import (
    TaskScores,
    paired_scores,
    read_records,
    read_scores,
)
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Comparison, compare
from arm_ray.report.run_facts import (
    SELECTION,
    Score,
    main_scores,
    number,
    scored_record,
    study_rows,
)
from arm_ray.report.run_record import RunRecord
from arm_ray.report.scores import main_metric
from arm_ray.report.verdict import verdict
from arm_ray.storage.regular import json_in

Tone = Literal["good", "even", "bad", "unknown"]
# Numbers that are drawn for one comparison at most: a page must not keep a run waiting.
_MOST_DRAWN = 2_000_000
_FEWEST_RESAMPLES = 500
_MOST_COMPARED = 24


@dataclass(frozen=True)
class Difference:
    """The published model minus another one, on the problems that both were scored on.

    Attributes:
        other: What it is compared with.
        comparison: The difference, its interval and p-value.
    """

    other: Score
    comparison: Comparison

    @property
    def gain(self) -> float:
        """By how much the published model is better; negative where it is worse."""
        return -self.comparison.difference if self.other.is_loss else self.comparison.difference

    @property
    def is_sure(self) -> bool:
        """Whether its interval is on one side of zero."""
        return self.comparison.low > 0.0 or self.comparison.high < 0.0


@dataclass(frozen=True)
class Finding:
    """What a run has come to.

    Attributes:
        tone: Whether the merge is better than what it was made of.
        headline: In one sentence: which model, how much better, how sure.
        next: What to do now.
        against: How much better than the base and each checkpoint, a text each.
    """

    tone: Tone
    headline: str
    next: str
    against: Sequence[str] = ()


def settings_of(record: RunRecord) -> EvaluationSettings:
    """The confidence and resamples of a run's intervals; the defaults where it does not say."""
    given = scored_record(record).section("evaluation")
    confidence, resamples = number(given.get("confidence")), given.get("resamples")
    known = EvaluationSettings(tasks=("any",))
    if confidence is None or not 0.0 < confidence < 1.0:
        confidence = known.confidence
    if not isinstance(resamples, int) or resamples < 1:
        resamples = known.resamples
    return EvaluationSettings(tasks=("any",), confidence=confidence, resamples=resamples)


def differences_of(
    record: RunRecord, scores: Sequence[Score], chosen: str | None
) -> list[Difference]:
    """The published model against each other one, task by task, where the records allow it.

    Of a study, each merge against the best checkpoint of its own run.
    """
    if chosen is None:
        return []
    if record.kind == "study":
        return list(_study_differences(record, scores))
    found = list(_recorded(record, scores, chosen))
    return [*found, *_selected(record, scores, chosen)]


def _recorded(record: RunRecord, scores: Sequence[Score], chosen: str) -> Iterator[Difference]:
    directory, settings = scored_record(record).scores, settings_of(record)
    if directory is None:
        return
    tasks = dict.fromkeys(s.task for s in scores if s.model == chosen and s.task != SELECTION)
    for task in tasks:
        ours = _records(directory / chosen, task)
        if ours is None:
            continue
        for other in _compared_with(scores, task, chosen):
            theirs = _records(directory / other.model, task)
            if theirs is None:
                continue
            try:
                pair = paired_scores(ours, theirs, other.metric)
            except KeyError:
                # One of them was scored on other problems.
                continue
            if pair.problems:
                yield Difference(other, _compared(pair.first, pair.second, pair.weights, settings))


def _compared_with(scores: Sequence[Score], task: str, chosen: str) -> list[Score]:
    """The others of a task: all of few; of many the base and the best, so that a page is quick."""
    others = [s for s in scores if s.task == task and s.model != chosen]
    if len(others) <= _MOST_COMPARED:
        return others
    best = sorted(others, key=lambda s: (s.role != "base", s.role == "merged", s.rank))
    kept = {s.model for s in best[:_MOST_COMPARED]}
    return [s for s in others if s.model in kept]


def _records(directory: Path, task: str) -> list[Any] | None:
    try:
        return read_records(directory, task)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _compared(first: Any, second: Any, weights: Any, settings: EvaluationSettings) -> Comparison:
    most = max(_FEWEST_RESAMPLES, _MOST_DRAWN // max(1, len(first)))
    return compare(
        first,
        second,
        weights,
        confidence=settings.confidence,
        resamples=min(settings.resamples, most),
    )


def _selected(record: RunRecord, scores: Sequence[Score], chosen: str) -> Iterator[Difference]:
    """By the losses that `select.promise` has compared (`selection.json`)."""
    try:
        content = json_in(record.path / "selection.json")
        losses = {name: np.array(rows, dtype=float) for name, rows in content["losses"].items()}
        ours = losses[chosen]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    settings = settings_of(record)
    for other in scores:
        theirs = losses.get(other.model)
        if other.task != SELECTION or other.model == chosen or theirs is None:
            continue
        if theirs.shape == ours.shape and ours.ndim == 2 and ours[:, 1].sum() > 0:
            yield Difference(other, _compared(ours[:, 0], theirs[:, 0], ours[:, 1], settings))


def _study_differences(record: RunRecord, scores: Sequence[Score]) -> Iterator[Difference]:
    """Of a study, each merge minus the best checkpoint of its own run; `other` is the merge."""
    by_name = {(s.model, s.task): s for s in scores}
    told = set()
    for row in study_rows(record):
        key = (str(row.get("model")), str(row.get("task")))
        values = [number(row.get(f"best_checkpoint_{k}")) for k in ("difference", "low", "high")]
        difference, low, high = values
        if row.get("kind") != "merged" or key not in by_name or key in told:
            continue
        if difference is None or low is None or high is None:
            continue
        told.add(key)
        p, count = number(row.get("best_checkpoint_p")), row.get("n")
        p = float("nan") if p is None else p
        found = Comparison(difference, low, high, p, count if isinstance(count, int) else 0)
        yield Difference(by_name[key], found)


def _study_finding(differences: Sequence[Difference]) -> Finding:
    """How many merges of a study are better than the best checkpoint of their run."""
    main = main_scores([d.other for d in differences])
    found = [d for d in differences if d.other in main]
    if not found:
        return Finding("unknown", "No merge of the study is scored yet.", _GO_ON)
    better = [d for d in found if d.is_sure and d.gain > 0.0]
    worse = [d for d in found if d.is_sure and d.gain < 0.0]
    best = max(found, key=lambda d: d.gain)
    task, metric, is_loss = best.other.task, best.other.metric, best.other.is_loss
    factor, unit = (1.0, "") if is_loss else (100.0, " points")
    low, high = sorted(
        factor * (-v if is_loss else v) for v in (best.comparison.low, best.comparison.high)
    )
    headline = (
        f"{len(better)} of {len(found)} merges are better than the best checkpoint of their run, "
        f"{len(worse)} are worse and {len(found) - len(better) - len(worse)} equal within the "
        f"error ({task} {metric}). The largest gain is {factor * best.gain:+.3g}{unit} "
        f"({low:+.3g} to {high:+.3g}): {best.other.title}."
    )
    tone: Tone = "good" if better else "bad" if len(worse) == len(found) else "even"
    advice = "The best of many is partly the best by chance: repeat it with another seed."
    return Finding(tone, headline, advice if better else _STUDY_NEXT)


def finding_of(
    record: RunRecord,
    scores: Sequence[Score],
    chosen: str | None,
    differences: Sequence[Difference],
) -> Finding:
    """What the run has come to, in words."""
    failed = record.last("run_failed", "run_finished", "stage_finished")
    if failed is not None and failed.get("event") == "run_failed" and not scores:
        return Finding("bad", f"The run failed: {failed.get('message')}", _GO_ON)
    if record.kind == "study":
        return _study_finding(differences)
    headline = _headline(record, scores)
    if headline is None:
        return _unscored(record, scores, chosen)
    tone = _tone(scores, chosen, differences)
    if tone == "unknown" and not differences:
        return Finding(tone, headline, "Score the models on the same problems to compare them.")
    if is_going_on(record):
        return Finding(tone, f"So far: {headline}", _UNFINISHED, _against(differences))
    best = min(
        (s for s in main_scores(scores) if s.role != "merged"), key=lambda s: s.rank, default=None
    )
    rival = "the checkpoint" if best is None else best.title
    advice = _NEXT[tone].format(model=_place(record, chosen), rival=rival)
    return Finding(tone, headline, advice, _against(differences))


def is_going_on(record: RunRecord) -> bool:
    """Whether a merge has not come to a model yet."""
    return record.kind == "merge" and record.last("model_written", "run_finished") is None


def _against(differences: Sequence[Difference]) -> list[str]:
    """On the main task, by how much better than the base and each checkpoint."""
    main = main_scores([d.other for d in differences])
    found = []
    for d in differences:
        if d.other not in main or d.other.role == "merged":
            continue
        gains = [d.comparison.low, d.comparison.high]
        low, high = sorted(-g if d.other.is_loss else g for g in gains)
        shown = [f"{v:+.3f}" if d.other.is_loss else f"{100 * v:+.1f}" for v in (d.gain, low, high)]
        unit = "" if d.other.is_loss else " points"
        found.append(f"{d.other.title} {shown[0]}{unit} ({shown[1]} to {shown[2]})")
    return found[:12]


_STUDY_NEXT = "Try a searched step (schedule.step: subspace), or other candidates."
_UNFINISHED = "The run has not come to a model yet."
_GO_ON = "The same command goes on where it stopped; what is complete stays."
_NEXT: Mapping[Tone, str] = {
    "good": "Use the merged model{model}. Before it is relied on, score it on problems that chose "
    "neither the step nor the state.",
    "even": "Within the error there is nothing to choose between them: score more problems, or "
    "keep the checkpoint. A searched step (schedule.step: subspace) or candidates further apart "
    "may gain more.",
    "bad": "Keep {rival}. A shorter step (schedule.step: subspace finds one) or other "
    "candidates may gain more; with select.promise, what is better is published.",
    "unknown": "Score the merged model and the checkpoints on the same problems.",
}


def _headline(record: RunRecord, scores: Sequence[Score]) -> str | None:
    """The sentence of the command itself, or of the event that tells of the choice."""
    holder = scored_record(record)
    directory = holder.scores
    if directory is not None:
        known: dict[str, dict[str, TaskScores]] = {}
        merged = {s.model for s in scores if s.role == "merged"}
        for score in scores:
            found = (
                None
                if score.task == SELECTION
                else read_scores(directory / score.model, score.task)
            )
            if found is not None and found.metrics:
                known.setdefault(score.model, {})[score.task] = found
        shared = [m for m, tasks in known.items() if tasks.keys() >= _first_tasks(known)]
        known = {model: known[model] for model in shared}
        if known and merged & known.keys() and known.keys() - merged:
            try:
                return _titled(verdict(known, directory, merged, settings_of(record)), scores)
            except (OSError, ValueError, KeyError, TypeError):
                pass
    selected = record.last("model_selected")
    if selected is not None and selected.get("verdict"):
        text = str(selected["verdict"])
        return _titled(text[0].upper() + text[1:] + "." * (not text.endswith(".")), scores)
    return None


def _first_tasks(known: Mapping[str, Mapping[str, TaskScores]]) -> set[str]:
    first = next(iter(known.values()), {})
    losses = [name for name, found in first.items() if main_metric(found) == "loss"]
    return set(losses[:1] or list(first)[:1])


def _titled(text: str, scores: Sequence[Score]) -> str:
    """With the checkpoints' own names in place of `candidate-1`."""
    for score in sorted(scores, key=lambda s: -len(s.model)):
        if score.title != score.model:
            text = text.replace(score.model, score.title)
    return text


def _tone(scores: Sequence[Score], chosen: str | None, differences: Sequence[Difference]) -> Tone:
    tasks = list(dict.fromkeys(d.other.task for d in differences))
    main = main_scores([d.other for d in differences])
    ours = next((s for s in scores if s.model == chosen), None)
    if ours is None or not tasks:
        return "unknown"
    task = main[0].task
    rivals = [d for d in differences if d.other.task == task and d.other.role != "merged"]
    if ours.role != "merged":
        return "bad"
    if not rivals:
        return "unknown"
    rival = min(rivals, key=lambda d: d.other.rank)
    if not rival.is_sure:
        return "even"
    return "good" if rival.gain > 0.0 else "bad"


def _place(record: RunRecord, chosen: str | None) -> str:
    written = record.last("model_written")
    if written is not None:
        return f" ({written.get('path')})"
    best = [e for e in record.of("arrival_published") if e.get("is_best")]
    if best:
        return f" ({best[-1].get('path')})"
    scored = [e for e in scored_record(record).of("model_scored") if e.get("model") == chosen]
    return f" ({scored[-1].get('path')})" if scored else ""


def _unscored(record: RunRecord, scores: Sequence[Score], chosen: str | None) -> Finding:
    written = record.last("model_written")
    if record.kind == "training":
        done = record.last("training_finished")
        text = (
            "The training is not finished."
            if done is None
            else (
                f"The training is finished after step {done.get('step')}, with a loss of "
                f"{number(done.get('loss')) or float('nan'):.4f}."
            )
        )
        return Finding("unknown", text, "Merge its checkpoints: arm-ray merge.")
    if is_going_on(record):
        return Finding("unknown", _UNFINISHED, _GO_ON)
    if scores:
        best = min(main_scores(scores), key=lambda s: s.rank)
        return Finding(
            "unknown",
            f"{best.title} has the best {best.task} {best.metric} of {len(main_scores(scores))} "
            "model(s); there is no merged model and another one to compare it with.",
            "Score a merged model and its checkpoints together: arm-ray evaluate.",
        )
    if written is not None:
        name = chosen or "the model"
        return Finding(
            "unknown",
            f"{name[0].upper()}{name[1:]} is the model; nothing says yet whether it is better than "
            "its checkpoints, because nothing was scored.",
            f"arm-ray evaluate CHECKPOINT {written.get('path')} --tasks …",
        )
    if record.kind == "unknown":
        return Finding("unknown", "This is no run of arm_ray.", "Name a run's output directory.")
    return Finding("unknown", _UNFINISHED, _GO_ON)

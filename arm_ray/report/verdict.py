"""Which of several models is best, by how much, and how sure that is: in one sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.statistics import Comparison
from arm_ray.report.scores import Scores, main_metric, paired_results


def verdict(
    scores: Scores, directory: Path, merged: Collection[str], settings: EvaluationSettings
) -> str:
    """The best merged model against the best of all others, on the same problems.

    By a held-out loss where there is one, because it tells models apart that answer the same number
    of problems; else by the main metric of the first task.

    Args:
        scores: Model -> task -> numbers.
        directory: Where the models' records are.
        merged: Names of the merged models; the others are what they are compared with.
        settings: Confidence and number of resamples.
    """
    first = next(iter(scores.values()))
    task = next((name for name, s in first.items() if main_metric(s) == "loss"), next(iter(first)))
    metric = main_metric(first[task])
    is_loss = metric == "loss"

    def value(model: str) -> float:
        mean = scores[model][task].metrics[metric].mean
        return mean if is_loss else -mean

    ours = [name for name in scores if name in merged and math.isfinite(value(name))]
    others = [name for name in scores if name not in merged and math.isfinite(value(name))]
    if not ours or not others:
        return "There is no merged model and another one to compare it with."
    best, rival = min(ours, key=value), min(others, key=value)
    pair = {name: scores[name] for name in (rival, best)}
    only = {name: {task: tasks[task]} for name, tasks in pair.items()}
    [found] = paired_results(only, directory, rival, settings)
    means = [scores[n][task].metrics[metric].mean for n in (best, rival)]
    return sentence(best, rival, (task, metric), means, found.comparison, settings.confidence)


def sentence(
    best: str,
    rival: str,
    measure: tuple[str, str],
    means: Sequence[float],
    found: Comparison,
    confidence: float,
) -> str:
    """The best merged model against the best other one, in one sentence.

    Args:
        best: The merged model.
        rival: The other one.
        measure: Task and metric that they are compared by.
        means: Of the two models.
        found: The first minus the second, problem by problem.
        confidence: Of the interval.
    """
    task, metric = measure
    is_loss = metric == "loss"
    ours, theirs = (_shown(mean, is_loss) for mean in means)
    return (
        f"{_ending(best, rival, found, is_loss)} ({task} {metric} {ours} against {theirs}, "
        f"{_sure(found, confidence, is_loss)})."
    )


def _ending(best: str, rival: str, found: Comparison, is_loss: bool) -> str:
    gain = -found.difference if is_loss else found.difference
    is_sure = found.low > 0.0 or found.high < 0.0
    if not is_sure:
        return f"{best} and {rival}, the best that was not merged, are equal within the error"
    if gain > 0.0:
        return f"{best} is the best model: better than {rival}, the best that was not merged"
    return f"No merge is better than {rival}, which is the best model; the best merge is {best}"


def _sure(found: Comparison, confidence: float, is_loss: bool) -> str:
    low, high = (_shown(v, is_loss, signed=True) for v in (found.low, found.high))
    return (
        f"difference {_shown(found.difference, is_loss, signed=True)}, "
        f"{100 * confidence:g} % interval {low} to {high}, {found.num_problems} problems"
    )


def _shown(value: float, is_loss: bool, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return format(value, f"{sign}.3f") if is_loss else format(100 * value, f"{sign}.1f") + " %"

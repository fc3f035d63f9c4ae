"""Numbers of a run, out of its events: one table says what they are called everywhere. Pure.

A metric has one name and one description here; its name in Prometheus, its tag in TensorBoard,
MLflow and Weights & Biases, the table in docs/metrics.md and the panels of the Grafana dashboard
follow from it, and tests hold them to that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arm_ray.events import IterationFinished, ModelScored, RunFinished, RunStarted, Warned
from arm_ray.following.events import (
    ArrivalFailed,
    ArrivalPublished,
    CheckpointsSkipped,
    CheckpointTaken,
)

PREFIX = "arm_ray_"
# What Ray puts before the names of all metrics.
RAY_PREFIX = "ray_"
# A record of a training log, which has no event of its own.
TRAINING_STEP = "training_step"
_STATE = re.compile(r"state-(\d+)")
_ARRIVAL = re.compile(r"(checkpoint|merged)-\d+-step-(\d+)")
_NOT_IN_TAGS = re.compile(r"[^\w./ -]")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Without prefix, in Prometheus's style: unit last, `_total` for counters.
        kind: `gauge`: the newest value counts; `counter`: values are added up by Prometheus, while
            trackers get each one.
        unit: `s`, `bytes`, `1` for ratios and scores, or what is counted.
        description: One sentence.
        tag: Its name in trackers, with labels in braces; empty where they do not get it.
        labels: Besides `run`.
        jobs: Where it comes from.
    """

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    description: str
    tag: str
    jobs: tuple[str, ...]
    labels: tuple[str, ...] = ()

    @property
    def ray_name(self) -> str:
        """Its name in `ray.util.metrics`."""
        return PREFIX + self.name

    @property
    def prometheus_name(self) -> str:
        """Its name as a Prometheus server sees it."""
        return RAY_PREFIX + self.ray_name


@dataclass(frozen=True)
class Point:
    """One value of a metric.

    Attributes:
        metric: Whose.
        value: In the metric's unit; finite.
        step: Iteration of a merge, or step of a training; 0 for what belongs to none.
        labels: Values of the metric's labels, in their order.
    """

    metric: Metric
    value: float
    step: int
    labels: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """Its curve in trackers: characters that one of them refuses are underscores."""
        given = dict(zip(self.metric.labels, self.labels, strict=True))
        return _NOT_IN_TAGS.sub("_", self.metric.tag.format(**given))


_MERGE, _SCORED = ("merge", "attach"), ("merge", "attach", "evaluate")
_ATTACH, _TRAIN = ("attach",), ("sft", "grpo")
_MODEL = ("model",)

METRICS: tuple[Metric, ...] = (
    Metric("iteration", "gauge", "iteration",
           "Last iteration that is complete.", "", _MERGE),
    Metric("iterations_total", "counter", "iterations",
           "Iterations completed.", "", _MERGE),
    Metric("iteration_seconds", "gauge", "s",
           "Time since the iteration before was complete; a merge without forward passes: work of "
           "all shards.", "iteration/seconds", _MERGE),
    Metric("forward_seconds", "gauge", "s",
           "Forward passes of an iteration, summed over the shards.",
           "iteration/forward_seconds", _MERGE),
    Metric("merge_seconds", "gauge", "s",
           "Merging and writing of an iteration, summed over the layer groups.",
           "iteration/merge_seconds", _MERGE),
    Metric("stage_utilisation_ratio", "gauge", "1",
           "Part of an iteration's time in which a shard ran forward passes or merged; only where "
           "there are forward passes.", "utilisation/shard-{shard}", _MERGE, ("shard",)),
    Metric("weight_cosine", "gauge", "1",
           "cos(W_t, W_(t-1)); of attach that of an arrival's last iteration.",
           "cosine/weights", _MERGE),
    Metric("task_vector_cosine", "gauge", "1",
           "cos(W_t - W_base, W_(t-1) - W_base); of attach that of an arrival's last iteration.",
           "cosine/task_vectors", _MERGE),
    Metric("rank_deficient_tensors", "gauge", "tensors",
           "Tensors of an iteration that were rotated by fewer directions than samples.",
           "iteration/rank_deficient_tensors", _MERGE),
    Metric("written_bytes_total", "counter", "bytes",
           "Merged weights written to disk.", "bytes/written", _MERGE),
    Metric("sent_bytes_total", "counter", "bytes",
           "Hidden states sent from shard to shard.", "bytes/sent", _MERGE),
    Metric("network_bytes_total", "counter", "bytes",
           "Hidden states sent to another node; part of those sent.", "bytes/network", _MERGE),
    Metric("fetched_bytes_total", "counter", "bytes",
           "Weights that came from elsewhere than the shard's own node.", "bytes/fetched", _MERGE),
    Metric("shard_peak_bytes", "gauge", "bytes",
           "Largest resident memory of a shard, at the end of the merge.",
           "memory/shard-{shard}", _MERGE, ("shard",)),
    Metric("warnings_total", "counter", "warnings",
           "Warnings in the event log.", "", (*_SCORED, *_TRAIN)),
    Metric("score", "gauge", "1",
           "Mean of a benchmark's metric: 0 to 1, or nats per token for a loss.",
           "scores/{task}/{metric}/{model}", _SCORED,
           ("model", "task", "metric")),
    Metric("evaluation_seconds", "gauge", "s",
           "Scoring of a model: reload, completions and grading.",
           "evaluation/seconds/{model}", _SCORED, _MODEL),
    Metric("evaluation_reload_seconds", "gauge", "s",
           "Part of it until an engine held the weights.",
           "evaluation/reload_seconds/{model}", _SCORED, _MODEL),
    Metric("evaluation_samples_per_second", "gauge", "1/s",
           "Completions, or held-out samples, scored in that time.",
           "evaluation/samples_per_second/{model}", _SCORED, _MODEL),
    Metric("evaluation_tokens_per_second", "gauge", "1/s",
           "Tokens drawn, or of held-out samples those that count, in that time.",
           "evaluation/tokens_per_second/{model}", _SCORED, _MODEL),
    Metric("evaluation_samples_total", "counter", "samples",
           "Completions, or held-out samples, scored.", "", _SCORED),
    Metric("evaluation_tokens_total", "counter", "tokens",
           "Tokens drawn, or of held-out samples those that count.", "", _SCORED),
    Metric("checkpoint_step", "gauge", "step",
           "Newest checkpoint taken.", "", _ATTACH),
    Metric("checkpoints_taken_total", "counter", "checkpoints",
           "Complete checkpoints taken.", "", _ATTACH),
    Metric("checkpoints_skipped_total", "counter", "checkpoints",
           "Checkpoints without a merge of their own, because newer ones waited.", "", _ATTACH),
    Metric("arrivals_published_total", "counter", "arrivals",
           "Checkpoints merged and published.", "", _ATTACH),
    Metric("arrivals_failed_total", "counter", "arrivals",
           "Arrivals given up.", "", _ATTACH),
    Metric("published_step", "gauge", "step",
           "Newest step published.", "", _ATTACH),
    Metric("best_step", "gauge", "step",
           "Step that `best` points to.", "attach/best_step", _ATTACH),
    Metric("publication_seconds", "gauge", "s",
           "From the begin of an arrival's merge to its publication.",
           "attach/publication_seconds", _ATTACH),
    Metric("publication_lag_seconds", "gauge", "s",
           "From the taking of a checkpoint to the publication of its merge.",
           "attach/lag_seconds", _ATTACH),
    Metric("published_value", "gauge", "1",
           "What models are compared by (evaluation.select), of the merged model.",
           "attach/value/merged", _ATTACH),
    Metric("checkpoint_value", "gauge", "1",
           "The same of the checkpoint itself.", "attach/value/checkpoint", _ATTACH),
    Metric("training_step", "gauge", "step",
           "Last optimizer step.", "", _TRAIN),
    Metric("training_loss", "gauge", "1",
           "Loss of a step.", "training/loss", _TRAIN),
    Metric("training_learning_rate", "gauge", "1",
           "Learning rate of a step.", "training/learning_rate", _TRAIN),
    Metric("training_gradient_norm", "gauge", "1",
           "Norm of a step's gradient before clipping.", "training/gradient_norm", _TRAIN),
    Metric("training_reward", "gauge", "1",
           "Mean reward of a step's completions.", "training/reward", ("grpo",)),
    Metric("training_reward_deviation", "gauge", "1",
           "Standard deviation of the rewards within a group.",
           "training/reward_deviation", ("grpo",)),
    Metric("training_kl", "gauge", "1",
           "Kullback-Leibler divergence from the starting model, where beta is not 0.",
           "training/kl", ("grpo",)),
    Metric("training_entropy", "gauge", "1",
           "Entropy of the completions' tokens.", "training/entropy", ("grpo",)),
    Metric("training_completion_tokens", "gauge", "tokens",
           "Mean length of a step's completions.", "training/completion_tokens", ("grpo",)),
)  # fmt: skip
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def points(record: Record) -> list[Point]:
    """The numbers in one event.

    Args:
        record: As it stands in `events.jsonl`, or an entry of a training log with
            `event: training_step`. Fields that an older version did not write are left out.
    """
    made = _MAKERS.get(str(record.get("event")))
    return [] if made is None else [p for p in made(record) if math.isfinite(p.value)]


def last_points(records: Iterable[Record]) -> list[tuple[float, Point]]:
    """The numbers of a whole run with their times (seconds since 1970; 0 where none is known).

    Of what a run did twice, after it was taken back to an earlier iteration, the last counts, and
    what came after that iteration the first time is not there.
    """
    found: dict[tuple[str, int], tuple[float, Point]] = {}
    for record in records:
        if record.get("event") == RunStarted.name:
            first = int(record["first_iteration"])
            found = {key: value for key, value in found.items() if key[1] < max(first, 1)}
        for point in points(record):
            if point.metric.tag:
                found[point.tag, point.step] = (float(record.get("time", 0.0)), point)
    return sorted(found.values(), key=lambda item: (item[1].tag, item[1].step))


class Marks:
    """How far each curve has come, so that no point of it is written twice.

    Args:
        steps: Curve -> its last step.
    """

    def __init__(self, steps: Mapping[str, int] | None = None) -> None:
        self.steps = dict(steps or {})

    def new(self, given: Sequence[Point]) -> list[Point]:
        """The points that go on from where their curves ended; from now on they are known."""
        fresh = []
        for point in given:
            if point.metric.tag and point.step > self.steps.get(point.tag, -1):
                self.steps[point.tag] = point.step
                fresh.append(point)
        return fresh


def _point(name: str, value: object, step: int, *labels: str) -> list[Point]:
    """The point, or none where there is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [Point(BY_NAME[name], float(value), step, labels)]


def _named(record: Record, step: int, **names: str) -> list[Point]:
    """Points of metrics, from the fields of the record that they are named with."""
    found: list[Point] = []
    for name, field in names.items():
        found += _point(name, record.get(field), step)
    return found


def _iteration(record: Record) -> list[Point]:
    step, seconds = int(record["iteration"]), float(record["seconds"])
    found = _point("iteration", step, step) + _point("iterations_total", 1, step)
    found += _named(
        record,
        step,
        iteration_seconds="seconds",
        forward_seconds="forward_seconds",
        merge_seconds="merge_seconds",
        weight_cosine="weight_cosine",
        task_vector_cosine="task_vector_cosine",
        written_bytes_total="bytes_written",
        sent_bytes_total="sent_bytes",
        network_bytes_total="network_bytes",
        fetched_bytes_total="fetched_bytes",
    )
    found += _point("rank_deficient_tensors", len(record["rank_deficient"]), step)
    # A linear merge does all iterations in one pass: its shards' time is that of no single one.
    if seconds > 0.0 and record["forward_seconds"]:
        for shard, busy in enumerate(record.get("busy_seconds", ())):
            found += _point("stage_utilisation_ratio", busy / seconds, step, str(shard))
    return found


def _finished(record: Record) -> list[Point]:
    step, found = int(record["iterations"]), []
    for shard, peak in enumerate(record["peak_shard_bytes"]):
        found += _point("shard_peak_bytes", peak, step, str(shard))
    return found


def _scored(record: Record) -> list[Point]:
    model, step = _model_and_step(str(record["model"]))
    found: list[Point] = []
    for task, metrics in record["scores"].items():
        for metric, value in metrics.items():
            found += _point("score", value, step, model, str(task), str(metric))
    samples, tokens = int(record.get("samples", 0)), int(record.get("tokens", 0))
    seconds = float(record["seconds"])
    if record.get("reload_seconds") is None or seconds <= 0.0:
        # All of it was known from before.
        return found
    found += _point("evaluation_seconds", seconds, step, model)
    found += _point("evaluation_reload_seconds", record["reload_seconds"], step, model)
    if samples:
        found += _point("evaluation_samples_per_second", samples / seconds, step, model)
        found += _point("evaluation_samples_total", samples, step)
    if tokens:
        found += _point("evaluation_tokens_per_second", tokens / seconds, step, model)
        found += _point("evaluation_tokens_total", tokens, step)
    return found


def _model_and_step(name: str) -> tuple[str, int]:
    """What a model is labelled with, and its step: few labels, however many states there are."""
    state = _STATE.fullmatch(name)
    if state:
        return "state", int(state[1])
    arrival = _ARRIVAL.fullmatch(name)
    return (arrival[1], int(arrival[2])) if arrival else (name, 0)


def _warned(_: Record) -> list[Point]:
    return _point("warnings_total", 1, 0)


def _taken(record: Record) -> list[Point]:
    step = int(record["step"])
    return _point("checkpoint_step", step, step) + _point("checkpoints_taken_total", 1, step)


def _skipped(record: Record) -> list[Point]:
    return _point("checkpoints_skipped_total", len(record["steps"]), int(record["newest"]))


def _published(record: Record) -> list[Point]:
    step = int(record["step"])
    found = _point("arrivals_published_total", 1, step) + _point("published_step", step, step)
    if record["is_best"]:
        found += _point("best_step", step, step)
    return found + _named(
        record,
        step,
        publication_seconds="seconds",
        publication_lag_seconds="lag_seconds",
        published_value="value",
        checkpoint_value="checkpoint_value",
        weight_cosine="weight_cosine",
        task_vector_cosine="task_vector_cosine",
    )


def _failed(record: Record) -> list[Point]:
    return _point("arrivals_failed_total", 1, int(record["step"]))


def _trained(record: Record) -> list[Point]:
    step = int(record["step"])
    return _point("training_step", step, step) + _named(
        record,
        step,
        training_loss="loss",
        training_learning_rate="learning_rate",
        training_gradient_norm="grad_norm",
        training_reward="reward",
        training_reward_deviation="reward_std",
        training_kl="kl",
        training_entropy="entropy",
        training_completion_tokens="completions/mean_length",
    )


_MAKERS: Mapping[str, Callable[[Record], list[Point]]] = {
    IterationFinished.name: _iteration,
    RunFinished.name: _finished,
    ModelScored.name: _scored,
    Warned.name: _warned,
    CheckpointTaken.name: _taken,
    CheckpointsSkipped.name: _skipped,
    ArrivalPublished.name: _published,
    ArrivalFailed.name: _failed,
    TRAINING_STEP: _trained,
}

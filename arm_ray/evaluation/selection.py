"""Which state is the best one, and when to stop looking. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.settings import SelectSettings
from arm_ray.evaluation.statistics import Comparison, samples_to_tell
from arm_ray.schedule import BASE, candidate_name, iteration_of

AVERAGE = "average"
LAST = "last"


@dataclass(frozen=True)
class Criterion:
    """What states are compared by.

    Attributes:
        metrics: Task and metric; their mean counts where there are several.
        higher_is_better: False for losses.
    """

    metrics: tuple[tuple[str, str], ...]
    higher_is_better: bool

    def value(self, scores: Mapping[tuple[str, str], float]) -> float | None:
        """The number of a state from its scores.

        None where one of them is missing, and NaN where one of them is NaN: such a state is scored,
        and it is not good.
        """
        found = [scores.get(name) for name in self.metrics]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        return math.fsum(known) / len(known)

    def is_better(self, value: float, than: float) -> bool:
        """Whether one value is better than another; NaN is worse than any number."""
        if math.isnan(than):
            return not math.isnan(value)
        return value > than if self.higher_is_better else value < than


@dataclass(frozen=True)
class Selection:
    """The model that a merge publishes.

    Attributes:
        name: `state-0002`, `candidate-1` or `base`.
        verdict: Why, in a sentence; empty where nothing was compared with the checkpoints.
    """

    name: str
    verdict: str = ""

    @property
    def iteration(self) -> int | None:
        """Of a merged state; None of a checkpoint."""
        return iteration_of(self.name)


@dataclass(frozen=True)
class Contender:
    """A model that may be published.

    Attributes:
        name: As in `Selection`.
        title: As the user knows it.
        value: Its score or loss.
    """

    name: str
    title: str
    value: float


def keep_promise(
    state: Contender,
    checkpoint: Contender,
    found: Comparison,
    *,
    higher_is_better: bool,
    what: str,
) -> Selection:
    """The best merged state if it is better than the best checkpoint beyond the error, else that.

    Args:
        state: The best state.
        checkpoint: The best of the base and the candidates.
        found: The state minus the checkpoint, on the same samples.
        higher_is_better: False for losses.
        what: Is compared, in words.
    """
    is_better = found.low > 0.0 if higher_is_better else found.high < 0.0
    numbers = (
        f"{what} {state.value:.4f} against {checkpoint.value:.4f}, difference "
        f"{found.difference:+.4f}, interval {found.low:+.4f} to {found.high:+.4f}, "
        f"{found.num_problems} samples"
    )
    if is_better:
        text = f"{state.title} is better than {checkpoint.title}, the best checkpoint ({numbers})"
        return Selection(state.name, text)
    text = f"no merge beat {checkpoint.title}: the best is {state.title} ({numbers})"
    needed = samples_to_tell(found)
    if found.low <= 0.0 <= found.high and needed is not None and needed > found.num_problems:
        text += f"; about {needed} samples would tell the two apart"
    return Selection(checkpoint.name, text)


def checkpoint_title(name: str, candidates: Sequence[str]) -> str:
    """The base or a candidate as the user knows it: by the last part of its path."""
    if name == BASE:
        return "the base"
    titles = {candidate_name(i): given for i, given in enumerate(candidates)}
    return titles[name].rstrip("/").rpartition("/")[2]


def make_criterion(
    select: SelectSettings, metrics: Mapping[str, Sequence[str]]
) -> Criterion | None:
    """Turn the setting into a criterion; None where the last state is taken as it is.

    Args:
        select: The setting.
        metrics: Task -> its metrics, the main one first.

    Raises:
        EvaluationError: An unknown task, or a metric that the task does not have.
    """
    if select.by == LAST:
        if select.patience is not None:
            raise EvaluationError(
                "patience needs something to compare states by",
                where="evaluation.select",
                got="by: last",
                expected="by: the name of a task, or average",
            )
        return None
    if select.by == AVERAGE:
        scored = {task: names for task, names in metrics.items() if names[0] != "loss"}
        if not scored:
            raise EvaluationError(
                "there is no task to take the average of",
                where="evaluation.select.by",
                got="losses only",
                expected="the name of a task: " + ", ".join(metrics),
            )
        chosen = tuple((task, _metric(select, task, names)) for task, names in scored.items())
        return Criterion(chosen, True)
    if select.by not in metrics:
        raise EvaluationError(
            "states are to be selected by a task that is not there",
            where="evaluation.select.by",
            got=select.by,
            expected="one of " + ", ".join([*metrics, AVERAGE, LAST]),
        )
    metric = _metric(select, select.by, metrics[select.by])
    return Criterion(((select.by, metric),), metric != "loss")


def best_state(values: Mapping[int, float | None], criterion: Criterion) -> int | None:
    """The iteration whose state is the best; the earlier of equal ones, None without values.

    A state whose value is NaN is never the best.
    """
    best: int | None = None
    for iteration in sorted(values):
        value = values[iteration]
        if value is None or math.isnan(value):
            continue
        held = values[best] if best is not None else None
        if held is None or criterion.is_better(value, held):
            best = iteration
    return best


def stops_at(
    values: Mapping[int, float | None], criterion: Criterion, patience: int | None
) -> int | None:
    """The iteration at which `patience` states in a row were no better than the best before.

    It depends on the values in the order of the iterations alone, not on when they became known.
    None is a value that is still awaited; NaN is one that is known, and no better than any other.
    """
    if patience is None:
        return None
    best: float | None = None
    without = 0
    for iteration in sorted(values):
        value = values[iteration]
        if value is None:
            # Scores come in order; what comes after a gap is not looked at yet.
            return None
        if not math.isnan(value) and (best is None or criterion.is_better(value, best)):
            best, without = value, 0
        else:
            without += 1
        if without >= patience:
            return iteration
    return None


def _metric(select: SelectSettings, task: str, names: Sequence[str]) -> str:
    if select.metric is None:
        return names[0]
    if select.metric not in names:
        if select.by == AVERAGE:
            return names[0]
        raise EvaluationError(
            f"the task {task!r} has no such metric",
            where="evaluation.select.metric",
            got=select.metric,
            expected=" or ".join(names),
        )
    return select.metric

"""How far an iteration goes: searches over the lengths of its step, by the losses of trial states.

Pure: a search is a generator. It yields the steps whose losses it wants next, all at once, and is
sent these losses in the same order; what it returns is a ladder of steps, from the boldest to none
at all. `choose` then goes down the ladder by losses of samples that chose nothing so far.

With the task vectors `D_i` (rotated, edited, thinned: what the operator is given), a state is

    W(x) = W_ref + (1 / m) Σ x_i D_i            for an operator that takes their mean

The paper's step has `x_i = λ` for all. `line_search` varies that λ; `subspace` each `x_i`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arm_ray.config import ScheduleConfig
from arm_ray.evaluation.losses import SampleLosses
from arm_ray.schedule import Step

NO_STEP = Step(0.0)
# How often `backtracking` halves a step.
_HALVINGS = 3
# Refinements along a line, one trial each.
_REFINEMENTS = 2
# Two lengths closer than this share of the longer one have the same loss within any error.
_CLOSE = 0.1
# Of the shortest length that was asked for: nothing shorter is tried.
_SHORTEST = 0.5
# Of the quadratic fit: how far its points are from the best one, as a share of its length.
_SPREAD = 0.5
# Of the way between the last two contributors: how far beyond the last one the search looks first.
_BEYOND = 0.5
# Contributors up to which the fit has mixed terms, which take a trial for each pair.
_MOST_MIXED = 3

Search = Generator[Sequence[Step], Sequence[SampleLosses], tuple[Step, ...]]
_Vector = NDArray[np.float64]


def step_samples(batch_size: int) -> tuple[int, int]:
    """How many samples of a mini-batch choose a step, and how many others check it.

    Half of them each. With fewer, a search follows the chance of its samples along the flat valley
    in which good steps lie.
    """
    return max(1, batch_size // 2), batch_size - batch_size // 2


def search(schedule: ScheduleConfig, start: float, contributors: int, divisor: int) -> Search:
    """The search that `schedule.step` names.

    Args:
        schedule: The settings; not `fixed`.
        start: `method.coefficient`, λ of the step that would be taken without a search.
        contributors: Task vectors of the iteration.
        divisor: `m`.

    Returns:
        A generator: see the module.
    """
    if schedule.step == "backtracking":
        return _backtracking(start)
    if schedule.step == "line_search":
        return _line_search(start, schedule.step_limit * divisor)
    return _Subspace(schedule, start, contributors, divisor).search()


def most_trials(schedule: ScheduleConfig, contributors: int) -> tuple[tuple[int, ...], int]:
    """How many states an iteration runs to choose its step, at most.

    Returns:
        Those of each round of the search, and those of the check.
    """
    if not schedule.searches_step:
        return (), 0
    if schedule.step == "backtracking":
        return (2, *(1,) * _HALVINGS), 3
    if schedule.step == "line_search":
        return (5, *(1,) * _REFINEMENTS), 3
    if contributors > 1:
        pairs = contributors * (contributors - 1) // 2
        mixed = pairs if contributors <= _MOST_MIXED else 0
        rounds = [3, 2 * contributors + mixed, 2]
    else:
        rounds = [4, *(1,) * _REFINEMENTS]
    if schedule.step_blocks > 1:
        rounds += [2 * schedule.step_blocks, 1]
    return tuple(rounds), 3 + (contributors > 1) + (schedule.step_blocks > 1)


@dataclass(frozen=True)
class Chosen:
    """The step that an iteration takes.

    Attributes:
        step: It; `NO_STEP` where none is better than none.
        losses: Its losses on the samples of the check.
    """

    step: Step
    losses: SampleLosses


def choose(ladder: Sequence[Step], losses: Sequence[SampleLosses]) -> Chosen:
    """Go down a ladder to the first step that is better than none, and no worse than the next one.

    Args:
        ladder: Steps, the boldest first; the last is no step.
        losses: Theirs, on samples that have not chosen them. Better than none is what is so beyond
            the error of the paired difference; of two steps the mean decides.
    """
    *steps, none = losses
    for step, ours, after in zip(ladder, steps, losses[1:], strict=False):
        if ours.mean <= after.mean and ours.is_lower_than(none):
            return Chosen(step, ours)
    return Chosen(ladder[-1], none)


def _backtracking(start: float) -> Search:
    """Halve the step until it makes the loss smaller, beyond the error."""
    step = Step(start)
    none, losses = yield [NO_STEP, step]
    for _ in range(_HALVINGS):
        if losses.is_lower_than(none):
            break
        step = step.scaled(0.5)
        [losses] = yield [step]
    return _halved(step)


def _line_search(start: float, limit: float) -> Search:
    """The coefficient with the smallest loss: lengths that double, then parabolas."""
    measured = yield from _along(start, limit, [0.5, 1.0, 2.0, 4.0], _REFINEMENTS)
    best = _shortest_best(measured)
    return _halved(Step(best))


def _along(
    start: float, limit: float, multiples: Sequence[float], refinements: int
) -> Generator[Sequence[Step], Sequence[SampleLosses], dict[float, float]]:
    """Lengths of one direction that were tried, 0 among them, with their mean losses."""
    lengths = sorted({min(start * m, limit) for m in multiples})
    found = yield [NO_STEP, *map(Step, lengths)]
    measured = dict(zip([0.0, *lengths], (losses.mean for losses in found), strict=True))
    for _ in range(refinements):
        length = _next_length(measured, limit)
        if length is None or length < _SHORTEST * lengths[0]:
            break
        [losses] = yield [Step(length)]
        measured[length] = losses.mean
    return measured


def _next_length(measured: Mapping[float, float], limit: float) -> float | None:
    """Where a parabola through the best length and its neighbours has its lowest point.

    Twice the best where that is the longest, and half of the shortest where 0 is the best.

    Returns:
        None where that is as good as measured already.
    """
    lengths = sorted(measured)
    place = lengths.index(_shortest_best(measured))
    if place == 0:
        length = lengths[1] / 2.0
    elif place == len(lengths) - 1:
        length = min(2.0 * lengths[place], limit)
    else:
        around = lengths[place - 1 : place + 2]
        length = _lowest(around, [measured[x] for x in around])
    is_known = any(abs(length - x) <= _CLOSE * max(length, x) for x in lengths)
    return None if is_known else length


def _lowest(lengths: Sequence[float], losses: Sequence[float]) -> float:
    """The lowest point of the parabola through three points, of which the middle one is lowest."""
    a, b, c = lengths
    fa, fb, fc = losses
    if not all(map(math.isfinite, losses)):
        # The longest one broke the model: between it and the best one.
        return (b + c) / 2.0 if not math.isfinite(fc) else (a + b) / 2.0
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if left == right:
        return b
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)


def _shortest_best(measured: Mapping[float, float]) -> float:
    return min(measured, key=lambda length: (measured[length], length))


def _halved(step: Step) -> tuple[Step, ...]:
    """A step, half of it, and none; each once."""
    if step.is_none:
        return (step,)
    return (step, step.scaled(0.5), NO_STEP)


class _Subspace:
    """One coefficient for each contributor: a few points, a quadratic fit around the best, a line.

    Args:
        schedule: The settings.
        start: `method.coefficient`.
        contributors: Task vectors of the iteration, k.
        divisor: `m`.
    """

    def __init__(
        self, schedule: ScheduleConfig, start: float, contributors: int, divisor: int
    ) -> None:
        self._start, self._size = start, contributors
        # Of `x_i`: what a task vector is multiplied by is `x_i / m`.
        self._limit, self._divisor = schedule.step_limit * divisor, float(divisor)
        self._blocks = schedule.step_blocks

    def search(self) -> Search:
        """See the module."""
        others: tuple[Step, ...] = ()
        if self._size > 1:
            best, loss = yield from self._directions()
            others = (self._step(self._alone),)
        else:
            measured = yield from _along(self._start, self._limit, [1.0, 2.0, 4.0], _REFINEMENTS)
            length = _shortest_best(measured)
            best, loss = np.array([length]), measured[length]
        step, *shorter = _halved(self._step(best))
        if not shorter:
            return (NO_STEP,)
        by_block = None if self._blocks == 1 else (yield from self._by_block(best, loss))
        before = () if by_block is None else (by_block,)
        return (*before, step, *(each for each in others if each != step), *shorter)

    @property
    def _alone(self) -> _Vector:
        """The last contributor as it is: often the best model that there is."""
        return self._within(np.eye(self._size)[-1] * self._divisor)

    @property
    def _beyond(self) -> _Vector:
        """As far again as half of the way from the last contributor but one to the last."""
        point = np.zeros(self._size)
        point[-2:] = -_BEYOND, 1.0 + _BEYOND
        return point * self._divisor

    def _directions(
        self,
    ) -> Generator[Sequence[Step], Sequence[SampleLosses], tuple[_Vector, float]]:
        """The best point of several contributors, and its loss."""
        points = [np.full(self._size, self._start), self._alone, self._beyond]
        # The points around the best one must be within the limit too.
        points = [self._within(point, 1.0 / (1.0 + 2.0 * _SPREAD)) for point in points]
        found = yield [self._step(point) for point in points]
        tried = [(point, each.mean) for point, each in zip(points, found, strict=True)]
        return (yield from self._fitted(*_lowest_of(tried)))

    def _step(self, *blocks: _Vector) -> Step:
        """The step with the coefficients `x` of each block."""
        factors = tuple(tuple((x / self._start).tolist()) for x in blocks)
        return Step(self._start, factors)

    def _fitted(
        self, centre: _Vector, at_centre: float
    ) -> Generator[Sequence[Step], Sequence[SampleLosses], tuple[_Vector, float]]:
        """The best point of a quadratic fit around a centre, and of the line that leads there."""
        size, spread = self._size, _SPREAD * float(np.linalg.norm(centre))
        axes = spread * _basis(centre)
        offsets = [sign * row for row in axes for sign in (1.0, -1.0)]
        if size <= _MOST_MIXED:
            offsets += [axes[i] + axes[j] for i in range(size) for j in range(i + 1, size)]
        ends = [self._within(centre + offset) for offset in offsets]
        found = yield [self._step(end) for end in ends]
        losses = [each.mean for each in found]
        tried = [(centre, at_centre), *zip(ends, losses, strict=True)]
        move = _newton(losses, at_centre, size) @ axes
        # The fit holds near its points; the valley often goes on in the direction it points to.
        ends = [self._within(centre + t * move) for t in (1.0, 2.0)]
        found = yield [self._step(end) for end in ends]
        tried += [(end, each.mean) for end, each in zip(ends, found, strict=True)]
        return _lowest_of(tried)

    def _within(self, x: _Vector, share: float = 1.0) -> _Vector:
        """Inside the trust region, or a share of it: no coefficient beyond, the direction kept."""
        largest, limit = float(np.abs(x).max()), share * self._limit
        return x * (limit / largest) if largest > limit else x

    def _by_block(
        self, best: _Vector, loss: float
    ) -> Generator[Sequence[Step], Sequence[SampleLosses], Step | None]:
        """Lengths of each block of layers, by parabolas; None where that is no better."""
        scales = (0.7, 1.4)
        blocks = range(self._blocks)

        def scaled(by: Mapping[int, float]) -> Step:
            return self._step(*(self._within(best * by.get(b, 1.0)) for b in blocks))

        found = yield [scaled({block: scale}) for block in blocks for scale in scales]
        values = [each.mean for each in found]
        moved = {}
        for block in blocks:
            low, high = values[2 * block : 2 * block + 2]
            ends = {scales[0]: low, 1.0: loss, scales[1]: high}
            at = min(ends, key=lambda scale: ends[scale])
            moved[block] = _lowest(list(ends), list(ends.values())) if at == 1.0 else at
        step = scaled(moved)
        [each] = yield [step]
        return step if each.mean < loss else None


def _lowest_of(tried: Sequence[tuple[_Vector, float]]) -> tuple[_Vector, float]:
    """The point with the smallest loss; the first one, of equals."""
    return min(tried, key=lambda pair: pair[1])


def _basis(centre: _Vector) -> _Vector:
    """`[k, k]`: orthonormal rows, the first of them the direction of a point `[k]`.

    The loss is most sensitive to how far a step goes, and less to how contributors share it. Points
    along and across that direction tell the two apart; points along the contributors, which have
    similar task vectors, do not.
    """
    rows = [centre / np.linalg.norm(centre)]
    for axis in np.eye(len(centre))[::-1]:
        rest = axis - sum((axis @ row) * row for row in rows)
        length = float(np.linalg.norm(rest))
        if length > 1e-6 and len(rows) < len(centre):
            rows.append(rest / length)
    return np.array(rows)


def _newton(losses: Sequence[float], at_centre: float, size: int) -> _Vector:
    """`[k]`: the move to the lowest point of a quadratic through losses, in units of their axes.

    Args:
        losses: At plus and minus one unit along each axis; then, if they are there, at the sums of
            each two axes.
        at_centre: The loss at the centre.
        size: Axes, k.

    Returns:
        The move, at most `2 √k` long.
    """
    values = np.array([v if math.isfinite(v) else 10.0 * abs(at_centre) + 10.0 for v in losses])
    up, down = values[0 : 2 * size : 2], values[1 : 2 * size : 2]
    gradient = (up - down) / 2.0
    curvature = np.diag(up + down - 2.0 * at_centre)
    mixed = iter(values[2 * size :])
    if len(values) > 2 * size:
        for i in range(size):
            for j in range(i + 1, size):
                both = next(mixed)
                curvature[i, j] = curvature[j, i] = both - up[i] - up[j] + at_centre
    # A direction in which the loss is flat, or falls more and more, is followed as far as allowed.
    values_of, vectors = np.linalg.eigh(curvature)
    least = max(1e-3 * float(np.abs(values_of).max()), 1e-12)
    along = vectors.T @ gradient / np.maximum(values_of, least)
    move: _Vector = -(vectors @ along)
    length, longest = float(np.linalg.norm(move)), 2.0 * math.sqrt(size)
    return move * (longest / length) if length > longest else move

"""Searches over the length of a step, on losses that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from arm_ray.config import ScheduleConfig
from arm_ray.evaluation.losses import SampleLosses
from arm_ray.schedule import Step
from arm_ray.steps import NO_STEP, choose, search

SAMPLES = 40
Loss = Callable[[np.ndarray], float]


def losses_of(mean: float, seed: int = 0) -> SampleLosses:
    """Samples of ten tokens, with the same differences between samples whatever the mean."""
    spread = np.random.default_rng(seed).normal(0.0, 0.05, SAMPLES)
    sums = 10.0 * (mean + spread - spread.mean())
    return SampleLosses(sums, np.full(SAMPLES, 10.0))


class Searched:
    """A search, and the coefficients that it tried."""

    def __init__(
        self, loss: Loss, contributors: int = 2, start: float = 0.7, **schedule: object
    ) -> None:
        self.contributors, self.tried, self.rounds = contributors, list[np.ndarray](), 0
        settings = ScheduleConfig.model_validate(schedule)
        trials = search(settings, start, contributors, contributors)
        wanted: Sequence[Step] = next(trials)
        while True:
            self.rounds += 1
            try:
                wanted = trials.send([losses_of(loss(self.coefficients(s))) for s in wanted])
            except StopIteration as end:
                self.ladder: tuple[Step, ...] = end.value
                break

    def coefficients(self, step: Step) -> np.ndarray:
        found = np.array(step.coefficients(self.contributors, self.contributors)[0])
        self.tried.append(found)
        return found

    @property
    def best(self) -> np.ndarray:
        return self.coefficients(self.ladder[0])


def bowl(*lowest: float, mixed: float = 0.0) -> Loss:
    """A quadratic with its lowest point there, where the loss is 0.4; it is 1.4 without a step."""
    at = np.array(lowest)

    def loss(x: np.ndarray) -> float:
        d = (x - at) / np.linalg.norm(at)
        return 0.4 + float(d @ d) + mixed * float(d[0] * d[-1])

    return loss


@pytest.mark.parametrize("lowest", [0.1, 0.2, 0.35, 0.6, 1.1, 1.9])
def test_a_line_search_finds_the_lowest_point_of_a_parabola(lowest: float) -> None:
    found = Searched(bowl(lowest, lowest), step="line_search")
    assert found.best == pytest.approx([lowest, lowest], rel=0.11)
    assert len(found.tried) <= 9


def test_a_line_search_stays_within_its_limit() -> None:
    found = Searched(bowl(5.0, 5.0), step="line_search", step_limit=1.5)
    assert found.best == pytest.approx([1.5, 1.5], rel=0.1)
    assert max(c.max() for c in found.tried) <= 1.5


def test_where_no_step_is_best_there_is_none() -> None:
    def loss(x: np.ndarray) -> float:
        return 0.4 + float(x @ x)

    assert Searched(loss, step="line_search").ladder == (NO_STEP,)
    # A fit comes near to it; the samples of the check decide.
    found = Searched(loss, step="subspace")
    assert found.best == pytest.approx([0.0, 0.0], abs=0.05)
    checked = [losses_of(loss(found.coefficients(step))) for step in found.ladder]
    assert choose(found.ladder, checked).step == NO_STEP


@pytest.mark.parametrize(
    ("lowest", "mixed"),
    [((0.35, 0.16), 0.0), ((0.77, 2.0), 0.0), ((-0.4, 1.6), 0.0), ((0.3, 1.2), 0.8)],
)
def test_a_subspace_search_finds_one_coefficient_for_each(
    lowest: tuple[float, float], mixed: float
) -> None:
    loss = bowl(*lowest, mixed=mixed)
    found = Searched(loss, step="subspace")
    line = Searched(loss, step="line_search")
    at_best = loss(np.array(lowest)) - 0.4
    excess = loss(found.best) - 0.4 - at_best
    assert excess < 0.35 * (loss(line.best) - 0.4 - at_best) + 0.02
    assert len(found.tried) <= 14


def test_more_than_three_contributors_take_two_trials_each() -> None:
    found = Searched(bowl(0.1, 0.2, 0.1, 0.3, 0.5), contributors=5, step="subspace")
    assert loss_ratio(found) < 0.2
    assert len(found.tried) <= 5 + 10 + 4


def loss_ratio(found: Searched) -> float:
    loss = bowl(0.1, 0.2, 0.1, 0.3, 0.5)
    return (loss(found.best) - 0.4) / 1.0


def test_the_largest_coefficient_stays_within_the_limit() -> None:
    found = Searched(bowl(0.5, 9.0), step="subspace", step_limit=2.0)
    assert max(np.abs(c).max() for c in found.tried) <= 2.0 + 1e-12


def test_states_that_break_are_no_good() -> None:
    def loss(x: np.ndarray) -> float:
        return math.nan if x.max() > 1.0 else 1.0 - x.max()

    for step in ("line_search", "subspace"):
        found = Searched(loss, step=step)
        assert 0.5 < found.best.max() <= 1.0


def test_blocks_are_moved_by_themselves() -> None:
    def loss(step: Step) -> float:
        blocks = step.coefficients(1, 1)
        first, last = blocks[0][0], blocks[-1][0]
        return 0.4 + (first - 0.5) ** 2 + (last - 0.9) ** 2

    settings = ScheduleConfig.model_validate({"step": "subspace", "step_blocks": 2})
    trials = search(settings, 0.7, 1, 1)
    wanted = next(trials)
    while True:
        try:
            wanted = trials.send([losses_of(loss(step)) for step in wanted])
        except StopIteration as end:
            ladder = end.value
            break
    blocks, whole, half, none = ladder
    assert loss(blocks) < loss(whole) - 0.01
    assert len(blocks.factors) == 2
    assert half == whole.scaled(0.5)
    assert none == NO_STEP


def test_backtracking_halves_until_the_loss_falls() -> None:
    accepted = Searched(bowl(0.3, 0.3), step="backtracking")
    assert accepted.ladder[0] == Step(0.7)
    assert accepted.rounds == 1
    halved = Searched(bowl(0.05, 0.05), step="backtracking")
    assert halved.ladder[0] == Step(0.7 / 4)
    assert [step.coefficient for step in halved.ladder] == [0.7 / 4, 0.7 / 8, 0.0]


def test_a_step_is_taken_where_it_beats_none_and_the_shorter_one() -> None:
    ladder = (Step(0.7), Step(0.35), NO_STEP)
    assert choose(ladder, [losses_of(m) for m in (0.4, 0.5, 1.0)]).step == Step(0.7)
    assert choose(ladder, [losses_of(m) for m in (0.6, 0.5, 1.0)]).step == Step(0.35)
    assert choose(ladder, [losses_of(m) for m in (1.2, 1.1, 1.0)]).step == NO_STEP
    # Better, but not beyond the error: each sample differs by chance.
    by_chance = [losses_of(0.999, 1), losses_of(0.9995, 2), losses_of(1.0, 3)]
    assert choose(ladder, by_chance).step == NO_STEP
    broken = SampleLosses(np.full(SAMPLES, np.nan), np.full(SAMPLES, 10.0))
    assert choose(ladder, [broken, losses_of(0.5), losses_of(1.0)]).step == Step(0.35)


def test_factors_belong_to_blocks_of_layers() -> None:
    step = Step(0.7, ((1.0, 2.0), (3.0, 4.0)))
    assert [step.factors_at(layer, 5) for layer in range(5)] == [
        (1.0, 2.0),
        (1.0, 2.0),
        (1.0, 2.0),
        (3.0, 4.0),
        (3.0, 4.0),
    ]
    assert Step(0.7).factors_at(3, 5) == ()
    assert step.coefficients(2, 2) == ((0.35, 0.7), (0.7 * 3 / 2, 1.4))

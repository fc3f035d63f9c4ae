"""Which states meet in which iteration: anchoring, sliding window, hybrid. Pure.

`plan_iteration` turns the schedule's settings and an iteration number into an `IterationPlan`;
`should_stop` and `states_needed_after` are the other two decisions a driver asks for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # Names of states are read where a configuration is not.
    from arm_ray.config import ScheduleConfig

Regime = Literal["anchoring", "sliding_window"]

BASE = "base"
INITIAL = "initial"


def candidate_name(index: int) -> str:
    """Name of candidate `index` (0-based): `candidate-1`, `candidate-2` and so on."""
    return f"candidate-{index + 1}"


def state_name(iteration: int) -> str:
    """Name of the state that iteration `iteration` (1-based) makes: `state-0001` and so on."""
    return f"state-{iteration:04d}"


@dataclass(frozen=True)
class Step:
    """How far an iteration goes along its task vectors.

    Attributes:
        coefficient: λ, in place of `method.coefficient`. 0 is no step: the reference itself.
        factors: What each contributor's task vector is multiplied by, for each block of layers;
            empty: 1 for all. Blocks share the decoder layers evenly; what comes before the layers
            belongs to the first block, and what comes after them to the last.
    """

    coefficient: float
    factors: tuple[tuple[float, ...], ...] = ()

    @property
    def is_none(self) -> bool:
        """Whether nothing is added to the reference."""
        return self.coefficient == 0.0 or (
            bool(self.factors) and not any(any(block) for block in self.factors)
        )

    def factors_at(self, layer: int, num_layers: int) -> tuple[float, ...]:
        """The factors of one decoder layer, 0-based; empty: 1 for all."""
        return self.factors[layer * len(self.factors) // num_layers] if self.factors else ()

    def scaled(self, by: float) -> Step:
        """The same direction, another length."""
        return Step(self.coefficient * by, self.factors)

    def coefficients(self, contributors: int, divisor: int) -> tuple[tuple[float, ...], ...]:
        """What each task vector is multiplied by where the operator takes their mean: `λ f_i / m`.

        Args:
            contributors: How many there are.
            divisor: `m`.

        Returns:
            For each block, one number for each contributor.
        """
        blocks = self.factors or ((1.0,) * contributors,)
        return tuple(tuple(self.coefficient * f / divisor for f in block) for block in blocks)


@dataclass(frozen=True)
class IterationPlan:
    """What one iteration merges: `W_new = W_ref + (λ / divisor) Σ U_i (W_i - W_ref)`.

    Attributes:
        iteration: 1-based number; also the number of the state it makes and of its mini-batch.
        regime: Eq. 4 (anchoring) or Eq. 5 (sliding window).
        reference: Name of the state with weights `W_ref`.
        contributors: Names of the `W_i`, without the reference itself (its task vector is zero).
        divisor: `m`.
        previous: Name of `W_(t-1)`, which the cosines compare the new state with.
        draw: Number of its mini-batch, and of an operator's random draws, from 1.
        step: How far it goes; None: `method.coefficient`, for all layers and contributors.
    """

    iteration: int
    regime: Regime
    reference: str
    contributors: tuple[str, ...]
    divisor: int
    previous: str
    draw: int = 1
    step: Step | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """States whose activations the iteration needs, the reference first."""
        return (self.reference, *self.contributors)

    @property
    def output(self) -> str:
        """Name of the state that the iteration makes."""
        return state_name(self.iteration)


def plan_iteration(schedule: ScheduleConfig, num_candidates: int, iteration: int) -> IterationPlan:
    """Say what iteration `iteration` (1-based) merges.

    Anchored (Eq. 4): reference `W_(t-1)`, contributors the candidates, divisor `k`.
    Window (Eq. 5): reference `W_(t-n)`, contributors `W_(t-n+1) … W_(t-1)`, divisor `n` or `n - 1`.
    """
    candidates = tuple(candidate_name(i) for i in range(num_candidates))
    before: tuple[str, ...]
    if schedule.anchor_iterations:
        before = ({"base": BASE, "given": INITIAL}.get(schedule.initial, candidates[-1]),)
    else:
        before = (BASE, *candidates)
    # Of a long history, no more than a window takes.
    first = max(1, iteration - schedule.window_size)
    history = before + tuple(state_name(t) for t in range(first, iteration))
    previous, draw = history[-1], schedule.offset + iteration
    if iteration <= schedule.anchor_iterations:
        contributors = tuple(name for name in candidates if name != previous)
        return IterationPlan(
            iteration, "anchoring", previous, contributors, num_candidates, previous, draw
        )
    window = history[-schedule.window_size :]
    divisor = len(window) if schedule.window_divisor == "n" else len(window) - 1
    return IterationPlan(
        iteration, "sliding_window", window[0], window[1:], divisor, previous, draw
    )


def merge_sizes(schedule: ScheduleConfig, num_candidates: int) -> tuple[int, ...]:
    """How many models the iterations of a schedule merge: every number that occurs, ascending.

    Anchored iterations merge the candidates; one that starts from the last candidate, the others.
    In a window the reference is one of the models.
    """
    # From the second on anchored iterations are alike, and so are all of the window.
    telling = {1, min(2, schedule.anchor_iterations), schedule.anchor_iterations + 1}
    plans = [
        plan_iteration(schedule, num_candidates, iteration)
        for iteration in telling
        if 1 <= iteration <= schedule.max_iterations
    ]
    return tuple(sorted({len(p.contributors) + (p.regime == "sliding_window") for p in plans}))


def should_stop(schedule: ScheduleConfig, iteration: int, task_vector_cosine: float | None) -> bool:
    """Whether the run ends after `iteration`: the budget is spent, or the angle has closed.

    Args:
        schedule: The settings.
        iteration: The iteration that just finished, 1-based.
        task_vector_cosine: cos(W_t - W_base, W_(t-1) - W_base); None where one of them is zero.
    """
    if iteration >= schedule.max_iterations:
        return True
    return has_converged(schedule, task_vector_cosine)


def has_converged(schedule: ScheduleConfig, task_vector_cosine: float | None) -> bool:
    """Whether consecutive task vectors point the same way, within `tolerance`."""
    if task_vector_cosine is None or schedule.tolerance == 0.0:
        return False
    return 1.0 - task_vector_cosine <= schedule.tolerance


def states_read_after(schedule: ScheduleConfig, num_candidates: int, iteration: int) -> set[str]:
    """Names of the states, of those there are after an iteration, that later ones read.

    The base is among them while there are later iterations.
    """
    read: set[str] = set()
    for later in _reading_after(schedule, iteration):
        plan = plan_iteration(schedule, num_candidates, later)
        read.update({*plan.inputs, plan.previous, BASE})
    return read


def _reading_after(schedule: ScheduleConfig, iteration: int) -> range:
    """Later iterations, up to where a window holds nothing that is there after this one."""
    last = min(iteration + schedule.window_size, schedule.max_iterations)
    return range(iteration + 1, last + 1)


def states_run_after(schedule: ScheduleConfig, num_candidates: int, iteration: int) -> set[str]:
    """The same of those that later iterations merge; they read others to compare with them."""
    later = _reading_after(schedule, iteration)
    return {s for t in later for s in plan_iteration(schedule, num_candidates, t).inputs}


def states_needed_after(schedule: ScheduleConfig, num_candidates: int, iteration: int) -> set[str]:
    """Merged states that must survive `iteration` for the run to go on or to end there."""
    read = states_read_after(schedule, num_candidates, iteration)
    made = {name for name in read if (iteration_of(name) or sys.maxsize) <= iteration}
    return made | {state_name(iteration)}


def iterations_needed_after(
    schedule: ScheduleConfig, num_candidates: int, iteration: int
) -> set[int]:
    """The iterations that made the states of `states_needed_after`; none where none is made yet."""
    names = states_needed_after(schedule, num_candidates, iteration)
    return {made for made in map(iteration_of, names) if made}


def iteration_of(name: str) -> int | None:
    """The iteration that made a state, or None for the base and the candidates."""
    return int(name.removeprefix("state-")) if name.startswith("state-") else None

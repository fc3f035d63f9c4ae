"""Which merged states are written as they are made, and how long the others stay in memory. Pure.

Weights that live on the device or in host memory are merged there, and what the next iteration
reads is there already. A state is written only where something asks for it:

| | written |
|---|---|
| `runtime.residency: disk`, `keep_states: all` | every state |
| `evaluation` | the states that are scored |
| `runtime.recovery_every` | every so many iterations, all that the next one reads |
| a merge that is halted | all that the next iteration reads |
| `keep_states: last`, an adapter | the last or chosen one, once it is known |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from arm_ray.config import MergeConfig
from arm_ray.schedule import iterations_needed_after

# How long a merge runs on average before something kills it: a node, a time limit, its owner. An
# assumption; only how often states are written depends on it.
SECONDS_BETWEEN_FAILURES = 8 * 3600.0


@dataclass(frozen=True)
class StateLife:
    """What becomes of the states of one merge.

    Attributes:
        last: The last iteration that is run.
        written: Iterations whose states are written as they are made.
        optional: Those of them that are written for recovery alone.
        recovery: Iterations before the last after which a merge that was killed can go on.
        may_end_early: Whether an earlier state than the last may become the model: each stays until
            the driver knows.
        iteration_s: Seconds of an iteration, estimated.
    """

    last: int
    written: frozenset[int]
    optional: frozenset[int]
    recovery: tuple[int, ...]
    may_end_early: bool
    iteration_s: float = 0.0

    @property
    def most_lost(self) -> int:
        """The most iterations that have to be made again where the merge is killed."""
        ends = (0, *self.recovery, self.last)
        return max(after - before for before, after in pairwise(ends))

    @property
    def loss_text(self) -> str:
        """What a merge that is killed loses, in words."""
        lost = self.most_lost
        again = f"{lost} iteration{'s' if lost > 1 else ''} again"
        if self.iteration_s:
            again += f", about {max(1, round(lost * self.iteration_s))} s of work"
        if not self.recovery:
            return f"states stay in memory: a run that is killed makes at most {again}"
        points = ", ".join(map(str, self.recovery[:3])) + ", …" * (len(self.recovery) > 3)
        return f"a run that is killed goes on after iteration {points}: it makes at most {again}"


def state_life(
    config: MergeConfig, num_candidates: int, every: int | None, last: int | None = None
) -> StateLife:
    """What becomes of the states of a merge with forward passes.

    Args:
        config: The configuration.
        num_candidates: How many candidates there are.
        every: Iterations between recovery points; None: there are none.
        last: The iteration that the merge is halted after; None: it is not.
    """
    schedule, evaluation = config.schedule, config.evaluation
    end = schedule.max_iterations if last is None else last
    made = range(1, end + 1)
    asked = set[int]()
    if config.runtime.residency == "disk" or config.keep_states == "all":
        asked = set(made)
    elif evaluation is not None:
        asked = {t for t in made if evaluation.is_due(t, schedule.max_iterations)}
    if end < schedule.max_iterations:
        asked |= iterations_needed_after(schedule, num_candidates, end)
    written = set(asked)
    for point in range(every, end, every) if every else ():
        written |= iterations_needed_after(schedule, num_candidates, point)
    recovery = tuple(
        t for t in made[:-1] if iterations_needed_after(schedule, num_candidates, t) <= written
    )
    by_evidence = config.compares_losses or config.selects_by_task
    may_end_early = schedule.tolerance > 0.0 or schedule.searches_step or by_evidence
    return StateLife(end, frozenset(written), frozenset(written - asked), recovery, may_end_early)


def linear_life(config: MergeConfig, last: int | None = None) -> StateLife:
    """The same for a merge without forward passes, which keeps nothing in memory.

    Args:
        config: The configuration.
        last: The iteration that the merge is halted after; None: it is not.
    """
    end = config.schedule.max_iterations if last is None else last
    due = config.evaluation.is_due if config.evaluation is not None else None
    written = {t for t in range(1, end + 1) if due is not None and due(t, end)}
    if config.keep_states == "all":
        written = set(range(1, end + 1))
    elif wants_last(config):
        written.add(end)
    return StateLife(end, frozenset(written), frozenset(), (), may_end_early=False)


def wants_last(config: MergeConfig) -> bool:
    """Whether the state that a merge ends with is wanted on disk, whichever it is."""
    return config.keep_states == "last" or config.output_format == "adapter"


def states_to_come(config: MergeConfig, num_candidates: int, life: StateLife, done: int) -> int:
    """The most states that have to fit on the disk beside those that are there.

    Args:
        config: The configuration.
        num_candidates: How many candidates there are.
        life: Which states are written.
        done: The last iteration that is finished; 0: none is.
    """
    schedule, evaluation = config.schedule, config.evaluation
    late = int(wants_last(config) and life.last not in life.written and done < life.last)
    to_come = sum(t > done for t in life.written) + late
    # States that wait for their scores stay, and scoring may be slower than merging.
    if config.keep_states == "all" or not (evaluation is None or evaluation.wait):
        return to_come
    most = 0
    for t in range(done, life.last + 1):
        # What the last recovery point needs goes once the next one is whole.
        before = [p for p in (*life.recovery, life.last) if p <= t]
        points = [*before[-1:], *(p for p in life.recovery if p > t)]
        needed = {s for p in points for s in iterations_needed_after(schedule, num_candidates, p)}
        # States are written before older ones go, and ahead of their turn.
        ahead = range(t + 1, t + 2 + config.runtime.lookahead)
        most = max(most, sum(s in ahead or (s <= t and s in needed) for s in life.written))
    best = int(bool(life.written) and (config.selects_by_task or config.compares_losses))
    present = len(iterations_needed_after(schedule, num_candidates, done)) if done else 0
    return max(0, min(to_come, most + best + late - present))


def best_interval(iteration_s: float, write_s: float) -> int:
    """Iterations between recovery points that lose the least time on average (Young, 1974).

    A point every `sqrt(2 write_s M)` seconds, with M seconds between failures: writing more often
    costs more than what a failure loses.

    Args:
        iteration_s: Seconds of an iteration.
        write_s: Seconds to write one recovery point.
    """
    if iteration_s <= 0.0:
        return 1
    return max(1, round(sqrt(2.0 * write_s * SECONDS_BETWEEN_FAILURES) / iteration_s))

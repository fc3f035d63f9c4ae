"""Which states meet in which iteration, by hand and by simulation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from arm_ray.config import ScheduleConfig
from arm_ray.schedule import (
    candidate_name,
    has_converged,
    iteration_of,
    merge_sizes,
    plan_iteration,
    should_stop,
    state_name,
    states_needed_after,
    states_read_after,
    states_run_after,
)

Row = tuple[str, str, tuple[str, ...], int, str]  # regime, reference, contributors, m, previous
ANCHORING, WINDOW = "anchoring", "sliding_window"
C1, C2, C3 = "candidate-1", "candidate-2", "candidate-3"
S1, S2, S3, S4, S5 = (f"state-000{t}" for t in range(1, 6))


def schedule(**settings: Any) -> ScheduleConfig:
    return ScheduleConfig(**settings)


def plans(config: ScheduleConfig, num_candidates: int) -> list[Row]:
    rows = []
    for t in range(1, config.max_iterations + 1):
        plan = plan_iteration(config, num_candidates, t)
        assert (plan.iteration, plan.output) == (t, f"state-{t:04d}")
        assert plan.inputs == (plan.reference, *plan.contributors)
        rows.append((plan.regime, plan.reference, plan.contributors, plan.divisor, plan.previous))
    return rows


def test_anchoring_merges_all_candidates_into_the_state_before() -> None:
    config = schedule(anchor_iterations=3, max_iterations=3)
    assert plans(config, 2) == [
        (ANCHORING, "base", (C1, C2), 2, "base"),
        (ANCHORING, S1, (C1, C2), 2, S1),
        (ANCHORING, S2, (C1, C2), 2, S2),
    ]


def test_a_single_round_is_one_anchored_iteration_with_one_candidate() -> None:
    config = schedule(anchor_iterations=1, max_iterations=1)
    assert plans(config, 1) == [(ANCHORING, "base", (C1,), 1, "base")]


def test_the_hybrid_goes_on_with_the_last_states() -> None:
    assert plans(schedule(), 3) == [
        (ANCHORING, "base", (C1, C2, C3), 3, "base"),
        (ANCHORING, S1, (C1, C2, C3), 3, S1),
        (ANCHORING, S2, (C1, C2, C3), 3, S2),
        (WINDOW, S2, (S3,), 2, S3),
        (WINDOW, S3, (S4,), 2, S4),
        (WINDOW, S4, (S5,), 2, S5),
    ]


def test_a_hybrid_s_window_can_reach_the_initial_state() -> None:
    config = schedule(anchor_iterations=1, max_iterations=3)
    assert plans(config, 2)[1:] == [(WINDOW, "base", (S1,), 2, S1), (WINDOW, S1, (S2,), 2, S2)]
    config = schedule(anchor_iterations=1, max_iterations=2, initial="last_candidate")
    assert plans(config, 2)[1] == (WINDOW, C2, (S1,), 2, S1)


def test_a_window_alone_starts_with_base_and_candidates_in_order() -> None:
    config = schedule(anchor_iterations=0, max_iterations=4)
    assert plans(config, 2) == [
        (WINDOW, C1, (C2,), 2, C2),
        (WINDOW, C2, (S1,), 2, S1),
        (WINDOW, S1, (S2,), 2, S2),
        (WINDOW, S2, (S3,), 2, S3),
    ]


def test_a_wider_window_alone() -> None:
    config = schedule(anchor_iterations=0, max_iterations=4, window_size=3)
    assert plans(config, 2) == [
        (WINDOW, "base", (C1, C2), 3, C2),
        (WINDOW, C1, (C2, S1), 3, S1),
        (WINDOW, C2, (S1, S2), 3, S2),
        (WINDOW, S1, (S2, S3), 3, S3),
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("rule", "less"), [("n", 0), ("n_minus_1", 1)])
def test_window_divisors(size: int, rule: str, less: int) -> None:
    config = schedule(anchor_iterations=3, max_iterations=6, window_size=size, window_divisor=rule)
    rows = plans(config, 5)
    # The divisor of anchored iterations is the number of candidates, whatever the window's is.
    assert [row[3] for row in rows] == [5] * 3 + [size - less] * 3
    assert all(len(row[2]) == size - 1 for row in rows[3:])


def test_starting_from_the_last_candidate_its_own_task_vector_is_zero_but_counts() -> None:
    config = schedule(anchor_iterations=2, max_iterations=2, initial="last_candidate")
    assert plans(config, 3) == [
        (ANCHORING, C3, (C1, C2), 3, C3),
        (ANCHORING, S1, (C1, C2, C3), 3, S1),
    ]


def test_names() -> None:
    assert [candidate_name(0), candidate_name(9)] == ["candidate-1", "candidate-10"]
    assert [state_name(7), state_name(12345)] == ["state-0007", "state-12345"]
    assert [iteration_of(n) for n in ("base", C1, S3, "state-12345")] == [None, None, 3, 12345]


def test_it_stops_when_the_budget_is_spent_or_the_angle_closes() -> None:
    config = schedule(max_iterations=4, tolerance=1e-3)
    assert [should_stop(config, t, 0.5) for t in (1, 3, 4, 5)] == [False, False, True, True]
    assert should_stop(config, 4, None)
    assert not should_stop(config, 3, None)
    assert should_stop(config, 1, 0.9995)


@pytest.mark.parametrize(
    ("cosine", "tolerance", "expected"),
    [
        (0.75, 0.25, True),  # exactly at the tolerance
        (0.7499, 0.25, False),
        (1.0, 1e-4, True),
        (1.0, 0.0, False),  # 0 never stops early
        (-1.0, 0.5, False),
        (None, 0.5, False),
    ],
)
def test_convergence(cosine: float | None, tolerance: float, expected: bool) -> None:
    assert has_converged(schedule(tolerance=tolerance), cosine) is expected


def every_schedule() -> list[tuple[ScheduleConfig, int]]:
    found = []
    for anchored, last, count in itertools.product(range(5), range(1, 8), range(1, 4)):
        start = anchored + 1 if anchored else 1 + count
        for size, initial in itertools.product(range(2, 6), ("base", "last_candidate")):
            window = last > anchored
            if (window and size > start) or (initial != "base" and (not anchored or count == 1)):
                continue
            config = schedule(
                anchor_iterations=anchored, max_iterations=last, window_size=size, initial=initial
            )
            found.append((config, count))
    return found


def test_what_states_needed_after_leaves_is_enough_and_no_more() -> None:
    cases = every_schedule()
    assert len(cases) > 300
    for config, count in cases:
        inputs = {"base", *(candidate_name(i) for i in range(count))}
        rows = [plan_iteration(config, count, t) for t in range(1, config.max_iterations + 1)]
        kept: set[str] = set()
        for plan in rows:
            assert {*plan.inputs, plan.previous} <= kept | inputs, (config, plan)
            made = kept | {plan.output}
            kept = states_needed_after(config, count, plan.iteration)
            assert plan.output in kept, (config, plan)
            assert kept <= made, "a state that is not there any more"
            later = {name for p in rows[plan.iteration :] for name in (*p.inputs, p.previous)}
            assert kept <= later | {plan.output}, (config, plan)


def test_what_later_iterations_read_is_what_the_plans_of_all_of_them_say() -> None:
    for config, count in every_schedule():
        rows = [plan_iteration(config, count, t) for t in range(1, config.max_iterations + 1)]
        for plan in rows:
            there = {"base", *(candidate_name(i) for i in range(count))}
            there |= {state_name(t) for t in range(1, plan.iteration + 1)}
            later = rows[plan.iteration :]
            read = {name for p in later for name in (*p.inputs, p.previous, "base")}
            merged = {name for p in later for name in p.inputs}
            assert states_read_after(config, count, plan.iteration) & there == read & there
            assert states_run_after(config, count, plan.iteration) & there == merged & there


def test_merge_sizes_are_those_of_every_iteration() -> None:
    for config, count in every_schedule():
        plans = [plan_iteration(config, count, t) for t in range(1, config.max_iterations + 1)]
        sizes = {len(p.contributors) + (p.regime == WINDOW) for p in plans}
        assert merge_sizes(config, count) == tuple(sorted(sizes)), config
        assert config.has_window == any(p.regime == WINDOW for p in plans)


def test_starting_from_the_last_candidate_there_is_one_model_less_at_first() -> None:
    config = schedule(anchor_iterations=3, max_iterations=3, initial="last_candidate")
    assert merge_sizes(config, 3) == (2, 3)
    assert merge_sizes(schedule(window_size=4), 2) == (2, 4)


def test_every_plan_has_different_inputs_and_ends_with_the_previous_state() -> None:
    for config, count in every_schedule():
        for t in range(1, config.max_iterations + 1):
            plan = plan_iteration(config, count, t)
            assert plan.contributors
            assert len(set(plan.inputs)) == len(plan.inputs)
            expected = plan.reference if plan.regime == ANCHORING else plan.contributors[-1]
            assert plan.previous == expected

"""pass@k, against counting."""

from __future__ import annotations

from itertools import combinations

import pytest

from arm_ray.evaluation.code.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_it_is_the_share_of_choices_that_hold_one_that_passed(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            choices = list(combinations(range(n), k))
            share = sum(any(i < c for i in choice) for choice in choices) / len(choices)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_1_is_the_share_that_passed() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 1, 5) == 1.0


def test_many_completions_lose_no_precision() -> None:
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6), (0, 0, 1)])
def test_numbers_that_do_not_fit_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)

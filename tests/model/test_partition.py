"""Layer groups are cut into consecutive shards whose largest is as small as can be."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from arm_ray.errors import ConfigError
from arm_ray.model.partition import balanced_partition, choose_num_shards

PROPERTY = settings(deadline=None, max_examples=200, derandomize=True)


@st.composite
def problems(draw: st.DrawFn, longest: int = 60) -> tuple[list[int], int]:
    # Small sizes too: there the best cut is off by one unit, not by millions.
    size = st.integers(0, draw(st.sampled_from([2, 9, 10**12])))
    row = draw(st.lists(size, min_size=1, max_size=longest))
    return row, draw(st.integers(1, len(row)))


def largest(sizes: list[int], shards: list[range]) -> int:
    return max(sum(sizes[i] for i in shard) for shard in shards)


@PROPERTY
@given(problems())
def test_shards_are_consecutive_not_empty_and_cover_all_groups(problem) -> None:
    sizes, num_shards = problem
    shards = balanced_partition(sizes, num_shards)
    assert len(shards) == num_shards
    assert all(len(shard) > 0 for shard in shards)
    assert [i for shard in shards for i in shard] == list(range(len(sizes)))


@PROPERTY
@given(problems(longest=9))
def test_the_largest_shard_is_as_small_as_any_cut_makes_it(problem) -> None:
    sizes, num_shards = problem
    best = min(
        largest(sizes, [range(a, b) for a, b in itertools.pairwise((0, *cuts, len(sizes)))])
        for cuts in itertools.combinations(range(1, len(sizes)), num_shards - 1)
    )
    assert largest(sizes, balanced_partition(sizes, num_shards)) == best


def test_a_large_embedding_and_head_get_fewer_layers_beside_them() -> None:
    assert balanced_partition([50, 10, 10, 10, 10, 10, 50], 3) == [
        range(1),
        range(1, 6),
        range(6, 7),
    ]


def test_equal_groups_are_shared_evenly() -> None:
    assert [len(shard) for shard in balanced_partition([7] * 12, 4)] == [3, 3, 3, 3]


@pytest.mark.parametrize(("count", "num_shards"), [(3, 4), (3, 0), (3, -1), (0, 1)])
def test_a_number_of_shards_that_cannot_be_is_refused(count: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_shards}, expected 1 to {count}"):
        balanced_partition([1] * count, num_shards)


def test_how_many_shards_there_are() -> None:
    assert choose_num_shards("auto", 8, 30) == 8
    assert choose_num_shards("auto", 40, 30) == 30
    # Less than one place, such as half a CPU slot.
    assert choose_num_shards("auto", 0, 30) == 1
    # Places are not looked at: Ray, or the plan, says whether they are there.
    assert choose_num_shards(30, 2, 30) == 30
    with pytest.raises(ConfigError, match="more layer shards than layer groups") as caught:
        choose_num_shards(31, 64, 30)
    assert (caught.value.got, caught.value.expected) == ("31", "at most 30")

"""Layer groups are cut into consecutive shards whose largest is as small as can be."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from arm_ray.errors import ConfigError
from arm_ray.model.partition import (
    balanced_partition,
    call_order,
    choose_num_shards,
    chunks_of,
    looped_partition,
    receivers,
)

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


def test_groups_are_dealt_round() -> None:
    assert looped_partition(7, 3, 1) == [(0, 3, 6), (1, 4), (2, 5)]
    assert looped_partition(7, 3, 2) == [(0, 1, 6), (2, 3), (4, 5)]
    assert looped_partition(3, 3, 1) == [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match="got 3 for 4 groups by 2"):
        looped_partition(4, 3, 2)


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_each_dealt_group_has_one_shard(num_groups: int, num_shards: int, turn: int) -> None:
    if num_shards > -(-num_groups // turn):
        return
    shares = looped_partition(num_groups, num_shards, turn)
    assert sorted(group for share in shares for group in share) == list(range(num_groups))
    # Shards differ by one turn at most.
    sizes = [len(share) for share in shares]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= turn
    for residency in ("device", "host"):
        order = call_order(shares, residency)
        assert [group for _, chunk in order for group in chunk] == list(range(num_groups))
        assert all(set(chunk) <= set(shares[shard]) for shard, chunk in order)
        # Each shard sends to one other, round and round.
        expected = {p: (p + 1) % num_shards for p in range(num_shards)}
        assert receivers(order).items() <= expected.items()


def test_what_runs_at_once() -> None:
    assert chunks_of((0, 1, 4, 5, 6, 9), "device") == [range(2), range(4, 7), range(9, 10)]
    assert chunks_of(range(2, 5), "device") == [range(2, 5)]
    assert chunks_of((0, 1, 4), "disk") == [range(1), range(1, 2), range(4, 5)]
    assert receivers(call_order([(0, 1), (2, 3)], "disk")) == {0: 1}
    assert receivers(call_order([(0, 1)], "disk")) == {}


def test_how_many_shards_there_are() -> None:
    assert choose_num_shards("auto", 8, 30) == 8
    assert choose_num_shards("auto", 40, 30) == 30
    # Less than one place, such as half a CPU slot.
    assert choose_num_shards("auto", 0, 30) == 1
    # Where layers are dealt round, places that would make nothing faster stay free.
    for places, most, count in (
        (32, 48, 24),
        (32, 80, 27),
        (32, 126, 32),
        (8, 48, 8),
        (64, 48, 48),
    ):
        assert choose_num_shards("auto", places, most, is_dealt=True) == count
        assert -(-most // count) == -(-most // min(places, most))
    assert choose_num_shards("auto", 0, 30, is_dealt=True) == 1
    assert choose_num_shards(32, 64, 48, is_dealt=True) == 32
    # Places are not looked at: Ray, or the plan, says whether they are there.
    assert choose_num_shards(30, 2, 30) == 30
    with pytest.raises(ConfigError, match="more layer shards than layer groups") as caught:
        choose_num_shards(31, 64, 30)
    assert (caught.value.got, caught.value.expected) == ("31", "at most 30")

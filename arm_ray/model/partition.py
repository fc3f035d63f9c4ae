"""Layer groups over actors: consecutive, and balanced by bytes. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_partition(sizes: Sequence[int], num_shards: int) -> list[range]:
    """Cut a row of groups into consecutive shards so that the largest shard is smallest.

    Args:
        sizes: Size of each group, in any unit.
        num_shards: How many shards, at most `len(sizes)`.

    Returns:
        One non-empty range of group indices for each shard, in order.

    Raises:
        ValueError: There are fewer groups than shards.
    """
    if not 1 <= num_shards <= len(sizes):
        raise ValueError(f"num_shards: got {num_shards}, expected 1 to {len(sizes)}")
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle, num_shards)) <= num_shards:
            high = middle
        else:
            low = middle + 1
    return _cut(sizes, low, num_shards)


def _cut(sizes: Sequence[int], limit: int, num_shards: int) -> list[range]:
    """Fill shards up to `limit`, but leave at least one group for each shard still to come."""
    shards: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        groups_left, shards_left = len(sizes) - index, num_shards - len(shards) - 1
        if index > start and (total + size > limit or groups_left <= shards_left):
            shards.append(range(start, index))
            start, total = index, 0
        total += size
    return [*shards, range(start, len(sizes))]

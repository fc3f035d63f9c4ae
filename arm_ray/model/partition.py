"""Layer groups over actors: consecutive or dealt in turn, and the order of the work. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal

from arm_ray.errors import ConfigError
from arm_ray.model.layout import ModelLayout

Balance = Literal["bytes", "work"]
Partition = Literal["contiguous", "looped"]
Residency = Literal["device", "host", "disk"]
# The layer groups of one shard, ascending.
Share = tuple[int, ...]
# A tensor outside of the linear modules is read, added up and written; one inside is also run over
# the samples of every state, and rotated. Measured on SmolLM2-135M, two candidates, 64 samples.
_WORK_OUTSIDE = 0.1


def choose_balance(setting: Literal["auto", "bytes", "work"], *, on_gpu: bool) -> Balance:
    """What shards are balanced by: on GPUs memory is what runs short, on CPUs it is time."""
    if setting == "auto":
        return "bytes" if on_gpu else "work"
    return setting


def choose_num_shards(
    wanted: Literal["auto"] | int, num_places: int, most: int, *, is_dealt: bool = False
) -> int:
    """How many shards there are.

    Args:
        wanted: `runtime.layer_shards`.
        num_places: Shards that the GPUs or CPU slots hold, which `auto` takes.
        most: How many the layer groups are enough for.
        is_dealt: Whether layers are dealt round, so that `auto` need not take places that only make
            some shards smaller: of 48 groups on 32 places, 16 shards would have two groups and 16
            one, and 24 shards of two groups are as fast.

    Raises:
        ConfigError: More shards are wanted than there are layer groups.
    """
    if wanted == "auto":
        count = max(1, min(num_places, most))
        turns = -(-most // count)
        return -(-most // turns) if is_dealt else count
    if wanted > most:
        raise ConfigError(
            "there are more layer shards than layer groups",
            where="runtime.layer_shards",
            got=wanted,
            expected=f"at most {most}",
            hint="use fewer shards, or a smaller runtime.layers_per_group or, where layers are "
            "dealt round, runtime.groups_per_turn",
        )
    return wanted


def partition_layers(
    layout: ModelLayout,
    num_shards: int,
    balance: Balance,
    *,
    needs_forward: bool,
    partition: Partition = "contiguous",
    turn: int = 1,
) -> list[Share]:
    """The layer groups of each shard.

    Args:
        layout: The model.
        num_shards: How many shards.
        balance: What the largest shard has as little of as can be, where shards are contiguous.
        needs_forward: Whether states are run; without that, bytes are work.
        partition: `contiguous`, or `looped`: see `looped_partition`.
        turn: Groups that a shard is dealt at a time, where they are dealt.

    Raises:
        ValueError: There are fewer groups, or turns, than shards.
    """
    if partition == "looped":
        return looped_partition(len(layout.groups), num_shards, turn)
    return [tuple(share) for share in _contiguous(layout, num_shards, balance, needs_forward)]


def _contiguous(
    layout: ModelLayout, num_shards: int, balance: Balance, needs_forward: bool
) -> list[range]:
    if balance == "bytes" or not needs_forward:
        return balanced_partition([group.num_bytes for group in layout.groups], num_shards)
    work = [
        round(
            sum(
                prod(layout.shapes[name]) * (1.0 if name in layout.rotated else _WORK_OUTSIDE)
                for name in group.tensors
            )
        )
        for group in layout.groups
    ]
    return balanced_partition(work, num_shards)


def looped_partition(num_groups: int, num_shards: int, turn: int) -> list[Share]:
    """Deal the groups round: shard p gets turn p, p + P, p + 2 P and so on of `turn` groups each.

    The first hidden states then leave a shard after one turn, and not after all its layers.

    Raises:
        ValueError: A shard would get none.
    """
    if num_shards > -(-num_groups // turn):
        raise ValueError(f"num_shards: got {num_shards} for {num_groups} groups by {turn}")
    return [
        tuple(group for group in range(num_groups) if group // turn % num_shards == shard)
        for shard in range(num_shards)
    ]


def chunks_of(share: Sequence[int], residency: Residency) -> list[range]:
    """Groups that run one after another on a micro-batch before the next micro-batch comes.

    On the device these are all that follow each other in the model. Elsewhere one at a time: it is
    released before the next.
    """
    if residency != "device":
        return [range(group, group + 1) for group in share]
    starts = [g for g in share if g - 1 not in share]
    ends = [g + 1 for g in share if g + 1 not in share]
    return [range(*pair) for pair in zip(starts, ends, strict=True)]


def call_order(shares: Sequence[Sequence[int]], residency: Residency) -> list[tuple[int, range]]:
    """All chunks in the order of the layers, each with the number of its shard.

    It is the order in which the driver submits calls, and the simulator takes them.
    """
    chunks = ((shard, chunk) for shard, share in enumerate(shares)
              for chunk in chunks_of(share, residency))  # fmt: skip
    return sorted(chunks, key=lambda pair: pair[1].start)


def receivers(order: Sequence[tuple[int, range]]) -> dict[int, int]:
    """Shard -> the one that it sends hidden states to; those that send none are left out."""
    return {before: after for (before, _), (after, _) in pairwise(order) if before != after}


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

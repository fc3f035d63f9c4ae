"""Layer groups over actors: consecutive, and balanced by bytes or by work. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from arm_ray.errors import ConfigError
from arm_ray.model.layout import ModelLayout

Balance = Literal["bytes", "work"]
# A tensor outside of the linear modules is read, added up and written; one inside is also run over
# the samples of every state, and rotated. Measured on SmolLM2-135M, two candidates, 64 samples.
_WORK_OUTSIDE = 0.1


def choose_balance(setting: Literal["auto", "bytes", "work"], *, on_gpu: bool) -> Balance:
    """What shards are balanced by: on GPUs memory is what runs short, on CPUs it is time."""
    if setting == "auto":
        return "bytes" if on_gpu else "work"
    return setting


def choose_num_shards(wanted: Literal["auto"] | int, num_places: int, num_groups: int) -> int:
    """How many shards there are.

    Args:
        wanted: `runtime.layer_shards`.
        num_places: Shards that the GPUs or CPU slots hold, which `auto` takes.
        num_groups: Layer groups, the most shards that there can be.

    Raises:
        ConfigError: More shards are wanted than there are layer groups.
    """
    if wanted == "auto":
        return max(1, min(num_places, num_groups))
    if wanted > num_groups:
        raise ConfigError(
            "there are more layer shards than layer groups",
            where="runtime.layer_shards",
            got=wanted,
            expected=f"at most {num_groups}",
            hint="use fewer shards, or a smaller runtime.layers_per_group",
        )
    return wanted


def partition_layers(
    layout: ModelLayout, num_shards: int, balance: Balance, *, needs_forward: bool
) -> list[range]:
    """The layer groups of each shard.

    Args:
        layout: The model.
        num_shards: How many shards.
        balance: What the largest shard has as little of as can be.
        needs_forward: Whether states are run; without that, bytes are work.
    """
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

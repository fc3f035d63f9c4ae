"""Which checkpoint is merged next, with which others, and what may go. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from arm_ray.following.config import MeetingConfig
from arm_ray.following.journal import Arrival


@dataclass(frozen=True)
class Choice:
    """What to do with the checkpoints that wait.

    Attributes:
        step: The one to merge; None: wait for more.
        members: The ones that meet, by step, the new one last.
        skipped: Older ones that are left out, because merging is slower than training.
    """

    step: int | None
    members: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()


def choose(
    merge: MeetingConfig, taken: Collection[int], waiting: Sequence[int], in_order: Collection[int]
) -> Choice:
    """Say which checkpoint is merged next.

    Args:
        merge: The settings.
        taken: Steps of all snapshots that are there.
        waiting: Steps that are not merged yet, ascending.
        in_order: Those of them that are merged one after another whatever happens; of the others
            the newest is taken.
    """
    steps = sorted(taken)
    backlog = [step for step in waiting if step in in_order]
    # What was there at the start comes first.
    newest = [step for step in waiting if step not in in_order]
    order = [*backlog, *newest[-1:]]
    skipped = tuple(newest[:-1]) if not backlog else ()
    for step in order:
        members = members_of(merge, [s for s in steps if s <= step])
        if members:
            return Choice(step, members, skipped)
        if step in newest:
            # Too few to merge: it will be a member, not an arrival.
            return Choice(None)
    return Choice(None)


def members_of(merge: MeetingConfig, steps: Sequence[int]) -> tuple[int, ...]:
    """Steps of the checkpoints that meet at the newest of some; empty where they are too few."""
    count = merge.candidates
    if merge.streaming == "window":
        # The others of the window are merged states, or the base.
        return tuple(steps[-1:])
    if len(steps) < count:
        return ()
    if merge.mode == "anchored":
        return (*steps[: count - 1], steps[-1])
    return tuple(steps[-count:])


def continued(merge: MeetingConfig, published: Sequence[Arrival]) -> Sequence[Arrival]:
    """Of the published arrivals, in order, those whose merged states the next one goes on from."""
    count = {"none": 0, "anchor": 1, "window": merge.candidates - 1}[merge.streaming]
    return published[max(0, len(published) - count) :]


def still_needed(
    merge: MeetingConfig, taken: Collection[int], waiting: Collection[int]
) -> set[int]:
    """Steps whose snapshots later arrivals may need."""
    steps = sorted(taken)
    keep = set(waiting)
    if merge.streaming == "window":
        return keep | set(steps[-1:])
    if merge.mode == "anchored":
        return keep | set(steps[: merge.candidates - 1]) | set(steps[-1:])
    # Those that the waiting ones meet, and the newest, for the next one.
    for step in [*waiting, *steps[-1:]]:
        before = [s for s in steps if s <= step]
        keep |= set(before[-merge.candidates :])
    return keep

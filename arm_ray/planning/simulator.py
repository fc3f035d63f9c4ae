"""How the driver's schedule fills the actors: a simulation of the wavefront. Pure.

The order of calls is that of `merge.dispatch.Dispatcher.submit`. An actor takes its calls in the
order they were submitted: iteration after iteration; of an iteration, chunk after chunk of its
layers; of a chunk, the forward calls of all micro-batches and states, and then the merges. A
chunk's forward waits for the hidden states of the chunk before, which is perhaps another shard's.
An iteration is submitted once at most `lookahead` earlier ones are unfinished. So every start
depends on earlier ends alone, and one pass in that order gives all times; no event queue is needed.

What is written of a merged state is written beside the work, one chunk after another; a merge that
takes the place of an older state waits until that is on disk, and until it is known that the merge
does not end with it (`MadeStates.release`).

From a shard to the one that it sends to there is one link, which sends one hidden state at a time
while both actors compute. Times are in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkTimes:
    """Layers that run together.

    Attributes:
        forward_s: Seconds of one forward call.
        merge_s: Of all merges after these.
        write_s: Of writing what was merged, beside all other work.
    """

    forward_s: float
    merge_s: float
    write_s: float = 0.0


@dataclass(frozen=True)
class ShardTimes:
    """One shard in one iteration.

    Attributes:
        chunks: In the order of the layers.
        send_s: Seconds to send one hidden state to the shard that has the next layers.
    """

    chunks: tuple[ChunkTimes, ...]
    send_s: float = 0.0

    def busy_s(self, calls: int) -> float:
        """Seconds of work in an iteration of so many forward calls for each chunk."""
        return sum(calls * chunk.forward_s + chunk.merge_s for chunk in self.chunks)


@dataclass(frozen=True)
class IterationTimes:
    """One iteration.

    Attributes:
        calls: Forward calls for each chunk: micro-batches times input states.
        shards: All of them.
        order: Of each chunk in the order of the layers, whose it is; empty: shard after shard.
        replaces: Earlier iterations, counted from 0, whose states this one's merges let go of.
        may_end_early: Whether the merge may end with one of these, which only its own end tells.
    """

    calls: int
    shards: tuple[ShardTimes, ...]
    order: tuple[int, ...] = ()
    replaces: tuple[int, ...] = ()
    may_end_early: bool = False

    @property
    def owners(self) -> tuple[int, ...]:
        """`order`, written out."""
        return self.order or tuple(p for p, shard in enumerate(self.shards) for _ in shard.chunks)


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        makespan_s: From the first call to the end of the last merge, and of all writing.
        finished_s: When each iteration was finished on all shards.
        busy_s: Seconds each actor worked.
        utilisation: `busy_s / makespan_s` of each actor.
        efficiency: Speed-up over one actor that does all the work, divided by the actors.
        most_waiting: For each actor, the most hidden states that had arrived and were not taken.
    """

    makespan_s: float
    finished_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    utilisation: tuple[float, ...]
    efficiency: float
    most_waiting: tuple[int, ...]


def simulate(iterations: Sequence[IterationTimes], lookahead: int) -> Simulation:
    """Run a schedule.

    Args:
        iterations: In order; all with the same number of shards.
        lookahead: `runtime.lookahead`.

    Raises:
        ValueError: There is no iteration or no shard, their numbers differ, or the order does not
            have all chunks of all shards.
    """
    counts = {len(iteration.shards) for iteration in iterations}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"iterations: got {sorted(counts)} shards, expected the same in each")
    actors = counts.pop()
    free = [0.0] * actors
    link_free = [0.0] * actors
    most_waiting = [0] * actors
    queues: list[list[tuple[float, float]]] = [[] for _ in range(actors)]
    disk_free = [0.0] * actors
    on_disk: dict[tuple[int, int], float] = {}
    finished: list[float] = []
    for t, iteration in enumerate(iterations):
        submitted = finished[t - lookahead - 1] if t > lookahead else 0.0
        arrivals = [submitted] * iteration.calls
        end = submitted
        before: int | None = None
        for position, (p, chunk) in enumerate(_chunks(iteration)):
            if before is not None and before != p:
                send_s = iteration.shards[before].send_s
                arrivals, link_free[before] = _send(arrivals, send_s, link_free[before])
            starts, ends, free[p] = _run(chunk, arrivals, max(free[p], submitted))
            freed = [on_disk.get((earlier, position), 0.0) for earlier in iteration.replaces]
            if iteration.may_end_early:
                freed += [finished[earlier] for earlier in iteration.replaces]
            free[p] = max([free[p] + chunk.merge_s, *freed])
            if chunk.write_s:
                disk_free[p] = max(free[p], disk_free[p]) + chunk.write_s
                on_disk[t, position] = disk_free[p]
            if before is not None and before != p:
                queues[p] += zip(arrivals, starts, strict=True)
            arrivals, before = ends, p
            end = max(end, free[p])
        finished.append(end)
    for p in range(actors):
        most_waiting[p] = _most_at_once(queues[p])
    busy = [sum(i.shards[p].busy_s(i.calls) for i in iterations) for p in range(actors)]
    makespan = max(finished[-1], *disk_free)
    used = [b / makespan if makespan else 1.0 for b in busy]
    efficiency = sum(used) / actors
    return Simulation(
        makespan, tuple(finished), tuple(busy), tuple(used), efficiency, tuple(most_waiting)
    )


def _chunks(iteration: IterationTimes) -> Iterator[tuple[int, ChunkTimes]]:
    """All chunks in the order of the layers, each with the number of its shard."""
    owners = iteration.owners
    if Counter(owners) != {p: len(shard.chunks) for p, shard in enumerate(iteration.shards)}:
        raise ValueError(f"order: got {owners}, expected every chunk of every shard once")
    chunks = [iter(shard.chunks) for shard in iteration.shards]
    for p in owners:
        yield p, next(chunks[p])


def _run(
    chunk: ChunkTimes, arrivals: Sequence[float], now: float
) -> tuple[list[float], list[float], float]:
    """Starts and ends of a chunk's calls, and when the last of them is over."""
    starts, ends = [], []
    for arrival in arrivals:
        now = max(now, arrival)
        starts.append(now)
        now += chunk.forward_s
        ends.append(now)
    return starts, ends, now


def _send(ends: Sequence[float], send_s: float, free: float) -> tuple[list[float], float]:
    """When each hidden state is there, and when the link is free again."""
    arrivals = []
    for end in ends:
        free = max(free, end) + send_s
        arrivals.append(free)
    return arrivals, free


def _most_at_once(stays: Sequence[tuple[float, float]]) -> int:
    """The most of these intervals that overlap; one that is taken as it arrives does not wait."""
    changes = [(time, step) for a, b in stays if b > a for time, step in ((a, 1), (b, -1))]
    most = now = 0
    for _, step in sorted(changes):
        now += step
        most = max(most, now)
    return most

"""How the driver's schedule fills the actors: a simulation of the wavefront. Pure.

The order of calls is that of `merge.dispatch.Dispatcher.submit`. An actor takes its calls in the
order they were submitted: iteration after iteration; of an iteration, chunk after chunk of its
layers; of a chunk, the forward calls of all micro-batches and states, and then the merges. The
first chunk's forward waits for the hidden states of the shard before. An iteration is submitted
once at most `lookahead` earlier ones are unfinished. So every start depends on earlier ends alone,
and one pass in that order gives all times; no event queue is needed.

Between neighbours there is one link, which sends one hidden state at a time while both actors
compute. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkTimes:
    """Layers that run together: seconds of one forward call, and of all merges after these."""

    forward_s: float
    merge_s: float


@dataclass(frozen=True)
class ShardTimes:
    """One shard in one iteration.

    Attributes:
        chunks: In the order of the layers.
        send_s: Seconds to send one hidden state to the next shard.
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
        shards: In the order of the layers.
    """

    calls: int
    shards: tuple[ShardTimes, ...]


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        makespan_s: From the first call to the end of the last merge.
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
        ValueError: There is no iteration or no shard, or their numbers differ.
    """
    counts = {len(iteration.shards) for iteration in iterations}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"iterations: got {sorted(counts)} shards, expected the same in each")
    actors = counts.pop()
    free = [0.0] * actors
    link_free = [0.0] * actors
    most_waiting = [0] * actors
    queues: list[list[tuple[float, float]]] = [[] for _ in range(actors)]
    finished: list[float] = []
    for t, iteration in enumerate(iterations):
        submitted = finished[t - lookahead - 1] if t > lookahead else 0.0
        arrivals = [submitted] * iteration.calls
        end = submitted
        for p, shard in enumerate(iteration.shards):
            ends, starts, free[p] = _run_shard(shard, arrivals, max(free[p], submitted))
            if p:
                queues[p] += zip(arrivals, starts, strict=True)
            arrivals, link_free[p] = _send(ends, shard.send_s, link_free[p])
            end = max(end, free[p])
        finished.append(end)
    for p in range(1, actors):
        most_waiting[p] = _most_at_once(queues[p])
    busy = [sum(i.shards[p].busy_s(i.calls) for i in iterations) for p in range(actors)]
    makespan = finished[-1]
    used = [b / makespan if makespan else 1.0 for b in busy]
    efficiency = sum(used) / actors
    return Simulation(
        makespan, tuple(finished), tuple(busy), tuple(used), efficiency, tuple(most_waiting)
    )


def _run_shard(
    shard: ShardTimes, arrivals: Sequence[float], now: float
) -> tuple[list[float], list[float], float]:
    """Ends of the last chunk's calls, starts of the first chunk's, and when the actor is free."""
    starts: list[float] = []
    ends: list[float] = []
    for position, chunk in enumerate(shard.chunks):
        ends = []
        for arrival in arrivals:
            if position == 0:
                now = max(now, arrival)
                starts.append(now)
            now += chunk.forward_s
            ends.append(now)
        now += chunk.merge_s
    return ends, starts, now


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

"""The checkpoints of a followed run that are held, and which of them is merged next."""

from __future__ import annotations

from collections.abc import Mapping

from arm_ray.errors import CorruptCheckpointError
from arm_ray.following.arrivals import choose, continued, members_of, still_needed
from arm_ray.following.config import AttachConfig
from arm_ray.following.events import CheckpointsSkipped, CheckpointTaken
from arm_ray.following.journal import Arrival, Journal
from arm_ray.following.snapshots import Snapshot, changed, remove, snapshots
from arm_ray.runtime.attach.follower import Follower
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.schedule import candidate_name


class HeldCheckpoints:
    """Snapshots of the run's checkpoints, and what the journal says of them.

    Args:
        config: The configuration.
        journal: Of what was taken and merged.
        reporter: Told what is taken, and what is left out.

    Attributes:
        directory: Where the snapshots are.
    """

    def __init__(self, config: AttachConfig, journal: Journal, reporter: Reporter) -> None:
        self._config, self._journal, self._reporter = config, journal, reporter
        self.directory = config.work / "checkpoints"
        self._snapshots: dict[int, Snapshot] = {}
        self._has_said_waiting: set[int] = set()
        # Those of an earlier session.
        for found in snapshots(self.directory):
            self._replace(found)
            journal.taken.setdefault(found.step, found.version)

    def get(self, step: int) -> Snapshot | None:
        """The snapshot of a step; None where it is held no more."""
        return self._snapshots.get(step)

    @property
    def by_name(self) -> Mapping[str, Snapshot]:
        """Directory name -> snapshot, of all that are held."""
        return {snapshot.path.name: snapshot for snapshot in self._snapshots.values()}

    def drop(self, step: int) -> None:
        """Let go of a step that is broken."""
        if step in self._snapshots:
            remove(self._snapshots.pop(step))

    def first_step(self, complete: list[int]) -> int:
        """The first step that is taken, given those that are complete at the start."""
        start, journal = self._config.run.start, self._journal
        if journal.taken:
            # Going on: what came before the first one was not wanted then either.
            return min(journal.taken)
        if start == "latest":
            count = 1 if self._config.merge.streaming == "window" else self._config.merge.candidates
            return min(complete[-count:], default=0)
        return 0 if start == "all" else start

    def collect(self, follower: Follower) -> None:
        """Write down what the follower has taken."""
        journal, start = self._journal, self._config.run.start
        is_new_run = not journal.taken
        taken = follower.drain()
        for item in taken:
            found = item.snapshot
            if found.step in journal.taken and journal.taken[found.step] != found.version:
                self._reporter.say(f"step {found.step}: the trainer has written it again")
                journal.skipped = [step for step in journal.skipped if step != found.step]
            journal.taken[found.step] = found.version
            self._replace(found)
            self._reporter.write(
                CheckpointTaken(found.step, str(found.source), found.linked, found.num_bytes)
            )
            how = "linked" if found.linked else "copied"
            self._reporter.say(
                f"step {found.step}: complete, {how} ({found.num_bytes / 1e9:.2f} GB)"
            )
            if item.was_there and is_new_run and start != "latest":
                journal.in_order.append(found.step)
        if taken and is_new_run and start == "latest":
            # The others are there to meet the newest.
            journal.skipped += [item.snapshot.step for item in taken if item.was_there][:-1]
        if taken:
            journal.save()

    def _replace(self, found: Snapshot) -> None:
        """Hold a snapshot, and let go of an older one of its step."""
        old = self._snapshots.get(found.step)
        self._snapshots[found.step] = found
        if old is not None and old.path != found.path:
            remove(old)

    def _waiting(self) -> list[int]:
        journal, every = self._journal, self._config.merge.every
        done = {(a.step, a.version) for a in journal.arrivals if a.outcome != "repeated"}
        return sorted(
            step
            for position, (step, version) in enumerate(journal.taken.items())
            if (position + 1) % every == 0
            and self._has_company(step)
            and step in self._snapshots
            and (step, version) not in done
            and step not in journal.skipped
            and not journal.is_broken(step)
        )

    def _has_company(self, step: int) -> bool:
        """Whether as many checkpoints as meet came up to this one; else it will but be a member."""
        journal = self._journal
        steps = sorted(s for s in journal.taken if s <= step and not journal.is_broken(s))
        return bool(members_of(self._config.merge, steps))

    def next_arrival(self) -> Arrival | None:
        """The arrival to process now, written down as begun."""
        journal, merge_settings = self._journal, self._config.merge
        waiting = self._waiting()
        choice = choose(merge_settings, self._snapshots, waiting, journal.in_order)
        if choice.skipped:
            steps = ", ".join(map(str, choice.skipped))
            self._reporter.say(
                f"checkpoints arrive faster than they are merged: going on with step "
                f"{choice.step}, without merges at {steps}"
            )
            assert choice.step is not None
            self._reporter.write(CheckpointsSkipped(choice.skipped, choice.step))
            journal.skipped += choice.skipped
            journal.save()
        if choice.step is None:
            if waiting and waiting[-1] not in self._has_said_waiting:
                self._has_said_waiting.add(waiting[-1])
                self._reporter.say(
                    f"step {waiting[-1]}: the checkpoints that it would meet are gone; it waits "
                    f"for the next one"
                )
            return None
        published = journal.published
        before = continued(merge_settings, published)
        arrival = Arrival(
            len(journal.arrivals) + 1,
            choice.step,
            journal.taken[choice.step],
            tuple(self._snapshots[step].path.name for step in choice.members),
            tuple(earlier.number for earlier in before),
            len(published) + 1,
        )
        journal.begin(arrival)
        return arrival

    def check_unchanged(self, arrival: Arrival) -> None:
        """Look whether the trainer has written into files that it shares with our links.

        Raises:
            CorruptCheckpointError: It has, and what was merged may be of two steps.
        """
        by_name = self.by_name
        for index, name in enumerate(arrival.members):
            problem = changed(by_name[name])
            if problem is not None:
                raise CorruptCheckpointError(
                    f"{candidate_name(index)} was written to after it was taken",
                    where=by_name[name].source,
                    got=problem,
                    expected="the files that were there then",
                    hint="the trainer writes into its files in place; the checkpoint is taken "
                    "again when it is complete",
                )

    def prune(self) -> None:
        """Let go of snapshots that no later arrival needs."""
        keep = still_needed(self._config.merge, self._snapshots, self._waiting())
        for step in [step for step in self._snapshots if step not in keep]:
            remove(self._snapshots.pop(step))

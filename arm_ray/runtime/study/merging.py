"""Does the merges of a study, one after another or several at once.

Several merges run in threads of the driver: nearly all of a merge's work is in its actors, and Ray,
the run directories and the claims on them may be used from several threads. (A merge within a Ray
task would lie on whichever node the task is, and be lost with it.) Each is told that the others'
shares of the cluster are taken, so that none waits for another's actors, and writes its lines into
a file of its own, because a console has one bar.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import ray
from rich.console import Console

from arm_ray.errors import ArmRayError
from arm_ray.events import read_events
from arm_ray.runtime.cluster.joining import ray_session
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.progress import duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.study.events import CellFinished
from arm_ray.study.parts import Merge
from arm_ray.study.records import CELL_NAME, CellRecord, cost_of, write_record

LOG_NAME = "log.txt"
_POLL_S = 1.0


class Merging:
    """Does merges, and writes down what became of each.

    Args:
        parallel: How many at once.
        address: Address of a Ray cluster, as for `merge`.
        slots: CPU slots of a Ray that is started here.
        reporter: Told about each merge.
        total: Merges that there are to do in all, for the time that is left.
    """

    def __init__(
        self, parallel: int, address: str | None, slots: int, reporter: Reporter, total: int
    ) -> None:
        self._parallel, self._address, self._slots = parallel, address, slots
        self._reporter, self._total = reporter, total
        self._seconds: list[float] = []

    def run(self, merges: Sequence[Merge]) -> dict[str, CellRecord]:
        """Do merges; one that fails keeps no other from being done.

        Returns:
            Merge -> its record, which is written down as well.
        """
        if self._parallel == 1 or len(merges) < 2:
            return {m.name: self._one(m, self._reporter.console, None) for m in merges}
        about = {"job": "study"}
        with (
            heartbeat(self._reporter.console),
            activity(f"merging {len(merges)} cells"),
            ray_session(self._address, self._slots, about),
        ):
            # The others' shares; it counts for what the cluster is at the begin.
            share = 1.0 - 1.0 / self._parallel
            resources = ray.cluster_resources()
            taken = {name: share * resources.get(name, 0.0) for name in ("CPU", "GPU")}
            return self._at_once(merges, taken)

    def _at_once(
        self, merges: Sequence[Merge], taken: Mapping[str, float]
    ) -> dict[str, CellRecord]:
        waiting: queue.SimpleQueue[Merge] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, CellRecord]] = queue.SimpleQueue()
        for given in merges:
            waiting.put(given)
        is_over = threading.Event()

        def work() -> None:
            while not is_over.is_set():
                try:
                    given = waiting.get_nowait()
                except queue.Empty:
                    return
                given.directory.mkdir(parents=True, exist_ok=True)
                with (given.directory / LOG_NAME).open("a", encoding="utf-8") as file:
                    console = Console(file=file, width=100)
                    done.put((given.name, self._one(given, console, taken, is_over)))

        # As daemons they keep no interrupted study from ending: what a merge leaves when it is
        # killed is what it goes on from.
        threads = [
            threading.Thread(target=work, name=f"merging-{i}", daemon=True)
            for i in range(min(self._parallel, len(merges)))
        ]
        for thread in threads:
            thread.start()
        records: dict[str, CellRecord] = {}
        try:
            while len(records) < len(merges):
                try:
                    name, record = done.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                records[name] = record
        finally:
            is_over.set()
        return records

    def _one(
        self,
        given: Merge,
        console: Console,
        reserved: Mapping[str, float] | None,
        is_over: threading.Event | None = None,
    ) -> CellRecord:
        started = time.monotonic()
        given.directory.mkdir(parents=True, exist_ok=True)
        try:
            merge(given.config, address=self._address, console=console, reserved=reserved)
            cost = cost_of(read_events(Path(given.config.output) / "events.jsonl"))
            record = CellRecord("merged", given.digest, None, asdict(cost))
        except Exception as error:  # of whatever kind: the other cells are done all the same
            record = CellRecord("failed", given.digest, error_text(error))
        if is_over is not None and is_over.is_set():
            # The study was interrupted, and Ray may have been taken away from it.
            return record
        write_record(given.directory / CELL_NAME, record)
        self._tell(given, record, time.monotonic() - started)
        return record

    def _tell(self, given: Merge, record: CellRecord, seconds: float) -> None:
        self._seconds.append(seconds)
        done, left = len(self._seconds), self._total - len(self._seconds)
        mean = sum(self._seconds) / done
        eta = f", about {duration(mean * left / self._parallel)} to go" if left > 0 else ""
        self._reporter.write(
            CellFinished(
                given.name,
                record.state,
                round(seconds, 3),
                tuple(map(str, given.cells)),
                record.error,
            )
        )
        if record.state == "failed":
            self._reporter.warn(f"cell {given.name} failed: {record.error}")
        self._reporter.say(
            f"== merge {done}/{self._total} {given.name}: {record.state} after "
            f"{duration(seconds)}{eta}"
        )


def error_text(error: Exception) -> str:
    """An error of any kind as a text to keep."""
    return str(error) if isinstance(error, ArmRayError) else f"{type(error).__name__}: {error}"

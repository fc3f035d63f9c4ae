"""Does the merges of a study, one after another or several at once.

Several run as processes of their own on this machine, which join the study's Ray: what a merge does
in the driver's process (imports, the Ray client, torch's settings, being interrupted) is made for
one at a time. A Ray task would be on whichever node Ray chose, and the run directory with it. Each
is told that the others' shares of the cluster are taken, so that none waits for another's actors,
and writes its lines into a file of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import arm_ray
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.events import read_events
from arm_ray.runtime.cluster.joining import ray_session
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.progress import duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.study import cell
from arm_ray.study.events import CellFinished
from arm_ray.study.parts import Merge
from arm_ray.study.records import CELL_NAME, CellRecord, cost_of, write_record

LOG_NAME = "log.txt"
_POLL_S = 0.5
# How long merges may take to end when the study is interrupted.
_END_S = 30.0


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
            return {given.name: self._one(given) for given in merges}
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
        address = self._address or os.environ.get("RAY_ADDRESS")
        address = address or str(ray.get_runtime_context().gcs_address)
        waiting, running = deque(merges), list[_Running]()
        records: dict[str, CellRecord] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._parallel:
                    running.append(_start(waiting.popleft(), address, taken))
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    seconds = time.monotonic() - entry.started
                    records[entry.merge.name] = self._keep(entry.merge, entry.error(), seconds)
                time.sleep(_POLL_S)
        finally:
            _end(running)
        return records

    def _one(self, given: Merge) -> CellRecord:
        started = time.monotonic()
        error = None
        try:
            merge(
                given.config,
                address=self._address,
                console=self._reporter.console,
                # That of the study tells of all its merges.
                writes_report=False,
            )
        except Exception as raised:  # of whatever kind: the other cells are done all the same
            error = cell.error_text(raised)
        return self._keep(given, error, time.monotonic() - started)

    def _keep(self, given: Merge, error: str | None, seconds: float) -> CellRecord:
        """Write down what became of a merge."""
        if error is None:
            cost = cost_of(read_events(Path(given.config.output) / "events.jsonl"))
            record = CellRecord("merged", given.digest, None, asdict(cost))
        else:
            record = CellRecord("failed", given.digest, error)
        write_record(given.directory / CELL_NAME, record)
        self._tell(given, record, seconds)
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


@dataclass(frozen=True)
class _Running:
    """A merge in a process of its own."""

    merge: Merge
    process: subprocess.Popen[bytes]
    started: float

    def error(self) -> str | None:
        """What it failed with, once it has ended; None: it did not."""
        if self.process.returncode == 0:
            return None
        known = self.merge.directory / cell.ERROR_NAME
        if known.is_file():
            return known.read_text(encoding="utf-8")
        log = self.merge.directory / LOG_NAME
        return f"the process of the merge ended with {self.process.returncode}; see {log}"


def _start(given: Merge, address: str, taken: Mapping[str, float]) -> _Running:
    directory = given.directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / cell.ERROR_NAME).unlink(missing_ok=True)
    request = {
        "merge": given.config.model_dump(mode="json"),
        "address": address,
        "reserved": dict(taken),
    }
    write_json(directory / cell.REQUEST_NAME, request)
    package = str(Path(arm_ray.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (directory / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 -- this Python, and a path of ours
            [sys.executable, "-m", "arm_ray.runtime.study.cell", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C is for the study, which ends them.
            start_new_session=True,
        )
    return _Running(given, process, time.monotonic())


def _end(running: Sequence[_Running]) -> None:
    """End merges that are at work: what they leave is what they go on from."""
    for entry in running:
        entry.process.terminate()
    deadline = time.monotonic() + _END_S
    for entry in running:
        try:
            entry.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            entry.process.kill()
            entry.process.wait()

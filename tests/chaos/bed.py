"""Runs jobs on a cluster of this machine, and kills what it is told to."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from arm_ray.runtime.scoring.evaluator import ATTEMPTS
from tests.builders.paths import ROOT
from tests.builders.processes import Process
from tests.chaos.jobs import Job
from tests.chaos.nodes import SAYS
from tests.chaos.victims import KINDS, MARK, kill, processes_of

# Longest time in which a job has to tell something, or to end once its cluster is gone. Ray's own
# waits for a lost node or control store are a minute and more.
SILENT_S = 240.0
_POLL_S = 0.05
# After these a driver cannot go on: it has to end, and the next one goes on.
_FATAL = {"control store", "whole cluster", "driver"}
_WORKERS = 2


@dataclass(frozen=True)
class Kill:
    """A kill that is planned.

    Attributes:
        victim: Of which kind.
        after_s: Seconds after the one before; or once there is such a process.
    """

    victim: str
    after_s: float


@dataclass
class Disturbed:
    """What was done to a job, and what became of it.

    Attributes:
        kills: How often processes of each kind were killed.
        runs: Runs that came to their end.
        restarts: How often a driver was started again.
        gave_up: How often it ended because the same evaluator was lost as often as is allowed.
        faults: What must not happen, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    restarts: int = 0
    gave_up: int = 0
    faults: list[str] = field(default_factory=list)


class Bed:
    """A cluster on this machine, with a driver.

    Args:
        root: For its files.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root, self._mark, self._random = root, uuid.uuid4().hex, random.Random(0)
        self._nodes: subprocess.Popen[str] | None = None
        self._driver: subprocess.Popen[bytes] | None = None
        self._address, self._clusters, self._drivers = "", 0, 0

    def __enter__(self) -> Bed:
        self._start_cluster()
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()

    def undisturbed(self, job: Job) -> None:
        """Run a job to its end, without the cluster."""
        self._start_driver(job.undisturbed(), address=None)
        code = self._wait(SILENT_S)
        assert code == 0, self.log

    def disturb(self, job: Job, plan: Sequence[Kill]) -> Disturbed:
        """Run a job again and again until all kills are made and the last run is at its end."""
        expected, done, left = job.result("undisturbed"), Disturbed(), deque(plan)
        while left or not done.runs:
            output = f"{job.name}-{done.runs + 1}"
            command = job.command(output, done.runs + 1)
            self._run(job, output, command, left, done)
            found = job.result(output)
            different = [name for name in expected if found.get(name) != expected[name]]
            if different or found.keys() - expected.keys():
                done.faults.append(f"{output} has other bits: {', '.join(different)}")
            done.runs += 1
            self.say(f"{output}: at its end; {len(left)} kills left")
        return done

    def _run(
        self, job: Job, output: str, command: list[str], left: deque[Kill], done: Disturbed
    ) -> None:
        """One run to its end, with as many kills as there is time for."""
        self._start_driver(command, self._address)
        may_fail, evaluators, since = False, 0, time.monotonic()
        while True:
            code = self._code
            if code == 0:
                return
            if code is not None:
                if not may_fail and evaluators >= ATTEMPTS and "error: an evaluator" in self.log:
                    done.gave_up += 1
                elif not may_fail:
                    done.faults.append(f"{output}: the driver ended with {code}: {self.log}")
                done.restarts += 1
                assert done.restarts < 200, done.faults
                self._start_driver(command, self._address)
                may_fail, evaluators, since = False, 0, time.monotonic()
            quiet = time.monotonic() - max(since, _changed(job.events(output), self._log_path))
            assert quiet < SILENT_S, f"{output} hangs: {self.log}"
            if left and time.monotonic() - since >= left[0].after_s:
                victim = left[0].victim
                if self._kill(victim):
                    left.popleft()
                    done.kills[victim] += 1
                    self.say(f"{output}: killed {victim}; {len(left)} left")
                    may_fail |= victim in _FATAL
                    evaluators += victim in ("evaluator", "grader")
                    self._repair(victim)
                    since = time.monotonic()
            time.sleep(_POLL_S)

    def _kill(self, victim: str) -> bool:
        """Kill a process of a kind; whether there was one."""
        if victim == "driver":
            assert self._driver is not None
            self._driver.kill()
            return True
        if victim == "whole cluster":
            self._kill_all()
            return True
        found = [p for p in processes_of(self._mark) if KINDS[victim](p.command)]
        if found:
            kill(self._random.choice(found))
        return bool(found)

    def _repair(self, victim: str) -> None:
        """Bring back what nobody brings back by itself: nodes, and clusters."""
        if victim == "raylet":
            self._tell("add")
        elif victim == "control store":
            # The driver must notice; nothing it could go on with is left.
            self._wait(SILENT_S)
            self._kill_all()
            self._start_cluster()
        elif victim == "whole cluster":
            self._start_cluster()

    def _start_cluster(self) -> None:
        self._clusters += 1
        folder = self._root / f"cluster{self._clusters}"
        with self._file("cluster.log") as log:
            self._nodes = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nodes", str(folder)],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._address = self._heard()
        for _ in range(_WORKERS):
            self._tell("add")

    def _tell(self, what: str) -> None:
        nodes = self._nodes
        assert nodes is not None
        assert nodes.stdin is not None
        nodes.stdin.write(f"{what}\n")
        nodes.stdin.flush()
        assert self._heard() == "added"

    def _heard(self) -> str:
        """What the cluster's process says next."""
        assert self._nodes is not None
        assert self._nodes.stdout is not None
        others = []
        for line in self._nodes.stdout:
            if line.startswith(SAYS):
                return line.removeprefix(SAYS).strip()
            others.append(line)
        log = (self._root / "cluster.log").read_text(errors="replace")
        raise AssertionError(f"the cluster has ended: {''.join(others)[-1000:]} {log[-2000:]}")

    def _start_driver(self, command: list[str], address: str | None) -> None:
        self._drivers += 1
        with self._file(self._log_path.name) as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.driver", *command],
                cwd=ROOT,
                env=self._environment() | ({} if address is None else {"RAY_ADDRESS": address}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        paths = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        return env | {
            MARK: self._mark,
            "PYTHONPATH": paths,
            # Whoever has lost the control store ends after so long; Ray's default is a minute.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }

    @property
    def _log_path(self) -> Path:
        return self._root / f"driver{self._drivers}.log"

    @property
    def log(self) -> str:
        """The end of what the driver has said."""
        return self._log_path.read_text(errors="replace")[-3000:]

    @property
    def _code(self) -> int | None:
        assert self._driver is not None
        return self._driver.poll()

    def _wait(self, within_s: float) -> int:
        assert self._driver is not None
        return self._driver.wait(timeout=within_s)

    def _file(self, name: str) -> IO[bytes]:
        return (self._root / name).open("ab")

    def _kill_all(self) -> None:
        """Kill everything that this bed has started, and what that has."""
        for _ in range(5):
            # What was being started meanwhile is there the next time.
            found = processes_of(self._mark)
            for process in found:
                kill(process)
            if not found:
                break
            time.sleep(0.2)
        for child in (self._nodes, self._driver):
            if child is not None:
                child.wait(timeout=60)
        for pipe in (self._nodes.stdin, self._nodes.stdout) if self._nodes is not None else ():
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def processes(self) -> list[Process]:
        """Those of this bed that are alive."""
        return processes_of(self._mark)

    def say(self, text: str) -> None:
        """Tell whoever watches; pytest keeps it for failures."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def plan_of(victims: Sequence[str], count: int, rng: random.Random, within_s: float) -> list[Kill]:
    """So many kills, of all kinds about equally often, in random order at random moments."""
    kinds = [victims[i % len(victims)] for i in range(count)]
    rng.shuffle(kinds)
    return [Kill(kind, rng.uniform(0.0, within_s)) for kind in kinds]


def _changed(*paths: Path) -> float:
    """When one of these was last written, on the clock of `time.monotonic`."""
    latest = 0.0
    for path in paths:
        with contextlib.suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest - time.time() + time.monotonic()

"""Graders in processes of their own, with a deadline for each item that is kept from outside.

A formula can keep SymPy busy for hours, take all memory, or hang in C where no signal of Python
arrives. So each grader is a plain child process with limited memory; one that overruns or dies is
killed and replaced, its item counts as wrong in what it had not yet judged, and all others are
graded as if nothing had happened. No threads and no signals here: this works on any thread of any
process, inside of Ray actors too. Imports neither SymPy nor math-verify.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from arm_ray.errors import ConfigError, EvaluationError
from arm_ray.evaluation.grading.extraction import Mode
from arm_ray.secrets import shortened

_MODES: tuple[Mode, ...] = ("strict", "qwen_compat")
_WORKER = "arm_ray.evaluation.grading.worker"
_START_S = 180.0  # importing SymPy takes seconds, on a busy machine or a slow disk many
_SMALLEST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class GradingItem:
    """A completion to grade.

    Attributes:
        completion: The model's whole text.
        gold: The gold answer, as `extraction.gold_answer` returns it.
        benchmark: The benchmark's name, if known.
    """

    completion: str
    gold: str
    benchmark: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the graders say of a completion.

    Attributes:
        strict: Whether it is right by math-verify.
        qwen_compat: Whether it is right by the Qwen2.5-Math toolkit's rules.
        answer: The answer of the strict extraction.
        how: How that was found: ``boxed``, ``phrase``, ``last_number`` or ``none``.
        timed_out: Whether some judgement was cut off by a limit or by the worker's death; it
            then counts as wrong.
    """

    strict: bool
    qwen_compat: bool
    answer: str | None
    how: str
    timed_out: bool


class _Worker:
    """A child process, and the item it works on.

    Attributes:
        item: Index of that item, or ``None``.
        deadline: When it must be done, by ``time.monotonic``.
        known: What it has said of the item so far.
    """

    def __init__(self, limit_s: float, memory_bytes: int) -> None:
        self.item: int | None = None
        self.deadline = 0.0
        self.known: dict[str, Any] = {}
        self._buffer = b""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = [str(os.getpid()), str(memory_bytes), str(limit_s)]
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", _WORKER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            # Ctrl-C at a terminal is the parent's to handle.
            start_new_session=True,
        )

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def give(self, index: int, item: GradingItem, modes: Sequence[Mode], limit_s: float) -> None:
        request = {
            "completion": item.completion,
            "gold": item.gold,
            "benchmark": item.benchmark,
            "modes": list(modes),
        }
        self.item, self.known = index, {}
        self.deadline = time.monotonic() + limit_s
        assert self.process.stdin is not None
        # Where it has ended, reading from it tells.
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def take(self) -> bool:
        """Reads what the worker has written; ``False`` if it has ended."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self.known.update(json.loads(line))
        return bool(data)

    def wait_until_ready(self, until: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while not self.known.get("ready"):
                ready = selector.select(max(0.0, until - time.monotonic()))
                if not ready or not self.take():
                    raise self._failed_to_start(ended=bool(ready))

    def _failed_to_start(self, ended: bool) -> EvaluationError:
        self._errors.seek(0)
        said = shortened(self._errors.read().decode(errors="replace").strip(), 2000)
        return EvaluationError(
            "A grader process did not start.",
            where=f"{sys.executable} -m {_WORKER}",
            got=("it ended" if ended else f"nothing for {_START_S:.0f} s") + f"; it said: {said}",
            expected="a process that imports SymPy and math-verify",
            hint="Install math-verify, and allow graders enough memory.",
        )

    def stop(self) -> None:
        """Ends the process at once; it has nothing to save."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            # What was written to it may have no reader any more.
            with contextlib.suppress(OSError):
                stream.close()
        self._errors.close()


class GraderPool:
    """Grader processes that live until `close`; a context manager.

    Calls from several threads take turns.

    Args:
        workers: How many processes.
        limit_s: Limit for each item in seconds, from handing it over to the last verdict.
        memory_bytes: Limit on the address space of each process.

    Raises:
        ConfigError: If a setting makes no sense.
    """

    def __init__(
        self, workers: int = 1, limit_s: float = 10.0, memory_bytes: int = 2 * 2**30
    ) -> None:
        if workers < 1 or limit_s <= 0 or memory_bytes < _SMALLEST_BYTES:
            raise ConfigError(
                "The grader pool cannot work with these settings.",
                got=f"workers={workers}, limit_s={limit_s}, memory_bytes={memory_bytes}",
                expected=f"workers >= 1, limit_s > 0, memory_bytes >= {_SMALLEST_BYTES}",
            )
        self._count, self._limit_s, self._memory = workers, limit_s, memory_bytes
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes. Further calls do nothing."""
        # A fork has copies of the workers' pipes, but the workers are not its children.
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._stop_all()

    def grade(self, items: Sequence[GradingItem]) -> list[Verdict]:
        """Grades completions in both modes.

        Args:
            items: The completions with their gold answers.

        Returns:
            A verdict for each item, in order.

        Raises:
            EvaluationError: If grader processes cannot be started, or the pool is closed.
        """
        return [
            Verdict(
                strict=known.get("strict", False),
                qwen_compat=known.get("qwen_compat", False),
                answer=known.get("strict_answer"),
                how=known.get("strict_how", "none"),
                timed_out=known.get("timed_out", True),
            )
            for known in self._run(items, _MODES)
        ]

    def verdict(self, item: GradingItem, mode: Mode) -> bool:
        """Grades one completion in one mode.

        Args:
            item: The completion with its gold answer.
            mode: The mode.

        Raises:
            EvaluationError: If a grader process cannot be started, or the pool is closed.
        """
        return bool(self._run([item], (mode,))[0].get(mode, False))

    def _run(self, items: Sequence[GradingItem], modes: Sequence[Mode]) -> list[dict[str, Any]]:
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                raise EvaluationError(
                    "The grader pool is closed, or belongs to the process this one is a fork of.",
                    hint="Make a new pool.",
                )
            try:
                self._start(min(self._count, len(items)))
                return self._distribute(items, modes)
            except BaseException:
                # Interrupted: some worker may still be at an item that nobody waits for.
                self._stop_all()
                raise

    def _start(self, count: int) -> None:
        until = time.monotonic() + _START_S
        new = count - len(self._workers)
        for _ in range(new):
            self._workers.append(_Worker(self._limit_s, self._memory))
        for worker in self._workers[len(self._workers) - max(new, 0) :]:
            worker.wait_until_ready(until)

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _distribute(
        self, items: Sequence[GradingItem], modes: Sequence[Mode]
    ) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{} for _ in items]
        waiting, retried = deque(range(len(items))), set[int]()
        with selectors.DefaultSelector() as selector:
            for worker in list(self._workers):
                self._next(worker, waiting, items, modes, selector)
            while selector.get_map():
                busy = [worker for worker in self._workers if worker.item is not None]
                soonest = min(worker.deadline for worker in busy)
                ready = selector.select(max(0.0, soonest - time.monotonic()))
                heard = [key.fileobj for key, _ in ready]
                for worker in busy:
                    alive = worker.take() if worker in heard else True
                    late = time.monotonic() >= worker.deadline
                    if alive and not late and not worker.known.get("done"):
                        continue
                    selector.unregister(worker)
                    index, known, worker.item = worker.item, worker.known, None
                    assert index is not None
                    if not known.get("done"):
                        worker = self._replace(worker)
                        if "started" not in known and not late and index not in retried:
                            # It died before it had read the item: hardly the item's fault.
                            retried.add(index)
                            waiting.appendleft(index)
                    results[index] = known
                    self._next(worker, waiting, items, modes, selector)
        return results

    def _next(
        self,
        worker: _Worker,
        waiting: deque[int],
        items: Sequence[GradingItem],
        modes: Sequence[Mode],
        selector: selectors.BaseSelector,
    ) -> None:
        """Gives a worker the next item, if there is one."""
        if waiting:
            index = waiting.popleft()
            worker.give(index, items[index], modes, self._limit_s)
            selector.register(worker, selectors.EVENT_READ)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.stop()
        place = self._workers.index(worker)
        self._workers[place] = fresh = _Worker(self._limit_s, self._memory)
        fresh.wait_until_ready(time.monotonic() + _START_S)
        return fresh


def _environment() -> dict[str, str]:
    """The environment of a worker: it must find this very package, and nothing by accident."""
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # A file called sympy.py where the user happens to stand is not SymPy.
        "PYTHONSAFEPATH": "1",
    }


# --- the pool behind `grade` ----------------------------------------------------------------

_shared: GraderPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> GraderPool:
    """A pool of one worker for this process, started when it is first used."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = GraderPool()
            atexit.register(_shared.close)
        return _shared


def _forget_shared_pool() -> None:
    # A fork starts its own, with locks that nobody holds.
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_shared_pool)

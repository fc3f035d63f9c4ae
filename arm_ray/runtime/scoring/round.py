"""The scoring of one model: its chunks go to engines, and their completions to graders."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_ray.errors import EvaluationError, WorkerError
from arm_ray.evaluation.engine import Completion, LoadReport
from arm_ray.evaluation.graders import Graded, Grader, GraderSpec
from arm_ray.evaluation.records import Record, TaskScores, summarise, write_records
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import Task
from arm_ray.runtime.cluster.calls import EVALUATOR, Calls, silent
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.evaluator import (
    ATTEMPTS,
    EngineActor,
    EvaluatorGang,
    begin_grader,
    started,
)
from arm_ray.runtime.scoring.requests import Chunk
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.progress import LINE_INTERVAL_S
from arm_ray.runtime.session.reporter import Reporter

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass
class _Generating:
    """A chunk that an engine works on, since when."""

    engine: int
    chunk: Chunk
    since: float


@dataclass
class _Grading:
    """A chunk that a grader has been given, and since when the grader has given no answer."""

    grader: int
    chunk: Chunk
    completions: list[Completion]
    since: float


@dataclass(frozen=True)
class Evaluators:
    """What the rounds of one evaluation share.

    Attributes:
        settings: Of the evaluation.
        directory: Where results go: `<model>/<task>.json`.
        slots: The engines.
        gang: The graders.
        reporter: Told how far a round is, and where something was started anew.
        calls: How answers are waited for.
    """

    settings: EvaluationSettings
    directory: Path
    slots: Sequence[EngineSlot]
    gang: EvaluatorGang
    reporter: Reporter
    calls: Calls


class Round:
    """Scores one model; see the module.

    Args:
        evaluators: What it works with.
        subject: The model.
        chunks: What is asked of it, of all tasks.
        digests: Task -> digest of what decides its numbers.

    Attributes:
        report: How the weights were loaded, of all engines together; None before that.
    """

    def __init__(
        self,
        evaluators: Evaluators,
        subject: Subject,
        chunks: Sequence[Chunk],
        digests: Mapping[str, str],
    ) -> None:
        self._settings, self._calls = evaluators.settings, evaluators.calls
        self._slots, self._gang = evaluators.slots, evaluators.gang
        self._directory = evaluators.directory / subject.name
        self._reporter = evaluators.reporter.about(subject.name)
        self._subject, self._digests = subject, digests
        self._waiting = deque(chunks)
        self._expected = Counter(chunk.task.name for chunk in chunks)
        self._total = sum(len(chunk.items) for chunk in chunks)
        self._generating: dict[ObjectRef[Any], _Generating] = {}
        self._grading: dict[ObjectRef[Any], _Grading] = {}
        self._records: dict[str, dict[int, list[Record]]] = {}
        self._started = self._last_line = time.monotonic()
        self.report: LoadReport | None = None

    def run(self) -> Iterator[TaskScores]:
        """Work through all chunks; yields each task's numbers when they are complete.

        Raises:
            WorkerError: An engine or a grader was lost several times over the same chunk.
            EvaluationError: Not even a fresh engine takes the weights in.
        """
        while self._waiting or self._generating or self._grading:
            self._calls.check()
            self._hand_out()
            for ref in self._calls.done([*self._generating, *self._grading]):
                take = self._take_completions if ref in self._generating else self._take_verdicts
                task = take(ref)
                if task is not None and len(self._records[task.name]) == self._expected[task.name]:
                    yield self._finish(task)
            self._take_overdue()
            self._tell_progress()

    def _hand_out(self) -> None:
        """Give each idle engine a chunk."""
        busy = {entry.engine for entry in self._generating.values()}
        for index, slot in enumerate(self._slots):
            if index in busy or not self._waiting:
                continue
            chunk = self._waiting.popleft()
            try:
                self._count_load(slot.load(self._subject))
            except WorkerError as error:
                self._retry(index, chunk, error)
                continue
            if chunk.task.kind == "loss":
                ref: ObjectRef[Any] = slot.engine.call(EngineActor.log_likelihoods, chunk.samples)
            else:
                ref = slot.engine.call(EngineActor.generate, chunk.requests)
            self._generating[ref] = _Generating(index, chunk, time.monotonic())

    def _count_load(self, report: LoadReport | None) -> None:
        if report is None:
            return
        if report.fetched_bytes:
            size = f"{report.fetched_bytes / 1e6:,.1f} MB"
            self._reporter.say(f"{size} copied to the node of an engine")
        before = 0 if self.report is None else self.report.fetched_bytes
        self.report = replace(report, fetched_bytes=before + report.fetched_bytes)

    def _retry(self, index: int, chunk: Chunk, error: Exception) -> None:
        """After an engine failed: another one in its place, and the chunk once more."""
        while True:
            chunk.attempts += 1
            if chunk.attempts >= ATTEMPTS:
                raise WorkerError(
                    f"an evaluator failed {chunk.attempts} times over the same prompts",
                    where=f"{self._subject.name}, {chunk.task.name}, chunk {chunk.number}",
                    got=" ".join(str(error).split())[:500],
                    hint="if it ran out of memory, lower evaluation.engine.kv_cache_gb or "
                    "max_num_seqs; what is scored is kept",
                ) from error
            self._reporter.say("an evaluator failed, starting it anew")
            try:
                self._slots[index].restart(self._subject)
                break
            except (EvaluationError, WorkerError) as again:
                error = again
        self._waiting.appendleft(chunk)

    def _take_completions(self, ref: ObjectRef[Any]) -> Task | None:
        """Pass completions on to a grader; returns the task where that was all there was to do."""
        entry = self._generating.pop(ref)
        try:
            output = self._calls.get(ref, EVALUATOR)
        except Exception as error:  # vLLM's own and CUDA's come as they are
            self._retry(entry.engine, entry.chunk, error)
            return None
        if entry.chunk.task.kind == "loss":
            self._keep(entry.chunk, entry.chunk.losses(output, self._subject.name))
            return entry.chunk.task
        self._send_to_grader(entry.chunk, output)
        return None

    def _send_to_grader(self, chunk: Chunk, completions: list[Completion]) -> None:
        task = chunk.task
        spec = GraderSpec(task.name, task.kind, task.grader, task.scorer)
        # Graders take what they are given one after another: the one with the least to do.
        loads = [0] * len(self._gang.graders)
        for entry in self._grading.values():
            loads[entry.grader] += 1
        index = loads.index(min(loads))
        grader = self._gang.graders[index]
        ref = grader.call(Grader.grade, spec, chunk.answers(completions))
        self._grading[ref] = _Grading(index, chunk, completions, time.monotonic())

    def _take_verdicts(self, ref: ObjectRef[Any]) -> Task | None:
        """Keep a chunk's verdicts; returns its task, or None where it has to be graded again."""
        entry = self._grading[ref]
        try:
            verdicts: list[Graded] = self._calls.get(ref, EVALUATOR)
        except WorkerError as error:
            self._regrade(ref, error)
            return None
        del self._grading[ref]
        # The grader is alive, and only now begins with the next that it was given.
        for other in self._grading.values():
            if other.grader == entry.grader:
                other.since = time.monotonic()
        chunk = entry.chunk
        self._keep(chunk, chunk.graded(entry.completions, verdicts, self._subject.name))
        return chunk.task

    def _regrade(self, ref: ObjectRef[Any], error: WorkerError) -> None:
        """After a grader failed: another one in its place, and all that it had once more."""
        entry = self._grading.pop(ref)
        entry.chunk.attempts += 1
        if entry.chunk.attempts >= ATTEMPTS:
            raise error
        self._reporter.say("a grader failed, starting it anew")
        lost = [key for key, other in self._grading.items() if other.grader == entry.grader]
        again = [entry, *(self._grading.pop(key) for key in lost)]
        runs_code, limit = entry.chunk.task.kind == "code", self._settings.engine.timeout_s
        key = "evaluation.engine.timeout_s"
        started(
            lambda: begin_grader(self._gang, entry.grader, runs_code),
            lambda ready: self._calls.answer(ready, EVALUATOR, limit, key),
        )
        for each in again:
            self._send_to_grader(each.chunk, each.completions)

    def _take_overdue(self) -> None:
        """Count evaluators that have been silent for too long as lost."""
        now = time.monotonic()
        limit = self._settings.engine.timeout_s
        for ref, entry in list(self._generating.items()):
            if now - entry.since > limit:
                del self._generating[ref]
                error = silent("an engine", limit, "evaluation.engine.timeout_s")
                self._retry(entry.engine, entry.chunk, error)
        limit = self._settings.grading.timeout_s
        for ref in list(self._grading):
            # Grading one again may take others with it.
            if ref in self._grading and now - self._grading[ref].since > limit:
                self._regrade(ref, silent("a grader", limit, "evaluation.grading.timeout_s"))

    def _keep(self, chunk: Chunk, made: list[Record]) -> None:
        self._records.setdefault(chunk.task.name, {})[chunk.number] = made

    def _finish(self, task: Task) -> TaskScores:
        by_chunk = self._records[task.name]
        rows = [record for number in sorted(by_chunk) for record in by_chunk[number]]
        scores = summarise(
            rows,
            self._settings,
            task=task.name,
            kind=task.kind,
            metrics=task.metrics,
            digest=self._digests[task.name],
            seconds=time.monotonic() - self._started,
        )
        write_records(self._directory, rows, scores)
        return scores

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self._last_line <= LINE_INTERVAL_S:
            return
        self._last_line = now
        done = sum(len(made) for chunks in self._records.values() for made in chunks.values())
        rest = (now - self._started) / max(1, done) * (self._total - done)
        eta = f", about {rest:.0f} s to go" if done else ""
        self._reporter.say(f"{done} of {self._total} completions{eta}")

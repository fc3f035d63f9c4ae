"""The scoring of one model, with evaluators that are plain objects; no Ray."""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arm_ray.errors import EvaluationError, EvaluatorLostError, WorkerError
from arm_ray.evaluation.engine import Canary, Completion, LoadReport, ModelSource
from arm_ray.evaluation.graders import Graded, Grader
from arm_ray.evaluation.records import read_records
from arm_ray.evaluation.settings import (
    EngineSettings,
    EvaluationSettings,
    GradingSettings,
    TaskSettings,
)
from arm_ray.evaluation.tasks import Task, load_tasks
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.calls import EVALUATOR, Callee, Calls
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.evaluator import ATTEMPTS, started
from arm_ray.runtime.scoring.requests import Chunk, Item, chunks_of
from arm_ray.runtime.scoring.round import Evaluators, Round
from arm_ray.runtime.scoring.subject import Subject
from arm_ray.runtime.session.reporter import Reporter

LOST = WorkerError("an evaluator was lost")
REPORT = LoadReport("model", 1.0, Canary((), 0.0))


class Ref:
    """What a call returned: a value, an error, or nothing for ever."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


SILENT = object()
VERDICT = {"strict": 1.0, "qwen_compat": 1.0}


class FakeCalls(Calls):
    """Calls that have ended as soon as they are submitted, unless they are silent."""

    def done(self, refs: Sequence[Any]) -> list[Any]:
        self.check()
        ended = [ref for ref in refs if ref.outcome is not SILENT]
        return ended[:1]

    def get(self, ref: Any, callee: Callee) -> Any:
        if isinstance(ref.outcome, Exception):
            raise ref.outcome
        return ref.outcome


class FakeActor:
    """An evaluator: each method gives the next of its outcomes, or its usual one."""

    def __init__(self, log: list[str], name: str, usual: dict[str, Callable[..., Any]]) -> None:
        self._log, self._name, self._usual = log, name, usual
        self.next: dict[str, deque[Any]] = {}

    def __getattr__(self, method: str) -> Any:
        if method not in self._usual:
            raise AttributeError(method)

        def remote(*args: Any) -> Ref:
            self._log.append(f"{self._name}.{method}")
            waiting = self.next.get(method)
            return Ref(waiting.popleft() if waiting else self._usual[method](*args))

        return type("Method", (), {"remote": staticmethod(remote)})


class FakeGang:
    """Engines and graders by place; a new one is as the first, without its special outcomes."""

    def __init__(self, engines: int, graders: int = 1) -> None:
        self.log: list[str] = []
        self.engines = [self._engine(i) for i in range(engines)]
        self.graders = [self._grader(i) for i in range(graders)]

    def _engine(self, index: int) -> Handle[Any]:
        def generate(requests: Any) -> list[Completion]:
            return [Completion(f"answer {r.seed}", 3, "stop", self.version) for r in requests]

        usual: dict[str, Callable[..., Any]] = {
            "ready": lambda: 1.0,
            "load": lambda _source, version: self._load(version),
            "generate": generate,
            "log_likelihoods": lambda samples: [(-2.0, 4, True) for _ in samples],
        }
        return Handle(FakeActor(self.log, f"engine {index}", usual))

    def _load(self, version: str) -> LoadReport:
        self.version = version
        return REPORT

    def _grader(self, index: int) -> Handle[Any]:
        usual: dict[str, Callable[..., Any]] = {
            "ready": lambda _runs_code: "",
            "grade": lambda _spec, answers: [Graded("1", "", VERDICT) for _ in answers],
        }
        return Handle(FakeActor(self.log, f"grader {index}", usual))

    def start_engine(self, index: int, _model: str, _tokenizer: str) -> Handle[Any]:
        return self.fresh_engine(index, _model, _tokenizer)

    def fresh_engine(self, index: int, _model: str, _tokenizer: str) -> Handle[Any]:
        self.log.append(f"start engine {index}")
        self.engines[index] = self._engine(index)
        return self.engines[index]

    def start_grader(self, index: int) -> Handle[Any]:
        self.log.append(f"start grader {index}")
        self.graders[index] = self._grader(index)
        return self.graders[index]


class Rig:
    """A model, tasks of six problems, and evaluators."""

    def __init__(self, root: Path, engines: int = 1, graders: int = 1, **engine: Any) -> None:
        model = root / "model"
        model.mkdir()
        (model / "config.json").write_text('{"hidden_size": 8}')
        data = root / "data.jsonl"
        rows = [
            {"question": f"{i} + 1?", "answer": f"{i + 1}", "text": f"{i} + 1"} for i in range(6)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings = EvaluationSettings(
            tasks=(
                TaskSettings("held", path=str(data), type="loss"),
                TaskSettings("sums", path=str(data), type="questions"),
            ),
            engine=EngineSettings(chunk_size=2, **engine),
            grading=GradingSettings(workers=graders),
        )
        self.root, self.gang = root, FakeGang(engines, graders)
        self.subject = Subject("model", ModelSource(str(model)), str(model), "weights")
        self.console = Console(width=200, file=io.StringIO())
        reporter, calls = Reporter(self.console), FakeCalls()
        gang: Any = self.gang
        self.slots = [
            EngineSlot(gang, i, self.subject, self.settings.engine.timeout_s, reporter, calls)
            for i in range(engines)
        ]
        self.evaluators = Evaluators(self.settings, root / "out", self.slots, gang, reporter, calls)

    def tasks(self) -> list[Task]:
        return load_tasks(self.settings)

    def round(self) -> Round:
        chunks: list[Chunk] = []
        for task in self.tasks():
            items = [Item(i, 0, i, (1, 2, 3), 1) for i in range(len(task.problems))]
            chunks += chunks_of(task, items, 2)
        digests = {task.name: f"digest of {task.name}" for task in self.tasks()}
        return Round(self.evaluators, self.subject, chunks, digests)

    def said(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    def texts(self) -> list[str]:
        return [r.completion for r in read_records(self.root / "out" / "model", "sums")]


def test_tasks_are_reported_as_they_are_complete(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    work = rig.round()
    found = {scores.task: scores for scores in work.run()}
    assert list(found) == ["held", "sums"]
    assert found["held"].metrics["loss"].mean == pytest.approx(0.5)
    assert [scores.digest for scores in found.values()] == ["digest of held", "digest of sums"]
    assert rig.texts() == [f"answer {i}" for i in range(6)]
    assert work.report == REPORT
    assert rig.gang.log.count("engine 0.load") == 1


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("graders", [1, 2])
def test_the_number_of_evaluators_changes_nothing(
    tmp_path: Path, engines: int, graders: int
) -> None:
    rig = Rig(tmp_path, engines, graders)
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.texts() == [f"answer {i}" for i in range(6)]
    assert rig.gang.log.count("engine 0.load") == 1


def test_a_lost_engine_is_replaced_and_its_chunk_done_once_more(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.gang.engines[0].actor.next["generate"] = deque([LOST])
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.texts() == [f"answer {i}" for i in range(6)]
    assert "model: an evaluator failed, starting it anew" in rig.said()
    # The new one holds the weights too.
    assert rig.gang.log.count("engine 0.load") == 2


def test_a_chunk_that_engines_die_of_ends_the_round(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    def start(index: int, _model: str, _tokenizer: str) -> Handle[Any]:
        engine = rig.gang._engine(index)
        engine.actor.next["log_likelihoods"] = deque([LOST])
        rig.gang.engines[index] = engine
        return engine

    rig.gang.start_engine = start  # type: ignore[method-assign]
    start(0, "", "")
    with pytest.raises(WorkerError, match="failed 3 times over the same prompts") as caught:
        list(rig.round().run())
    assert caught.value.where == "model, held, chunk 0"


def test_an_engine_that_says_nothing_is_lost(tmp_path: Path) -> None:
    rig = Rig(tmp_path, timeout_s=0.05)
    rig.gang.engines[0].actor.next["generate"] = deque([SILENT])
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.gang.log.count("start engine 0") == 1


def test_a_lost_grader_is_replaced_and_all_that_it_had_graded_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path, engines=3)
    rig.gang.graders[0].actor.next["grade"] = deque([SILENT, LOST])
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.texts() == [f"answer {i}" for i in range(6)]
    assert "model: a grader failed, starting it anew" in rig.said()
    log = rig.gang.log
    assert log.count("start grader 0") == 1
    # It had all three, and lost them.
    assert log.count("grader 0.grade") == 6


def test_graders_get_the_same_to_do(tmp_path: Path) -> None:
    rig = Rig(tmp_path, engines=3, graders=3)
    for grader in rig.gang.graders:
        grader.actor.next["grade"] = deque([SILENT])
    work = rig.round().run()
    assert next(work).task == "held"
    counts = [rig.gang.log.count(f"grader {i}.grade") for i in range(3)]
    assert max(counts) - min(counts) <= 1


def test_a_completion_of_other_weights_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    stale = [Completion("x", 1, "stop", "another model")] * 2
    rig.gang.engines[0].actor.next["generate"] = deque([stale])
    with pytest.raises(EvaluationError, match="comes from other weights"):
        list(rig.round().run())


# ---- one engine's place


def test_an_engine_that_holds_a_model_is_not_loaded_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    [slot] = rig.slots
    assert slot.load(rig.subject) == REPORT
    assert slot.load(rig.subject) is None
    assert rig.gang.log == ["engine 0.load"]


def test_another_architecture_wants_another_engine(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    [slot] = rig.slots
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"hidden_size": 16}')
    slot.load(Subject("other", ModelSource(str(other)), str(other), "weights"))
    assert rig.gang.log == ["start engine 0", "engine 0.ready", "engine 0.load"]


@pytest.mark.parametrize("error", [EvaluationError("half a reload"), LOST])
def test_after_a_failed_reload_a_fresh_engine_is_loaded(tmp_path: Path, error: Exception) -> None:
    rig = Rig(tmp_path)
    [slot] = rig.slots
    rig.gang.engines[0].actor.next["load"] = deque([error])
    assert slot.load_even_if_lost(rig.subject) == REPORT
    expected = ["engine 0.load", "start engine 0", "engine 0.ready", "engine 0.load"]
    assert rig.gang.log == expected
    assert "model: reloading failed, starting the engine anew" in rig.said()


def test_weights_that_not_even_a_fresh_engine_takes_in(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    [slot] = rig.slots
    broken = EvaluationError("no such tensor")

    def start(index: int, _model: str, _tokenizer: str) -> Handle[Any]:
        engine = rig.gang._engine(index)
        engine.actor.next["load"] = deque([broken])
        rig.gang.engines[index] = engine
        return engine

    rig.gang.start_engine = start  # type: ignore[method-assign]
    start(0, "", "")
    with pytest.raises(EvaluationError, match="no such tensor"):
        slot.load(rig.subject)
    # What is there now is nothing to go on with: the next load begins with a fresh engine.
    rig.gang.engines[0].actor.next.clear()
    rig.gang.start_engine = rig.gang.fresh_engine  # type: ignore[method-assign]
    rig.gang.log.clear()
    assert slot.load(rig.subject) == REPORT
    assert rig.gang.log == ["start engine 0", "engine 0.ready", "engine 0.load"]


def test_an_engine_that_is_lost_while_it_loads_counts_as_lost_over_the_chunk(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.gang.engines[0].actor.next["load"] = deque([LOST])
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.gang.log.count("start engine 0") == 1
    assert "model: an evaluator failed, starting it anew" in rig.said()


def test_waiting_for_an_engine_can_be_interrupted(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    asked = []

    class StopError(Exception):
        pass

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) > 3:
            raise StopError

    calls = FakeCalls(check)
    gang: Any = rig.gang
    slot = EngineSlot(gang, 0, rig.subject, 60.0, Reporter(rig.console), calls)
    rig.gang.engines[0].actor.next["load"] = deque([SILENT])
    with pytest.raises(StopError):
        slot.load(rig.subject)


@pytest.mark.parametrize("kind", ["engine", "grader"])
def test_an_evaluator_that_is_lost_while_it_starts_is_started_again(
    tmp_path: Path, kind: str
) -> None:
    """A few times; then it is no accident."""
    rig = Rig(tmp_path)
    start = getattr(rig.gang, f"start_{kind}")
    left = [ATTEMPTS - 1]

    def dying(index: int, *others: Any) -> Handle[Any]:
        handle: Handle[Any] = start(index, *others)
        if left[0]:
            left[0] -= 1
            handle.actor.next["ready"] = deque([EvaluatorLostError("it was killed")])
        return handle

    setattr(rig.gang, f"start_{kind}", dying)
    for actor, method in ((rig.gang.engines[0], "generate"), (rig.gang.graders[0], "grade")):
        if kind in actor.actor._name:
            actor.actor.next[method] = deque([LOST])
    assert {s.task for s in rig.round().run()} == {"held", "sums"}
    assert rig.gang.log.count(f"start {kind} 0") == ATTEMPTS
    left[0], names = ATTEMPTS, ("", "") if kind == "engine" else ()
    with pytest.raises(EvaluatorLostError, match="it was killed"):
        started(
            lambda: dying(0, *names).call(Grader.ready, False),
            lambda ref: FakeCalls().get(ref, EVALUATOR),
        )

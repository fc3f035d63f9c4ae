"""What a merge does with scores, whenever they come: with scores that the test makes up."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.config import MergeConfig, validate
from arm_ray.errors import ArmRayError
from arm_ray.evaluation import records
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.statistics import Estimate
from arm_ray.events import read_events
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.merge.publisher import Publisher
from arm_ray.runtime.merge.run import MergeOutcome, merge
from arm_ray.runtime.scoring import service as scoring
from arm_ray.runtime.scoring import state_scoring
from arm_ray.runtime.scoring.results import ScoringWork
from arm_ray.runtime.scoring.subject import Subject
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("shards_in_process")

LOSSES = [5.0, 4.0, 4.5, 1.0, 2.0, 3.0]


@dataclass
class Scores:
    """Losses of the states by name, with what happens before one is known."""

    losses: dict[str, float]
    before: Callable[[str], None] = lambda _name: None
    failing: frozenset[str] = frozenset()
    scored: list[str] = field(default_factory=list)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scores]:
    """Have states scored without engines."""

    @contextlib.contextmanager
    def no_evaluators(*_: object) -> Iterator[object]:
        yield types.SimpleNamespace(engines=[], graders=[])

    def install(losses: list[float], **more: Any) -> Scores:
        named = {f"state-{t:04d}": loss for t, loss in enumerate(losses, start=1)}
        given = Scores(named, **more)

        def score(self: scoring.ScoringService, subject: Subject) -> dict[str, TaskScores]:
            found = self._known.of(subject)
            if not found:
                given.before(subject.name)
                if subject.name in given.failing:
                    raise ArmRayError("the engine is broken")
                given.scored.append(subject.name)
                loss = given.losses.get(subject.name, 9.0)
                [task] = self._tasks
                digest = self._known.digest(task, subject)
                value = {"loss": Estimate(loss, loss, loss)}
                found = {"held": TaskScores("held", "loss", digest, value, 1, 1, {}, 1.0, 1.0, "v")}
                records.write_records(self._evaluators.directory / subject.name, [], found["held"])
            self._tell(subject, found, ScoringWork(None, 0.0))
            return found

        monkeypatch.setattr(scoring, "placed_evaluators", no_evaluators)
        monkeypatch.setattr(scoring.ScoringService, "_score", score)
        monkeypatch.setattr(state_scoring, "paired_results", lambda *_: [])
        return given

    return install


def run(
    case: MergeCase,
    *overrides: str,
    output: str = "run",
    stop: int | None = None,
    **evaluation: Any,
) -> MergeOutcome:
    content = case.content(output)
    task = {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")}
    content["evaluation"] = {"tasks": [task], **evaluation}
    config = validate(MergeConfig, content, overrides, source="test")
    return merge(config, console=Console(quiet=True), stop_after=stop)


def published(result: MergeOutcome) -> list[str]:
    events = read_events(result.run / "events.jsonl")
    return [f"state-{event['state']}" for event in events if event["event"] == "model_written"]


def on_disk(case: MergeCase, output: str = "run") -> list[str]:
    return sorted(path.name for path in (case.root / output / "states").iterdir())


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_the_state_that_patience_selects_is_still_there(
    case: MergeCase, made_up: Callable[..., Scores], operator: str
) -> None:
    case.make("smollm2", sizes=SERVED)
    made_up(LOSSES)
    options = ("keep_states=last", "schedule.max_iterations=6", f"method.operator={operator}")
    result = run(case, *options, wait=True, select={"by": "held", "patience": 1})
    # State 3 is the first that is not better than the best before; 4 would be the best of all.
    assert operator == "task_arithmetic" or result.reason == "patience"
    assert published(result) == ["state-0002"]


def test_late_scores_select_the_same_state(
    case: MergeCase, made_up: Callable[..., Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2", sizes=SERVED)
    gate = threading.Event()
    made_up(LOSSES, before=lambda name: gate.wait(60) if name == "state-0003" else None)
    publish = Publisher.publish

    def delayed(self: Publisher, manifest: states.StateManifest) -> None:
        publish(self, manifest)
        if manifest.iteration == 5:
            # The scores of 3 and 4 come within one iteration.
            gate.set()
            scores = (case.root / "run").rglob
            wait_for(lambda: any(scores("state-0004/held.json")), "the score of state 4")

    monkeypatch.setattr(Publisher, "publish", delayed)
    options = ("keep_states=last", "schedule.max_iterations=6")
    assert published(run(case, *options, select={"by": "held", "patience": 1})) == ["state-0002"]


def test_a_resumed_run_remembers_the_scores_of_pruned_states(
    case: MergeCase, made_up: Callable[..., Scores]
) -> None:
    case.make("smollm2", sizes=SERVED)
    given = made_up([1.0, 2.0, 2.0, 2.0, 0.5, 0.4])
    options = (
        "keep_states=last",
        "schedule.max_iterations=6",
        "schedule.anchor_iterations=6",
        "runtime.lookahead=0",
    )
    select = {"by": "held", "patience": 3}
    whole = run(case, *options, output="whole", wait=True, select=select)
    run(case, *options, output="halted", stop=3, wait=True, select=select)
    assert on_disk(case, "halted") == ["0001", "0003"]
    given.scored.clear()
    resumed = run(case, *options, output="halted", wait=True, select=select)
    assert given.scored == ["state-0004"]
    assert published(resumed) == published(whole) == ["state-0001"]
    assert resumed.iterations == whole.iterations == 4


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_evaluation_ends_no_merge_that_does_not_depend_on_it(
    case: MergeCase, made_up: Callable[..., Scores], wait: bool
) -> None:
    case.make("smollm2", sizes=SERVED)
    made_up(LOSSES, failing=frozenset({"candidate-1"}))
    options = ("keep_states=last", "schedule.max_iterations=4", "runtime.lookahead=0")
    result = run(case, *options, wait=wait)
    events = read_events(result.run / "events.jsonl")
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert [w for w in warnings if "the engine is broken" in w] == warnings[-1:]
    assert published(result) == ["state-0004"]
    # No state waits for scores that never come.
    assert len(on_disk(case)) <= 2


def test_scores_of_other_settings_are_not_taken(
    case: MergeCase, made_up: Callable[..., Scores]
) -> None:
    case.make("smollm2", sizes=SERVED)
    given = made_up(LOSSES)
    options = ("schedule.max_iterations=2",)
    run(case, *options, select={"by": "held"})
    for name in ("states", "model"):
        shutil.rmtree(case.root / "run" / name)
    given.scored.clear()
    run(case, *options, "method.coefficient=0.3", select={"by": "held"})
    assert [name for name in given.scored if name.startswith("state")] == [
        "state-0001",
        "state-0002",
    ]


def test_the_table_has_the_base_first_and_the_states_in_order(
    case: MergeCase, made_up: Callable[..., Scores]
) -> None:
    case.make("smollm2", sizes=SERVED)
    made_up(LOSSES)
    result = run(case, "schedule.max_iterations=3")
    card = (result.run / "model" / "README.md").read_text(encoding="utf-8")
    places = [card.index(f"| {name} |") for name in ("base", "candidate-1", "state-0001")]
    assert places == sorted(places)


def test_closing_does_not_wait_for_an_engine(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service with a call in flight ends at once, and starts nothing anew."""
    import ray

    case.make("smollm2", sizes=SERVED)
    in_flight = case.root / "in-flight"

    @ray.remote(num_cpus=0)
    class Sleeper:
        def ready(self) -> float:
            return 0.0

        def load(self, source: object, version: str) -> object:
            from arm_ray.evaluation.engine import Canary, LoadReport

            return LoadReport(version, 0.0, Canary((1,), 0.0))

        def log_likelihoods(self, samples: object) -> object:
            in_flight.touch()
            time.sleep(600)

    sleeper: Handle[Any] = Handle(Sleeper.remote())
    started: list[int] = []
    gang = types.SimpleNamespace(
        engines=[sleeper], graders=[], start_engine=lambda *_: started.append(1)
    )

    @contextlib.contextmanager
    def placed(*_: object) -> Iterator[object]:
        yield gang

    monkeypatch.setattr(scoring, "placed_evaluators", placed)
    begun = {}

    def stop(self: Publisher, manifest: states.StateManifest) -> None:
        wait_for(in_flight.exists, "a call in flight")
        begun["at"] = time.monotonic()
        raise ArmRayError("the merge fails")

    monkeypatch.setattr(Publisher, "publish", stop)
    try:
        with pytest.raises(ArmRayError, match="the merge fails"):
            run(case, "schedule.max_iterations=2", base=True)
        assert not [t for t in threading.enumerate() if t.name == "scoring"]
        assert started == []
    finally:
        sleeper.end()

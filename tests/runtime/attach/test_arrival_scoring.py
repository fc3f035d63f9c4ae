"""Where a run's models are scored when the trainer has taken the cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import RuntimeConfig
from arm_ray.errors import PlacementError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.settings import EngineSettings, EvaluationSettings
from arm_ray.events import EventLog
from arm_ray.following.config import SharingConfig
from arm_ray.runtime.attach import arrival_scoring
from arm_ray.runtime.attach.arrival_scoring import ArrivalScoring
from arm_ray.runtime.scoring.subject import Subject
from tests.doubles.said import reporter_into

FIRST = Subject("base", ModelSource("/base"), "/base", "x")


class Cluster:
    """Gives engines room by a rule, and remembers what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[EngineSettings] = []
        self.free_after = 10**9
        self.has_room_for = lambda _engine: False
        monkeypatch.setattr(arrival_scoring, "scoring_service", self.service)

    @contextlib.contextmanager
    def service(self, settings: EvaluationSettings, *_: Any) -> Iterator[Any]:
        self.asked.append(settings.engine)
        if not self.has_room_for(settings.engine) and len(self.asked) <= self.free_after:
            raise PlacementError("no room", got="free: 0 GPU", expected="1 GPU")
        yield type("Service", (), {"has_failed": False})()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def start(tmp_path: Path, **sharing: Any) -> tuple[bool, list[str]]:
    told: list[str] = []
    settings = EvaluationSettings(("gsm8k",), engine=EngineSettings(gpus_per_engine=1.0))
    scoring = ArrivalScoring(
        settings, SharingConfig(**sharing), [], None, tmp_path, RuntimeConfig(),
        reporter_into(told, EventLog(tmp_path / "events.jsonl")),
    )  # fmt: skip
    with scoring:
        return scoring.start(FIRST), told


def test_a_trainers_gpus_are_not_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    cluster.has_room_for = lambda engine: engine.gpus_per_engine == 0.0
    assert start(tmp_path) == (True, [])
    assert len(cluster.asked) == 1


def test_it_waits(cluster: Cluster, tmp_path: Path) -> None:
    cluster.free_after = 2
    is_running, told = start(tmp_path, use_gpus=True, when_full="wait")
    assert is_running
    assert [engine.gpus_per_engine for engine in cluster.asked] == [1.0] * 3
    assert len(told) == 2
    assert "waiting for it" in told[0]
    assert "free: 0 GPU" in told[0]


def test_it_goes_to_cpus(cluster: Cluster, tmp_path: Path) -> None:
    cluster.has_room_for = lambda engine: engine.gpus_per_engine == 0.0
    is_running, told = start(tmp_path, use_gpus=True, when_full="cpu")
    assert is_running
    assert [engine.gpus_per_engine for engine in cluster.asked] == [1.0, 0.0]
    assert "the evaluation goes to CPUs" in told[-1]


def test_it_goes_to_labelled_nodes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.has_room_for = lambda engine: "evaluator" in engine.resources
    options = {"use_gpus": True, "when_full": "labelled", "resources": {"evaluator": 1.0}}
    is_running, told = start(tmp_path, **options)
    assert is_running
    assert [dict(engine.resources) for engine in cluster.asked] == [{}, {"evaluator": 1.0}]
    assert "the labelled nodes" in told[-1]
    assert "1 evaluator" in told[-1]


def test_it_goes_on_without_scores(cluster: Cluster, tmp_path: Path) -> None:
    is_running, told = start(tmp_path, use_gpus=True, when_full="skip")
    assert not is_running
    assert "without scores" in told[0]


def test_no_room_there_either_is_an_error(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="no room"):
        start(tmp_path, use_gpus=True, when_full="cpu")

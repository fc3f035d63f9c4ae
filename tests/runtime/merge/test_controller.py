"""What a merge goes through when shards are lost and nodes join; no Ray, no shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from arm_ray.checkpoints.states import StateManifest
from arm_ray.config import RuntimeConfig
from arm_ray.errors import ArmRayError, ConfigError, PlacementError, ShardLostError, TransportError
from arm_ray.runtime.cluster.actors import LocalHandle
from arm_ray.runtime.cluster.nodes import ClusterView
from arm_ray.runtime.merge import controller as module
from arm_ray.runtime.merge.controller import Ending, MergeController, Stage
from arm_ray.runtime.merge.policies import RecoveryPolicy, ScalingPolicy
from arm_ray.runtime.output.run_directory import open_run
from tests.builders.merge_case import MergeCase
from tests.doubles.said import reporter_into

LOST = ShardLostError("lost", got="node 2")
BROKEN = TransportError("hidden states did not reach the next layer shard")


class Rig:
    """A controller whose sets of shards end as a test says."""

    def __init__(self, case: MergeCase, monkeypatch: pytest.MonkeyPatch, **runtime: Any) -> None:
        config = case.make().config()
        self.nodes, self.said, self.stages = 2, list[str](), list[Stage]()
        self.sets: list[tuple[int, str]] = []
        self.outcomes: list[Any] = []
        settings = config.runtime.model_copy(update=runtime)
        config = config.model_copy(update={"runtime": settings})
        with open_run(config) as run:
            self.run = run
        job: Any = SimpleNamespace(
            config=config,
            method=SimpleNamespace(needs_forward=False),
            inputs=None,
            run=run,
            compared=None,
            scoring=None,
            reporter=reporter_into(self.said),
            num_candidates=2,
            stop_after=None,
        )
        monkeypatch.setattr(module, "view_of_cluster", self.view)
        monkeypatch.setattr(module, "alive_nodes", lambda: self.view().nodes)
        monkeypatch.setattr(module, "shard_specs", self.specs)
        monkeypatch.setattr(module, "placed_shards", self.placed)
        monkeypatch.setattr(module, "storage_of", self.storage)
        monkeypatch.setattr(module, "Dispatcher", lambda *_: SimpleNamespace(peak_bytes=tuple))
        monkeypatch.setattr(module, "sweep_for", lambda parts: SimpleNamespace(run=self.sweep))
        monkeypatch.setattr(MergeController, "_announce", lambda _self, _life: None)
        scaling = ScalingPolicy(settings, 6, {})
        self.controller = MergeController(
            job,
            self.view(),
            scaling.first(self.view()),
            RecoveryPolicy(settings.max_recoveries, settings.transport),
            scaling,
        )

    @staticmethod
    def specs(*given: Any) -> list[Any]:
        return [SimpleNamespace(num_shards=given[4].num_shards, life=None, groups=(0, 1))]

    def view(self) -> ClusterView:
        nodes = frozenset(map(str, range(self.nodes)))
        return ClusterView(nodes, {"CPU": self.nodes}, {"CPU": self.nodes})

    @contextlib.contextmanager
    def placed(self, specs: Any, runtime: RuntimeConfig, *_: Any) -> Iterator[Any]:
        self.sets.append((specs[0].num_shards, runtime.transport))
        count = specs[0].num_shards
        shard: Any = SimpleNamespace(device_memory=lambda: "of a GPU")
        actors = [LocalHandle(shard) for _ in range(count)]
        yield SimpleNamespace(nodes=[str(i) for i in range(count)], actors=actors)
        for actor in actors:
            actor.end()

    @contextlib.contextmanager
    def storage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(
            is_shared=True,
            has_state=lambda _t: True,
            has_group=lambda _t, _g: True,
            discard=lambda _t: None,
            bring=lambda _needed, _merged: None,
        )

    def sweep(self) -> str:
        self.stages.append(self.controller.stage)
        outcome = self.outcomes.pop(0)
        if callable(outcome):
            outcome = outcome()
        if isinstance(outcome, ArmRayError):
            raise outcome
        return str(outcome)

    def finish(self, iteration: int, then: object) -> Callable[[], object]:
        """What a set does that finishes an iteration first."""

        def work() -> object:
            manifest = StateManifest(iteration, "anchored", "base", (), None, None)
            self.run.finished[iteration] = manifest
            return then

        return work

    def go(self, *outcomes: Any) -> Ending:
        self.outcomes = list(outcomes)
        return self.controller.run()


@pytest.fixture
def rig(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    return lambda **runtime: Rig(case, monkeypatch, **runtime)


def test_an_untroubled_merge_takes_one_set(rig: Callable[..., Rig]) -> None:
    of = rig(layer_shards=2)
    ending = of.go(of.finish(1, "stop_after"))
    chosen = ending.selection.name
    assert (ending.reason, ending.model, chosen) == ("stop_after", None, "state-0001")
    assert of.sets == [(2, "auto")]
    assert of.stages == [Stage.SWEEPING]
    assert of.controller.stage is Stage.ENDED


def test_lost_shards_are_followed_by_as_many_as_there_is_room_for(
    rig: Callable[..., Rig],
) -> None:
    of = rig(layer_shards=2)

    def lose_a_node() -> ArmRayError:
        of.nodes = 1
        return LOST

    assert of.go(lose_a_node, of.finish(1, "stop_after")).reason == "stop_after"
    assert of.sets == [(2, "auto"), (1, "auto")]
    assert "going on with a new set after iteration 0 (1 of 3)" in of.said[0]


def test_too_many_losses_end_with_the_error(rig: Callable[..., Rig]) -> None:
    of = rig(layer_shards=1, max_recoveries=1)
    with pytest.raises(ShardLostError):
        of.go(LOST, LOST)
    assert len(of.sets) == 2


def test_a_broken_transport_is_left_for_the_object_store(rig: Callable[..., Rig]) -> None:
    of = rig(layer_shards=2)
    of.go(BROKEN, BROKEN, of.finish(1, "stop_after"))
    assert [transport for _, transport in of.sets] == ["auto", "auto", "object_store"]


def test_nodes_that_join_are_used_by_the_next_set(rig: Callable[..., Rig]) -> None:
    of = rig(layer_shards="auto")

    def regroup() -> str:
        of.nodes = 4
        of.run.finished[1] = StateManifest(1, "anchored", "base", (), None, None)
        return "regroup"

    of.go(regroup, of.finish(2, "stop_after"))
    assert [shards for shards, _ in of.sets] == [2, 4]
    assert of.said == ["nodes have joined: a new set of layer shards from iteration 2"]


def test_nodes_that_join_while_the_evaluators_are_placed_are_noticed(
    rig: Callable[..., Rig],
) -> None:
    """The first set is planned before the evaluators are placed, which may take minutes."""
    of = rig(layer_shards="auto")
    of.nodes = 3
    assert of.controller._has_grown()


def test_no_room_for_the_first_set_is_an_error(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = rig(layer_shards=2)

    def refuse(*_: Any) -> Any:
        raise PlacementError("the cluster did not place 2 layer shards")

    monkeypatch.setattr(module, "placed_shards", refuse)
    of.nodes = 1
    with pytest.raises(PlacementError):
        of.go()


def test_memory_of_gpus_is_checked_before_anything_is_read(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = rig(layer_shards=2)
    checked: list[Any] = []

    def refuse(*given: Any) -> None:
        checked.append(given[2:])
        raise PlacementError("a GPU is too small for its layer shard")

    monkeypatch.setattr(module, "check_gpu_memory", refuse)
    of.go(of.finish(1, "stop_after"))
    assert checked == []
    of.controller._placement = replace(of.controller._placement, device="cuda")
    with pytest.raises(PlacementError):
        of.go()
    assert checked == [([(0, 1)], ["of a GPU", "of a GPU"])]
    assert of.stages == [Stage.SWEEPING]


def test_an_input_s_error_ends_the_merge_at_once(rig: Callable[..., Rig]) -> None:
    of = rig()
    with pytest.raises(ConfigError):
        of.go(ConfigError("no"))
    assert len(of.sets) == 1
    assert of.controller.stage is Stage.SWEEPING


def test_a_new_set_goes_back_to_the_last_state_that_is_whole(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = rig(layer_shards=1)
    discarded, brought = [], []

    @contextlib.contextmanager
    def storage(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(
            is_shared=True,
            has_state=lambda t: t != 2,
            has_group=lambda t, g: (t, g) != (2, 5),
            discard=discarded.append,
            bring=lambda needed, merged: brought.append((needed, merged)),
        )

    monkeypatch.setattr(module, "storage_of", storage)
    for iteration in (1, 2):
        of.finish(iteration, None)()
    for iteration, group in ((2, 5), (2, 4), (1, 0)):
        report: Any = SimpleNamespace(group=group)
        of.controller._partial.add(iteration, report)
    of.go("stop_after")
    assert sorted(of.run.finished) == [1]
    assert discarded == [2]
    assert brought == [([1], {(2, 4)})]
    assert "going on after iteration 1" in of.said[0]

"""When shards are lost, and what a node must have."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console

from arm_ray.calibration.minibatch import MiniBatch, micro_batches
from arm_ray.checkpoints import states
from arm_ray.errors import PlacementError, ShardLostError
from arm_ray.events import read_events
from arm_ray.runtime.cluster import calls
from arm_ray.runtime.cluster.actors import Handle
from arm_ray.runtime.cluster.node_files import FilesOnNodes, NodeFiles
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.merge.state_storage import NodeStorage
from arm_ray.runtime.shards import placement
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import ShardGang
from arm_ray.schedule import plan_iteration
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.ray_errors import instance
from tests.builders.shards import DirectShard


def test_a_node_that_is_gone_is_left_out_and_one_with_shards_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Files:
        """What serves a node's files, with one answer to all."""

        def __init__(self, answer: object) -> None:
            self.groups = self.remove = self
            self._answer = answer

        def remote(self, *_arguments: object) -> object:
            return self._answer

    def get(given: Any, timeout: float | None = None) -> Any:
        for answer in given if isinstance(given, list) else [given]:
            if isinstance(answer, Exception):
                raise answer
        return given

    monkeypatch.setattr(ray, "get", get)
    gone = Handle[NodeFiles](Files(ray.exceptions.ActorUnschedulableError("its node is dead")))
    here, there = Handle[NodeFiles](Files({(1, 0)})), Handle[NodeFiles](Files(set()))
    files = FilesOnNodes({"home": here, "shard": there, "earlier": gone}, ["home", "shard"])
    assert files.ask(NodeFiles.groups) == {"home": {(1, 0)}, "shard": set()}
    assert files.nodes == ["home", "shard"]
    files = FilesOnNodes({"home": here, "shard": gone}, ["home", "shard"])
    with pytest.raises(ShardLostError, match="what serves a node's files was lost"):
        files.ask(NodeFiles.groups)


def test_of_a_complete_run_nothing_is_lost_with_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not begin again."""
    asked = []

    def gone(*_: object) -> None:
        asked.append(True)
        raise ShardLostError("what serves a node's files was lost")

    monkeypatch.setattr(FilesOnNodes, "ask", gone)
    storage: Any = SimpleNamespace(_fingerprints={}, _files=FilesOnNodes({}, ()))
    NodeStorage.close(storage, is_complete=True)
    assert asked == [True]


def test_an_object_store_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {
            "NodeID": str(number),
            "Alive": True,
            "NodeManagerHostname": f"host{number}",
            "NodeManagerAddress": f"10.0.0.{number}",
            "Resources": {"object_store_memory": 1e6},
        }
        for number in range(2)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    gang = ShardGang([Handle(None), Handle(None)], "object_store", ["0", "1"])
    placement.check_object_store(gang, 500_000)
    with pytest.raises(PlacementError, match="object store is too small") as caught:
        placement.check_object_store(gang, 500_001)
    assert "host0 (10.0.0.0)" in str(caught.value)
    placement.check_object_store(replace(gang, transport="gloo"), 500_001)


def test_what_is_merged_already_is_taken_over(case: MergeCase) -> None:
    case.make()
    whole = DirectShard(case.config(output="whole"))
    expected = whole.with_forward(1)
    config = case.config(output="parts")
    first = DirectShard(config)
    assert_same_bits(expected, first.with_forward(1))
    # Another shard finds the first two groups on disk, and merges the last one.
    directory = states.state_directory(first.run, 1)
    states.group_file(directory, 2).unlink()
    second = DirectShard(config)
    plan = plan_iteration(config.schedule, 2, 1)
    ids = [np.arange(1 + i, 9 + i, dtype=np.int32) for i in range(8)]
    [micro] = micro_batches(MiniBatch(1, list(range(8)), ids), max_tokens=64, max_samples=64)
    for state in plan.inputs:
        second.shard.forward(plan, second.spec.chunks[0], 8, state, 0, micro, None)
    report = second.shard.merge(plan, 2, np.arange(8))
    assert report is not None
    for group in (0, 1):
        assert second.shard.adopt(plan, group, replace(report, group=group)).group == group
    second.shard.on("states", "written", 1)
    assert_same_bits(expected, second.state(1))
    # And the next iteration reads them from there.
    assert_same_bits(whole.with_forward(2), second.with_forward(2))


def test_a_node_needs_the_weight_files_of_its_own_layers_only(case: MergeCase) -> None:
    case.make("mistral", num_layers=4, max_shard_size="60KB")
    linear = "method.operator=task_arithmetic"
    expected = DirectShard(case.config(linear, output="whole")).linear(1)
    shard = DirectShard(case.config(linear, output="part"))
    spec = replace(shard.spec, groups=range(2, 4))
    own = [n for g in spec.groups for n in spec.layout.groups[g].tensors]
    needed = {f for c in spec.checkpoints.values() for f in c.files(own)}
    everything = {
        f for d in (case.root / "base", *case.candidates) for f in d.glob("*.safetensors")
    }
    assert needed < everything
    part = LayerShard(spec)
    for file in everything - needed:
        file.unlink()
    assert part.on("files", "missing") == []
    plan = plan_iteration(shard.config.schedule, 2, 1)
    for group in spec.groups:
        part.merge_linear([plan], group, frozenset({1}), [])
        found = states.read_group(
            states.state_directory(shard.run, 1), group, spec.layout.groups[group].tensors
        )
        assert_same_bits(found, {name: expected[name] for name in found})
    gone = sorted(needed)[0]
    gone.rename(gone.with_suffix(".away"))
    [told, *_] = part.on("files", "missing")
    assert told.endswith(str(gone))


@pytest.mark.usefixtures("shards_in_process")
@pytest.mark.parametrize("kind", ["OutOfMemoryError", "NodeDiedError", "WorkerCrashedError"])
@pytest.mark.parametrize("within", [False, True], ids=["of the call", "of what it was given"])
def test_a_merge_goes_on_whatever_ray_says_of_a_lost_shard(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, kind: str, within: bool
) -> None:
    """Also where its memory monitor ended the shard, to the bits of an undisturbed run."""
    case.make()
    merge(case.config(output="untroubled"), console=Console(quiet=True))
    lost = instance(getattr(ray.exceptions, kind), "the node ran low on memory")
    error = ray.exceptions.RayTaskError("forward", "…", lost) if within else lost
    answers = [0]

    plain, translated = calls._local, calls._of_task if within else calls._of_ray

    def get(ref: Any, callee: calls.Callee) -> Any:
        answers[0] += 1
        if answers[0] == 12:
            raise translated(error, callee)
        return plain(ref, callee)

    monkeypatch.setattr(calls, "_local", get)
    outcome = merge(case.config(), console=Console(quiet=True))
    assert answers[0] > 12
    events = read_events(outcome.run / "events.jsonl")
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert [text for text in said if "going on with a new set" in text]
    assert_same_bits(load_all(case.root / "untroubled" / "model"), load_all(outcome.run / "model"))


@pytest.mark.usefixtures("shards_in_process")
def test_a_shard_that_is_lost_again_and_again_ends_in_our_error(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    lost = instance(ray.exceptions.OutOfMemoryError, "the node ran low on memory")

    def get(_ref: Any, callee: calls.Callee) -> Any:
        raise calls._of_ray(lost, callee)

    monkeypatch.setattr(calls, "_local", get)
    with pytest.raises(ShardLostError, match=r"low on memory(?s:.*)more runtime\.layer_shards"):
        merge(case.config(), console=Console(quiet=True))

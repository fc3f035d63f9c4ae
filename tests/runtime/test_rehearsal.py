"""A layer that is run and merged before a plan is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arm_ray import cli
from arm_ray.planning.cluster import Cluster, make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.planning.sources import open_workload
from arm_ray.planning.state_life import state_life
from arm_ray.planning.timing import Clock, Placement
from arm_ray.planning.workload import state_uses
from arm_ray.runtime import rehearsal
from arm_ray.runtime.rehearsal import rehearsed
from tests.builders.merge_case import MergeCase


@pytest.fixture
def case(tmp_path: Path) -> MergeCase:
    return MergeCase(tmp_path).make(dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_LEAST_SECONDS", 0.0)


def this_cpu(case: MergeCase, *overrides: str) -> Cluster:
    return make_cluster(case.config(*overrides).runtime, device="this-cpu")


def test_the_plan_has_the_times_that_were_measured(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, of which the first has the embedding too: rotation and the rest are told apart.

    The times are made of known scales, and come out of the plan's formulas as they went in.
    """
    config = case.config("runtime.residency=host")
    cluster = this_cpu(case)
    workload, _ = open_workload(config)
    clock = Clock(workload, config.runtime, cluster.device, Placement([[0, 1, 2]], 1), 1.0)
    uses = state_uses(workload)[:3]

    def known(
        _config: object, _workload: object, group: int, at_once: int, *, runs: bool
    ) -> object:
        assert at_once == 1
        # Of the last group alone.
        assert runs == (group == 1)
        parts = [clock.group(use, group) for use in uses]
        return rehearsal._Seconds(
            3.0 * parts[0].forward_call,
            tuple(5.0 * part.rotation + 0.5 * part.elementwise for part in parts),
        )

    monkeypatch.setattr(rehearsal, "_measured", known)
    found = rehearsed(config, cluster)
    device = found.device
    assert device.forward_scale == pytest.approx(3.0)
    assert device.rotation_scale == pytest.approx(5.0)
    assert device.elementwise_scale == pytest.approx(0.5)
    before, after = make_plan(config, cluster), make_plan(config, found)
    told = Clock(workload, config.runtime, device, Placement([[0, 1, 2]], 1), 1.0)
    for use in uses:
        old, new = clock.group(use, 1), told.group(use, 1)
        assert new.forward_call == pytest.approx(3.0 * old.forward_call)
        assert new.rotation + new.elementwise == pytest.approx(
            5.0 * old.rotation + 0.5 * old.elementwise
        )
    # What is read once does not take longer for it.
    gain = after.iterations[1].forward_s / before.iterations[1].forward_s
    assert 1.0 < gain <= 3.0 + 1e-9
    assert "took" in after.measured[-1]


def test_calls_cost_more_where_shards_have_all_cores(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case.config("runtime.threads=2", "runtime.residency=host")
    workload, _ = open_workload(config)
    device = make_cluster(config.runtime, device="cpu").device
    [use, *_] = state_uses(workload)
    groups = len(workload.layout.groups)

    def seconds(shards: int, cores: int) -> float:
        monkeypatch.setattr("arm_ray.planning.timing.os.cpu_count", lambda: cores)
        dealt = [list(range(groups))[first::shards] for first in range(shards)]
        clock = Clock(workload, config.runtime, device, Placement(dealt, 1), 1.0)
        [times] = clock.iterations([use], state_life(config, 2, None))
        return sum(chunk.forward_s for shard in times.shards for chunk in shard.chunks)

    few, many = seconds(2, cores=4), seconds(2, cores=5)
    assert few - many == pytest.approx(groups * device.call_s)
    # Nothing is sent.
    assert seconds(1, cores=2) == seconds(1, cores=5)


def test_a_layer_is_tried_again_while_there_is_time(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is fast for a moment and slow for the next has a speed between the two."""
    config, cluster = case.config(), this_cpu(case)
    uses = state_uses(open_workload(config)[0])[:3]
    calls: list[int] = []

    def alternating(*_arguments: object, **_names: object) -> object:
        calls.append(1)
        seconds = 1.0 if len(calls) % 4 < 2 else 3.0
        return rehearsal._Seconds(seconds, (seconds,) * len(uses))

    monkeypatch.setattr(rehearsal, "_measured", alternating)
    monkeypatch.setattr(rehearsal, "_LEAST_SECONDS", 60.0)
    found = rehearsed(config, cluster)
    assert len(calls) == 2 * rehearsal._MOST_ROUNDS
    assert "took 2000 ms a micro-batch and 2000 ms a merge" in found.notes[-1]


@pytest.mark.parametrize("residency", ["device", "host", "disk"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_layer_is_run_and_merged(case: MergeCase, residency: str, shards: int) -> None:
    settings = (f"runtime.residency={residency}", f"runtime.layer_shards={shards}")
    config, cluster = case.config(*settings), this_cpu(case)
    threads = torch.get_num_threads()
    found = rehearsed(config, cluster)
    device = found.device
    scales = (device.forward_scale, device.rotation_scale, device.elementwise_scale)
    assert all(scale > 0.0 for scale in scales)
    assert scales != (1.0, 1.0, 1.0)
    note = found.notes[-1]
    assert note.startswith("A layer of this model was run and merged")
    assert ("2 at a time" in note) == (shards == 2)
    assert torch.get_num_threads() == threads
    assert not (case.root / "run").exists()


def test_no_weights_are_needed(case: MergeCase) -> None:
    for directory in (case.root / "base", *case.candidates):
        for file in directory.glob("*.safetensors"):
            file.unlink()
    found = rehearsed(case.config(), this_cpu(case))
    assert "took" in found.notes[-1]


def test_what_cannot_be_tried_is_planned_by_the_rates(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = this_cpu(case)
    # Nothing is run, so nothing is to be measured.
    assert rehearsed(case.config("method.operator=task_arithmetic"), cluster) is cluster
    small = make_cluster(case.config().runtime, device="this-cpu", gpu_memory_gb=1e-4)
    found = rehearsed(case.config(), small)
    assert found.device == small.device
    assert found.notes[-1].startswith("A layer was not tried: it would take")

    def broken(*_: object) -> None:
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(rehearsal.LayerShard, "merge", broken)
    for shards in (1, 2):
        config = case.config(f"runtime.layer_shards={shards}")
        found = rehearsed(config, cluster)
        assert found.device == cluster.device
        assert "could not be tried" in found.notes[-1]
        assert make_plan(config, found).measured == found.notes


def test_the_command_says_what_was_measured(
    case: MergeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(case.content()))
    assert cli.main(["plan", str(path), "--device", "this-cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A layer of this model was run and merged on this machine, and took" in text
    assert "are assumptions" not in text
    assert cli.main(["plan", str(path), "--device", "cpu"]) == 0
    assert "are assumptions" in capsys.readouterr().out

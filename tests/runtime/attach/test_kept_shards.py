"""Layer shards that make one merge after another: the same bits, and when others are started."""

from __future__ import annotations

from typing import Any

import pytest

from arm_ray.errors import ShardLostError
from arm_ray.runtime.attach import kept_shards as module
from arm_ray.runtime.attach.kept_shards import KeptShards
from arm_ray.runtime.merge.sweeps import Sweep
from arm_ray.runtime.shards.layer_shard import LayerShard
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run
from tests.builders.models import fine_tuned, save, tiny_model
from tests.doubles import in_process


@pytest.fixture
def kept(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> KeptShards:
    monkeypatch.setattr(module, "placed_shards", in_process.placed_shards)
    return KeptShards()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each shard that is started, how many layer groups it has."""
    found: list[int] = []
    begin = LayerShard.__init__

    def counted(self: LayerShard, spec: Any) -> None:
        found.append(len(spec.groups))
        begin(self, spec)

    monkeypatch.setattr(LayerShard, "__init__", counted)
    return found


@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_merges_by_the_same_shards_have_the_bits_of_merges_by_their_own(
    case: MergeCase, kept: KeptShards, started: list[int], residency: str
) -> None:
    case.make("qwen2.5")
    merges = [
        ("first", case.candidates),
        ("second", [case.candidates[1], save(fine_tuned_base(case), case.root / "third")]),
    ]
    overrides = ("runtime.layer_shards=2", f"runtime.residency={residency}", "keep_states=none")
    reads = []
    for name, candidates in merges:
        case.candidates = candidates
        outcome = run(case.config(*overrides, output=name), place=kept.placed)
        assert kept._gang is not None
        shard = kept._gang.actors[0].actor
        # The base stays where weights live in memory; nothing else does.
        names = {state for state, _ in shard._store._stored}
        assert names == (set() if residency == "disk" else {"base"})
        reads.append(outcome)
    assert started == [2, 1] or started == [1, 2]
    for name, candidates in merges:
        case.candidates = candidates
        run(case.config(*overrides, output=f"{name}-alone"), place=in_process.placed_shards)
        alone = load_all(case.root / f"{name}-alone" / "model")
        assert_same_bits(alone, load_all(case.root / name / "model"))
    kept.close()


def fine_tuned_base(case: MergeCase) -> Any:
    return fine_tuned(tiny_model("qwen2.5", seed=1, num_layers=3), seed=30)


def test_another_base_is_read_anew(case: MergeCase, kept: KeptShards, started: list[int]) -> None:
    case.make()
    settings = ("keep_states=none",)
    run(case.config(*settings, output="first"), place=kept.placed)
    other = MergeCase(case.root / "other")
    other.root.mkdir()
    other.make()
    save(tiny_model("smollm2", seed=7, num_layers=3), other.root / "base")
    run(other.config(*settings, output="kept"), place=kept.placed)
    assert len(started) == 1
    run(other.config(*settings, output="alone"), place=in_process.placed_shards)
    assert_same_bits(*(load_all(other.root / name / "model") for name in ("kept", "alone")))


def test_other_settings_take_other_shards(
    case: MergeCase, kept: KeptShards, started: list[int]
) -> None:
    case.make()
    assert kept.taken == {}
    run(case.config(output="a"), place=kept.placed)
    assert kept.taken == {"CPU": 1.0}
    run(case.config("runtime.threads=2", output="b"), place=kept.placed)
    assert kept.taken == {"CPU": 2.0}
    run(case.config("runtime.threads=2", "runtime.layer_shards=2", output="c"), place=kept.placed)
    assert kept.taken == {"CPU": 4.0}
    assert len(started) == 4
    kept.close()
    assert kept.taken == {}


def test_shards_of_a_merge_that_failed_are_not_used_again(
    case: MergeCase, kept: KeptShards, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    with monkeypatch.context() as patched:

        def lost(*_: Any) -> None:
            raise ShardLostError("a layer shard was lost")

        patched.setattr(Sweep, "_watch", lost)
        config = case.config("runtime.max_recoveries=0", output="failed")
        with pytest.raises(ShardLostError):
            run(config, place=kept.placed)
    assert kept.taken == {}
    run(case.config(output="next"), place=kept.placed)
    assert len(started) == 2

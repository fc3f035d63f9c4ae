"""What a run does when its disk is full, and when hidden states cannot be sent directly."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import WeightFileWriter
from arm_ray.errors import DiskSpaceError, WorkerError
from arm_ray.events import read_events
from arm_ray.planning.state_life import linear_life
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.merge.run import MergeOutcome, merge
from arm_ray.runtime.output.run_directory import RunDirectory, SpaceNeeds, open_run
from arm_ray.runtime.shards import placement
from arm_ray.runtime.shards.pieces import WriteBehind
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard

# Stands for the reference to what a call returns.
A_CALL: Any = object()
LINEAR = "method.operator=task_arithmetic"
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(config: Any, **options: Any) -> MergeOutcome:
    return merge(config, console=Console(quiet=True), **options)


def no_space_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many tensors be written, and no more."""
    original, left = WeightFileWriter.write, [count]

    def write(self: WeightFileWriter, name: str, first_row: int, rows: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise NO_SPACE
        original(self, name, first_row, rows)

    monkeypatch.setattr(WeightFileWriter, "write", write)


@pytest.mark.parametrize("writes_behind", [False, True])
@pytest.mark.parametrize("forward", [True, False])
def test_a_shard_leaves_no_half_group(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, forward: bool, writes_behind: bool
) -> None:
    if writes_behind:
        behind = WriteBehind(torch.device("cuda"))
        monkeypatch.setattr(
            "arm_ray.runtime.shards.layer_shard.WriteBehind", lambda _device: behind
        )
    case.make()
    overrides = () if forward else (LINEAR,)
    whole = DirectShard(case.config(*overrides, output="whole"))
    expected = whole.with_forward(1) if forward else whole.linear(1)
    config = case.config(*overrides)
    with open_run(config):
        shard = DirectShard(config)
        with monkeypatch.context() as patch:
            no_space_after(patch, 12)
            with pytest.raises(OSError, match="No space left"):
                shard.with_forward(1) if forward else shard.linear(1)
    directory = states.state_directory(shard.run, 1)
    # The first group is whole, the second was cut off; neither is a state.
    assert [path.name for path in directory.iterdir()] == ["group-00000.safetensors"]
    assert states.finished_states(shard.run) == {}
    with open_run(config) as opened:
        assert not directory.exists()
        assert opened.last_iteration == 0
        again = DirectShard(config)
        assert_same_bits(expected, again.with_forward(1) if forward else again.linear(1))


class Failed:
    """Stands for `ray.get` of a call that failed."""

    def __init__(self, cause: Exception) -> None:
        self.error = ray.exceptions.RayTaskError("merge", "Traceback …", cause)

    def __call__(self, _refs: object, timeout: object = None) -> object:
        raise self.error


def test_a_full_disk_is_told_from_other_trouble_with_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        monkeypatch.setattr(ray, "get", Failed(OSError(number, "full")))
        with pytest.raises(OSError, match="full") as caught:
            get_results([A_CALL])
        assert caught.value.errno == number
    monkeypatch.setattr(ray, "get", Failed(OSError(errno.EIO, "broken")))
    with pytest.raises(WorkerError, match="cannot read or write a file"):
        get_results([A_CALL])


def test_the_error_counts_what_is_missing(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case.make()
    with open_run(case.config(LINEAR)) as opened:
        unfinished = states.state_directory(opened.path, 1)
        unfinished.mkdir(parents=True)
        (unfinished / "group-00000.safetensors").write_bytes(bytes(40_960))
        with (unfinished / "holes").open("wb") as file:
            file.truncate(10**9)
        monkeypatch.setattr("shutil.disk_usage", lambda _path: _Usage(5_000))
        life = linear_life(opened.config)
        error = opened.disk_full(SpaceNeeds(30_000, 10_000, 2, life), NO_SPACE)
    assert error.what == "the disk is full: No space left on device"
    assert error.got == "5000 bytes free, and 40960 bytes in unfinished files, which go first"
    # Four states and the model, 130 000 in all.
    assert error.expected == (
        "130000 bytes: 4 states of 30000 bytes and the model of 10000 bytes; "
        "84040 bytes are missing"
    )
    assert "goes on after iteration 0" in (error.hint or "")


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=30)


@pytest.mark.usefixtures("local_ray")
def test_a_merge_on_a_full_disk_goes_on_once_there_is_room(
    case: MergeCase, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    whole = run(case.config(output="whole"))
    config = case.config(f"output={small_disk / 'run'}")
    run(config, stop_after=2)
    ballast = small_disk / "ballast"
    room = os.statvfs(small_disk)
    state = states.total_bytes(DirectShard(config).inputs.layout.shapes, 4)
    ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - state // 2))
    # Another program fills the disk after the check at the start.
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "check_disk_space", lambda *_arguments: None)
        with pytest.raises(DiskSpaceError, match="the disk is full: No space left") as caught:
            run(config)
    error = caught.value
    assert error.where == str(small_disk / "run")
    assert error.expected is not None
    assert "2 states of" in error.expected
    missing = int(error.expected.split("; ")[1].split()[0])
    assert 0 < missing < 3 * state
    assert "goes on after iteration 2" in (error.hint or "")
    assert sorted(states.finished_states(small_disk / "run")) == [1, 2]
    # What was said to be missing is what the run asks for at its start.
    with pytest.raises(DiskSpaceError, match="not enough room"):
        run(config)
    ballast.unlink()
    outcome = run(config)
    assert outcome.reason == "max_iterations"
    assert whole.model is not None
    assert outcome.model is not None
    assert_same_bits(load_all(whole.model), load_all(outcome.model))


@pytest.mark.usefixtures("local_ray")
def test_without_a_direct_transport_the_object_store_gives_the_same_bits(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make()
    stored = run(
        case.config("runtime.layer_shards=2", "runtime.transport=object_store", output="stored")
    )
    monkeypatch.setattr(placement, "join_transport", lambda *_arguments: "ImportError: no gloo")
    fallen = run(case.config("runtime.layer_shards=2", "runtime.transport=auto", output="fallen"))
    events = read_events(fallen.run / "events.jsonl")
    messages = [e["message"] for e in events if e["event"] == "warning"]
    assert [text for text in messages if "transport" in text] == [
        "no direct transport, using the object store: ImportError: no gloo"
    ]
    for iteration in range(1, 5):
        left, right = (load_all(states.state_directory(o.run, iteration)) for o in (stored, fallen))
        assert_same_bits(left, right)

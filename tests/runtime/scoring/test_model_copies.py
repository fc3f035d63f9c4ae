"""Models for engines on nodes that do not have them: what is copied, when, and what is left."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from numpy.typing import NDArray

from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.errors import DiskSpaceError, EvaluationError, WorkerError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.runtime.cluster.calls import EVALUATOR, get_results
from arm_ray.runtime.cluster.node_files import NodeFiles
from arm_ray.runtime.cluster.nodes import this_node
from arm_ray.runtime.scoring import model_copies
from arm_ray.runtime.scoring.model_copies import ModelCopies, start_on
from arm_ray.runtime.scoring.subject import model_source
from arm_ray.storage.store import StoredFile
from tests.builders.merge_case import MergeCase
from tests.doubles.in_process import Actor, LocalHandle

pytestmark = pytest.mark.usefixtures("local_ray")


class OtherNode(NodeFiles):
    """A node whose disk is a directory here: what it calls `/far/x` is `disk/x`."""

    def __init__(self, disk: Path) -> None:
        super().__init__(str(disk), "none")
        self.disk = disk
        self.read_bytes = 0

    def _here(self, path: Path) -> Path:
        return self.disk / path.relative_to("/far")

    def listing(self, directory: Path, recursive: bool) -> dict[str, StoredFile]:
        return super().listing(self._here(directory), recursive)

    def read(self, file: Path, begin: int, end: int) -> NDArray[Any]:
        self.read_bytes += end - begin
        return super().read(self._here(file), begin, end)


class Nodes:
    """The driver's node, and the copies of an engine's."""

    def __init__(self, root: Path) -> None:
        self.disk = root / "disk"
        self.case = MergeCase(root)
        self.case.make()
        self.disk.mkdir()
        for path in (root / "base", *self.case.candidates):
            shutil.move(path, self.disk / path.name)
        self.home = OtherNode(self.disk)
        self.scratch = root / "scratch"
        self._made: list[ModelCopies] = []
        self.copies = self.engines_node(self.home)

    def engines_node(self, home: NodeFiles, scratch: Path | None = None) -> ModelCopies:
        made = ModelCopies(LocalHandle(Actor(home)), str(scratch or self.scratch))
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in self._made:
            made.remove()

    def left(self) -> list[str]:
        found = (p for p in self.scratch.rglob("*") if p.is_file() and p.name != ".lock")
        return sorted(p.name for p in found)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setattr("arm_ray.runtime.shards.files._LOOK_S", 0.0)
    made = Nodes(tmp_path)
    yield made
    made.close()


def weights(path: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(path)
    return {name: tensor.clone() for name, tensor in opened.read(opened.tensors).items()}


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def test_a_model_is_copied_once_and_removed_when_the_next_one_comes(nodes: Nodes) -> None:
    described = nodes.copies.describe("/far/base", "/far/base")
    assert described.source.path == described.tokenizer != "/far/base"
    assert "tokenizer.json" in nodes.left()
    assert not any(name.endswith(".safetensors") for name in nodes.left())
    placed = nodes.copies.place(ModelSource("/far/base"))
    # What described it was there, its weights were not.
    assert described.fetched_bytes + placed.fetched_bytes == size(nodes.disk / "base")
    assert nodes.copies.place(ModelSource("/far/base")).fetched_bytes == 0
    assert nodes.home.read_bytes == size(nodes.disk / "base")
    expected = weights(nodes.disk / "base")
    found = weights(Path(placed.source.path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    following = nodes.copies.place(ModelSource("/far/checkpoint-10"))
    assert not Path(placed.source.path).exists()
    assert Path(following.source.path).name == "checkpoint-10"
    assert following.fetched_bytes == size(nodes.disk / "checkpoint-10")
    nodes.copies.remove()
    assert not nodes.scratch.exists()


def test_what_the_node_has_is_read_in_place(nodes: Nodes, tmp_path: Path) -> None:
    home = NodeFiles(None, "none")
    copies = nodes.engines_node(home)
    placed = copies.place(ModelSource(str(nodes.disk / "base")))
    assert (placed.source.path, placed.fetched_bytes) == (str(nodes.disk / "base"), 0)
    assert nodes.left() == []

    class OldCopies(NodeFiles):
        """Another node has other files under the same path."""

        def listing(self, directory: Path, recursive: bool) -> dict[str, StoredFile]:
            found = super().listing(directory, recursive)
            changed = found["model.safetensors"]
            time_ns = changed.time_ns + 1
            return {**found, "model.safetensors": StoredFile(changed.num_bytes, "new", time_ns)}

    copies = nodes.engines_node(OldCopies(None, "none"))
    placed = copies.place(ModelSource(str(nodes.disk / "base")))
    assert placed.source.path.startswith(str(nodes.scratch))
    assert placed.fetched_bytes == size(nodes.disk / "base")


def test_a_file_that_shows_a_moment_later_is_waited_for(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def is_here(directory: Path, files: object) -> bool:
        looks.append(directory)
        return len(looks) == 3

    monkeypatch.setattr(model_copies, "_is_here", is_here)
    assert nodes.copies.place(ModelSource("/far/base")).fetched_bytes == 0


def test_a_model_written_anew_is_copied_anew(nodes: Nodes) -> None:
    nodes.copies.place(ModelSource("/far/base"))
    file = nodes.disk / "base" / "model.safetensors"
    shutil.copyfile(nodes.disk / "checkpoint-10" / "model.safetensors", file)
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 10**9))
    placed = nodes.copies.place(ModelSource("/far/base"))
    # All of it: nothing of the old model is taken for one of the new.
    assert placed.fetched_bytes == size(nodes.disk / "base")
    found, expected = weights(Path(placed.source.path)), weights(nodes.disk / "checkpoint-10")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_brings_its_base_and_shards_all_their_files(nodes: Nodes) -> None:
    adapter = nodes.disk / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"):
        (adapter / name).write_bytes(b"{}")
    source = ModelSource("/far/base", "peft:/far/adapter")
    placed = nodes.copies.place(source)
    assert placed.fetched_bytes == size(nodes.disk / "base") + 4
    assert placed.source.weights is not None
    assert placed.source.weights.startswith(f"peft:{nodes.scratch}")
    assert placed.source.weights.endswith("/adapter")
    assert "optimizer.pt" not in nodes.left()

    step = nodes.disk / "run" / "global_step5" / "zero"
    step.mkdir(parents=True)
    (step / "states.pt").write_bytes(b"123456")
    (step.parent.parent / "latest").write_bytes(b"global_step5")
    placed = nodes.copies.place(ModelSource("/far/base", "peft:/far/adapter", "zero:/far/run"))
    assert placed.source.base is not None
    assert nodes.left().count("states.pt") == 1
    run = Path(placed.source.base.removeprefix("zero:"))
    assert (run / "global_step5" / "zero" / "states.pt").read_bytes() == b"123456"


def test_a_source_names_its_directories(nodes: Nodes) -> None:
    opened = open_given(str(nodes.disk / "base"))
    source = model_source(opened)
    assert source.directories == (nodes.disk / "base",)
    adapted = ModelSource("/a", "peft:/b", "s3://bucket/c")
    assert adapted.directories == (Path("/a"), Path("/b"))


def test_what_can_go_wrong_is_said(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="a model is gone") as gone:
        nodes.copies.place(ModelSource("/far/nothing"))
    assert "/far/nothing" in str(gone.value)
    usage = shutil.disk_usage(nodes.disk)._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(DiskSpaceError, match="10 bytes free") as full:
            nodes.copies.place(ModelSource("/far/base"))
    assert f"{size(nodes.disk / 'base')} bytes" in str(full.value)

    class Shrinking(OtherNode):
        def read(self, file: Path, begin: int, end: int) -> NDArray[Any]:
            return super().read(file, begin, end)[:-1]

    copies = nodes.engines_node(Shrinking(nodes.disk))
    with pytest.raises(EvaluationError, match="written anew while it was copied"):
        copies.place(ModelSource("/far/base"))
    assert nodes.left() == []
    # What failed is not taken for a copy.
    assert nodes.copies.place(ModelSource("/far/base")).fetched_bytes == size(nodes.disk / "base")
    blocked = nodes.scratch.with_name("file")
    blocked.write_text("")
    copies = nodes.engines_node(nodes.home, blocked)
    with pytest.raises(EvaluationError, match="cannot be written on an engine's node"):
        copies.place(ModelSource("/far/base"))


def test_a_model_that_changes_while_it_is_copied_is_not_taken(nodes: Nodes) -> None:
    class Rewritten(OtherNode):
        def read(self, file: Path, begin: int, end: int) -> NDArray[Any]:
            found = super().read(file, begin, end)
            there = self._here(file)
            os.utime(there, ns=(0, there.stat().st_mtime_ns + 10**9))
            return found

    copies = nodes.engines_node(Rewritten(nodes.disk))
    with pytest.raises(EvaluationError, match="written anew while it was copied"):
        copies.place(ModelSource("/far/base"))
    assert nodes.left() == []


def test_the_other_steps_and_the_optimizer_stay_where_they_are(nodes: Nodes) -> None:
    def write(*names: str) -> None:
        for name in names:
            file = nodes.disk / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")

    write("zero/global_step1/a.pt", "zero/global_step2/b.pt", "zero/config.json")
    (nodes.disk / "zero" / "latest").write_text("global_step2")
    nodes.copies.place(ModelSource("/far/base", "zero:/far/zero"))
    assert {"b.pt", "latest", "config.json"} <= set(nodes.left())
    assert "a.pt" not in nodes.left()
    write("elsewhere/model_world_size_1_rank_0.pt", "elsewhere/optim_world_size_1_rank_0.pt")
    (nodes.disk / "step").mkdir()
    (nodes.disk / "step" / "actor").symlink_to(nodes.disk / "elsewhere")
    nodes.copies.place(ModelSource("/far/base", "fsdp:/far/step"))
    assert "model_world_size_1_rank_0.pt" in nodes.left()
    assert not [name for name in nodes.left() if name.startswith("optim") or name == "b.pt"]


def test_the_hub_s_cache_is_read_in_place(nodes: Nodes) -> None:
    snapshot = nodes.disk / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(nodes.disk / "base", snapshot)

    class OtherTimes(NodeFiles):
        def listing(self, directory: Path, recursive: bool) -> dict[str, StoredFile]:
            found = super().listing(directory, recursive)
            return {n: StoredFile(f.num_bytes, "", f.time_ns + 1) for n, f in found.items()}

    copies = nodes.engines_node(OtherTimes(None, "none"))
    assert copies.place(ModelSource(str(snapshot))).fetched_bytes == 0
    assert copies.place(ModelSource(str(nodes.disk / "base"))).fetched_bytes > 0


def test_copies_of_the_dead_are_removed_and_those_of_others_are_not(nodes: Nodes) -> None:
    other = nodes.engines_node(nodes.home)
    others = other.place(ModelSource("/far/base")).source.path
    nodes.copies.place(ModelSource("/far/base"))
    dead = nodes.scratch / "models" / "dead"
    dead.mkdir()
    for name in (".lock", "model.safetensors"):
        (dead / name).write_text("")
    nodes.engines_node(nodes.home).place(ModelSource("/far/checkpoint-10"))
    assert not dead.exists()
    assert Path(others, "model.safetensors").exists()
    nodes.copies.remove()
    assert Path(others, "model.safetensors").exists()


def test_a_copy_that_is_being_made_is_given_up(nodes: Nodes) -> None:
    class Removing(OtherNode):
        def read(self, file: Path, begin: int, end: int) -> NDArray[Any]:
            removing.start()
            while not copies._is_removed:
                time.sleep(0.01)
            return super().read(file, begin, end)

    copies = nodes.engines_node(Removing(nodes.disk))
    removing = threading.Thread(target=copies.remove)
    with pytest.raises(WorkerError, match="given up"):
        copies.place(ModelSource("/far/base"))
    removing.join()
    assert not nodes.scratch.exists()


class Failing(OtherNode):
    """A node that does not let its files be read."""

    def read(self, file: Path, begin: int, end: int) -> NDArray[Any]:
        raise PermissionError(13, "Permission denied", str(file))


def test_actors_come_again_and_errors_keep_their_meaning(nodes: Nodes) -> None:
    node = this_node()
    home = start_on(node, OtherNode, nodes.disk)
    copies = start_on(node, ModelCopies, home, str(nodes.scratch))
    try:
        whole, base = size(nodes.disk / "base"), ModelSource("/far/base")
        assert ray.get(copies.call(ModelCopies.place, base)).fetched_bytes == whole
        for actor in (copies, home):
            ray.kill(actor.actor, no_restart=False)
        # What it held is not known any more: it is copied once more, and the old copy is gone.
        assert ray.get(copies.call(ModelCopies.place, base)).fetched_bytes == whole
        assert nodes.left().count("model.safetensors") == 1
        failing = start_on(node, Failing, nodes.disk)
        of_failing = start_on(node, ModelCopies, failing, str(nodes.scratch))
        with pytest.raises(EvaluationError, match="cannot be read, to copy it") as caught:
            get_results([of_failing.call(ModelCopies.place, ModelSource("/far/base"))], EVALUATOR)
        assert "PermissionError" in str(caught.value)
        failing.end()
        with pytest.raises(WorkerError, match="what serves the driver's files was lost"):
            get_results([of_failing.call(ModelCopies.place, ModelSource("/far/base"))], EVALUATOR)
        of_failing.end()
    finally:
        ray.get(copies.call(ModelCopies.remove))
        for actor in (copies, home):
            actor.end()

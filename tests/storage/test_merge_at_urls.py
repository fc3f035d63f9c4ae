"""Whole merges with inputs and output in a local S3 server, against the same on disk."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.provenance import PROVENANCE_NAME
from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.errors import NoSuchObjectError, RunDirectoryError, StorageError
from arm_ray.events import read_events
from arm_ray.runtime.merge.run import MergeOutcome, merge
from arm_ray.storage import lease
from arm_ray.storage.store import Store
from tests.builders.merge_case import MergeCase
from tests.doubles import in_process, stores

LINEAR = "method.operator=task_arithmetic"
pytestmark = pytest.mark.usefixtures("shards_in_process")


@pytest.fixture(scope="module")
def on_disk(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    """A case, merged on disk."""
    case = MergeCase(tmp_path_factory.mktemp("case")).make("qwen2.5", max_shard_size="100KB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arm_ray.runtime.merge.controller.placed_shards", in_process.placed_shards)
        merge(case.config(), console=Console(quiet=True))
    return case


class Remote:
    """The same case in a bucket, and merges of it."""

    def __init__(self, case: MergeCase, bucket: str, tmp_path: Path) -> None:
        self.case, self.bucket = case, bucket
        self.url = f"{bucket}/merges/run"
        self.scratch = tmp_path / "scratch"
        self.said = io.StringIO()
        for directory in (case.root / "base", *case.candidates):
            stores.put(directory, f"{bucket}/models/{directory.name}")
        Store(bucket).upload(case.root / "calibration.jsonl", "calibration.jsonl")

    def config(self, *overrides: str) -> MergeConfig:
        content: dict[str, Any] = self.case.content()
        content["base"] = f"{self.bucket}/models/base"
        content["candidates"] = [f"{self.bucket}/models/{p.name}" for p in self.case.candidates]
        content["calibration"]["path"] = f"{self.bucket}/calibration.jsonl"
        content["output"] = self.url
        content["runtime"] |= {"scratch": str(self.scratch), "layer_shards": 1}
        return parse_merge_config(content, overrides)

    def merge(self, *overrides: str, **options: Any) -> MergeOutcome:
        console = Console(file=self.said, width=300)
        return merge(self.config(*overrides), console=console, **options)

    def assert_same(self, name: str) -> None:
        """Compare a state or the model with the one on disk, bit for bit."""
        local = self.case.root / "run" / name
        store = Store(f"{self.url}/{name}")
        files = {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()}
        assert store.files(recursive=True).keys() == files
        for file in files - {"README.md", "state.json", PROVENANCE_NAME}:
            assert store.read_all(file) == (local / file).read_bytes(), file
        if "state.json" in files:
            found = json.loads(store.read_all("state.json"))
            expected = json.loads((local / "state.json").read_text())
            assert found == expected
        if PROVENANCE_NAME in files:
            # When it was made, and where from, differ; what was made does not.
            found = json.loads(store.read_all(PROVENANCE_NAME))["files"]
            expected = json.loads((local / PROVENANCE_NAME).read_text())["files"]
            assert found["model.safetensors"] == expected["model.safetensors"]


@pytest.fixture
def remote(
    on_disk: MergeCase, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    monkeypatch.setattr("arm_ray.runtime.output.upload.PAUSES_S", (0.0, 0.0))
    return Remote(on_disk, bucket, tmp_path)


def kept(url: str) -> set[str]:
    """The states at a URL."""
    return {name.split("/")[1] for name in stores.names(url) if name.startswith("states/")}


def test_a_halted_merge_goes_on_from_nothing_to_the_same_bits(remote: Remote) -> None:
    store = Store(remote.url)
    remote.merge("keep_states=last", "runtime.layer_shards=2", stop_after=3)
    assert kept(remote.url) == {"0002", "0003"}
    for name in ("states/0002", "states/0003"):
        remote.assert_same(name)
    files = stores.names(remote.url)
    assert {"config.yaml", "inputs.json", "events.jsonl"} <= files
    assert not any(name.startswith((lease.NAME, "model")) for name in files)
    # No weights of the inputs on the driver's side: only what its shards copied.
    assert not list((remote.scratch / "urls").rglob("*.safetensors"))
    assert list((remote.scratch / "copies").rglob("*.safetensors"))
    shutil.rmtree(remote.scratch)
    outcome = remote.merge("keep_states=last")
    assert outcome.iterations == 4
    assert not list((remote.scratch / "copies").rglob("*.safetensors"))
    assert kept(remote.url) == {"0004"}
    for name in ("states/0004", "model"):
        remote.assert_same(name)
    events = [e["event"] for e in read_events(outcome.run / "events.jsonl")]
    assert events.count("run_started") == 2
    assert events.count("iteration_finished") == 4
    assert events[-1] == "run_finished"
    assert store.read_all("events.jsonl") == (outcome.run / "events.jsonl").read_bytes()
    files = stores.names(remote.url)
    for name in files:
        assert stores.SECRET.encode() not in store.read_all(name), name
    assert stores.SECRET not in remote.said.getvalue()
    assert f"the run is at {remote.url}" in remote.said.getvalue()
    # With an empty scratch directory, the complete run is seen to be.
    shutil.rmtree(remote.scratch)
    again = remote.merge("keep_states=last")
    assert (again.reason, again.iterations) == ("complete", 4)
    assert f"complete: {remote.url}/model" in remote.said.getvalue()
    assert stores.names(remote.url) == files
    with pytest.raises(RunDirectoryError, match=r"method\.coefficient"):
        remote.merge("method.coefficient=0.5")


@pytest.mark.actors
def test_a_failed_upload_is_made_up_for(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Store.upload
    tried: list[str] = []

    def fails(self: Store, local: Path, name: str) -> int:
        if name.startswith("model/") and name.endswith("tokenizer.json"):
            tried.append(name)
            raise StorageError("a URL cannot be written", where=self.url / name, got="a test")
        return upload(self, local, name)

    monkeypatch.setattr(Store, "upload", fails)
    with pytest.raises(StorageError, match="could not be uploaded as a whole") as caught:
        remote.merge(LINEAR)
    assert f"everything is in {remote.scratch}/runs" in str(caught.value)
    assert len(tried) >= 3
    names = stores.names(remote.url)
    # The weights are up, and nothing takes them for a model.
    assert "model/config.json" not in names
    assert any(n.startswith("model/") and n.endswith(".safetensors") for n in names)
    assert lease.NAME not in names
    monkeypatch.undo()
    for name, value in stores.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    outcome = remote.merge(LINEAR)
    assert outcome.reason == "complete"
    files = {
        p.relative_to(outcome.run).as_posix()
        for name in ("states", "model")
        for p in (outcome.run / name).rglob("*")
        if p.is_file()
    }
    assert "model/config.json" in files
    assert files <= stores.names(remote.url)
    for name in files:
        assert Store(remote.url).read_all(name) == (outcome.run / name).read_bytes()


def test_what_is_not_ours_is_not_touched(remote: Remote) -> None:
    store = Store(remote.url)
    store.write("notes.txt", b"mine")
    with pytest.raises(RunDirectoryError, match="something else than a run"):
        remote.merge()
    assert store.files(recursive=True).keys() == {"notes.txt"}
    store.remove(["notes.txt"])
    store.write(lease.NAME, json.dumps({"owner": "another-host, process 1, x"}).encode())
    with pytest.raises(RunDirectoryError, match="another-host"):
        remote.merge()
    assert store.files(recursive=True).keys() == {lease.NAME}


def test_bad_places_are_told_before_anything_starts(remote: Remote) -> None:
    with pytest.raises(NoSuchObjectError, match="no such bucket"):
        remote.merge("output=s3://no-such-bucket-here/run")
    with pytest.raises(NoSuchObjectError, match="base: there is nothing at the URL"):
        remote.merge(f"base={remote.bucket}/models/none")
    with pytest.raises(StorageError, match="read only"):
        remote.merge("output=hf://owner/name")
    assert not states.state_directories(remote.scratch / "runs")


def test_a_merge_at_google_cloud_storage(
    on_disk: MergeCase, gcs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arm_ray.runtime.output.upload.PAUSES_S", (0.0, 0.0))
    remote = Remote(on_disk, gcs, tmp_path)
    # Ray's workers, which read the calibration data, do not know the emulator.
    given = ("keep_states=last", f"calibration.path={on_disk.root / 'calibration.jsonl'}")
    remote.merge(*given, stop_after=3)
    assert kept(remote.url) == {"0002", "0003"}
    shutil.rmtree(remote.scratch)
    assert remote.merge(*given).iterations == 4
    for name in ("states/0004", "model"):
        remote.assert_same(name)

"""Results of an evaluation at a URL, and the lease that keeps two writers apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arm_ray.config import scratch_path
from arm_ray.errors import EvaluationError, RunDirectoryError, StorageError
from arm_ray.runtime.output.opening import results_at
from arm_ray.storage import lease
from arm_ray.storage.store import Store
from tests.doubles.stores import names


def test_results_are_at_the_url_also_of_what_failed(bucket: str) -> None:
    url = f"{bucket}/scores"
    with results_at(url) as local:
        (local / "base").mkdir(parents=True)
        (local / "config.yaml").write_text("models: {}\n")
        (local / "base" / "gsm8k.jsonl").write_text("{}\n")
        # Another process of this machine, and one of another.
        with pytest.raises(RunDirectoryError, match="another evaluation"), results_at(url):
            pass
    assert names(url) == {"config.yaml", "base/gsm8k.jsonl"}
    shutil.rmtree(scratch_path(None))

    def fails() -> None:
        with results_at(url) as local:
            assert (local / "base" / "gsm8k.jsonl").read_text() == "{}\n"
            (local / "base" / "gsm8k.jsonl").write_text("{}\n{}\n")
            raise EvaluationError("an engine failed")

    with pytest.raises(EvaluationError, match="an engine failed"):
        fails()
    assert Store(url).read_all("base/gsm8k.jsonl") == b"{}\n{}\n"
    assert lease.NAME not in names(url)
    with pytest.raises(StorageError, match="read only"), results_at("hf://owner/name"):
        pass


def test_a_lease_counts_while_it_is_fresh(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{bucket}/run")
    store.write(lease.NAME, json.dumps({"owner": "another-host, process 1, x"}).encode())
    with pytest.raises(RunDirectoryError, match="another-host"), lease.leased(store, "merge"):
        pass
    monkeypatch.setattr(lease, "VALID_S", -1.0)
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.05)
    with lease.leased(store, "merge") as held:
        assert b"another-host" not in store.read_all(lease.NAME)
        store.write(lease.NAME, b"{}")
        held._thread.join(timeout=10)
        assert held.is_lost
    # What another one holds by now is left to it.
    assert names(str(store)) == {lease.NAME}


def test_what_is_no_evaluation_is_not_touched(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/mine")
    (tmp_path / "notes.txt").write_text("mine")
    store.upload(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(RunDirectoryError, match="something else"), results_at(str(store)):
        pass
    assert names(str(store)) == {"notes.txt"}

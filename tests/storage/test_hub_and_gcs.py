"""`hf://` by the hub's client against a stand-in for its server, `gs://` against an emulator."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from arm_ray.checkpoints.formats import open_given
from arm_ray.errors import NoSuchObjectError, StorageAccessError
from arm_ray.storage import filesystem
from arm_ray.storage.store import Store
from tests.builders.models import save, tiny_model


class _Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of the hub to list a repository and to read ranges of its files."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/owner/name":
            self._json({"id": "owner/name", "sha": "0" * 40, "siblings": []})
        elif path == "/api/models/owner/name/tree/main":
            self._json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": f"{len(d):040x}"}
                    for n, d in self.files.items()
                ]
            )
        elif (name := path.removeprefix("/owner/name/resolve/main/")) in self.files:
            data = self.files[name]
            begin, _, end = (
                self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            )
            part = data[int(begin) : int(end) + 1 if end else len(data)]
            self._send(206 if "Range" in self.headers else 200, part)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        sent = {"Content-Length": str(len(body)), "ETag": '"x"', "X-Repo-Commit": "0" * 40}
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    served = type("Served", (_Hub,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield served
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_read_by_range(hub: type[_Hub], tmp_path: Path) -> None:
    local = save(tiny_model("qwen3", seed=1), tmp_path / "model", max_shard_size="100KB")
    hub.files = {p.name: p.read_bytes() for p in local.iterdir()}
    hub.files["sub/notes.txt"] = b"hello"
    assert "sub/notes.txt" not in Store("hf://owner/name").files()
    found = open_given("hf://owner/name", scratch=tmp_path / "scratch")
    on_disk = open_given(str(local))
    assert found.tensors.keys() == on_disk.tensors.keys()
    name = next(iter(found.tensors))
    assert bool((found.read([name])[name] == on_disk.read([name])[name]).all())
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    with pytest.raises(NoSuchObjectError, match="repository not found"):
        Store("hf://owner/none").files()


def test_files_of_google_cloud_storage(gcs: str, tmp_path: Path) -> None:
    store = Store(f"{gcs}/run")
    assert store.files() == {}
    store.write("a.txt", b"hello\nworld\n")
    (tmp_path / "b.txt.gz").write_bytes(b"as it is")
    store.upload(tmp_path / "b.txt.gz", "deep/b.txt.gz")
    files = store.files(recursive=True)
    assert {name: file.num_bytes for name, file in files.items()} == {
        "a.txt": 12,
        "deep/b.txt.gz": 8,
    }
    assert store.read("a.txt", 2, 5) == b"llo"
    store.download("deep/b.txt.gz", tmp_path / "down", files["deep/b.txt.gz"])
    assert (tmp_path / "down").read_bytes() == b"as it is"
    with pytest.raises(NoSuchObjectError, match="no such object"):
        store.read("none", 0, 1)
    with pytest.raises(NoSuchObjectError, match="no such bucket"):
        Store("gs://none-of-that-name/x").files()
    store.remove(["a.txt", "deep/b.txt.gz", "none"])
    assert store.files(recursive=True) == {}


def test_a_machine_without_credentials_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # No service account of the machine answers.
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setattr(filesystem, "_GCS_RETRIES", timedelta(seconds=1))
    with pytest.raises(StorageAccessError, match="no credentials were found") as caught:
        Store("gs://bucket-of-nobody/x").files()
    assert "gcloud auth application-default login" in str(caught.value)

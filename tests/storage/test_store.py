"""Files in a local S3 server, and what is said where they cannot be had."""

from __future__ import annotations

import http.server
import importlib
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import DiskSpaceError, NoSuchObjectError, StorageAccessError, StorageError
from arm_ray.storage.mirror import mirror, present
from arm_ray.storage.store import Store, find_url, open_url
from tests.doubles import stores


def test_files_are_written_listed_read_and_removed(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/run")
    assert store.files() == {}
    store.write("a.txt", b"hello\nworld\n")
    local = tmp_path / "b.bin"
    local.write_bytes(bytes(range(256)) * 100)
    assert store.upload(local, "deep/b.bin") == 25600
    assert list(store.files()) == ["a.txt"]
    assert {name: f.num_bytes for name, f in store.files(recursive=True).items()} == {
        "a.txt": 12,
        "deep/b.bin": 25600,
    }
    assert store.read("a.txt", 2, 5) == b"llo"
    assert store.read("a.txt", 6, 100) == b"world\n"
    assert pickle.loads(pickle.dumps(store)).read_all("a.txt") == b"hello\nworld\n"
    with open_url(f"{bucket}/run/a.txt") as file:
        assert file.readline() == b"hello\n"
        file.seek(1)
        assert file.readline() == b"ello\n"
    store.remove(["a.txt", "never-there"])
    assert list(store.files(recursive=True)) == ["deep/b.bin"]
    assert find_url(f"{bucket}/run/a.txt") is None


def test_a_download_is_whole_and_has_the_time_of_what_it_is_of(bucket: str, tmp_path: Path) -> None:
    store = Store(bucket)
    store.write("a.txt", b"hello")
    file = store.files()["a.txt"]
    store.download("a.txt", tmp_path / "down" / "a.txt", file)
    assert (tmp_path / "down" / "a.txt").read_bytes() == b"hello"
    assert (tmp_path / "down" / "a.txt").stat().st_mtime_ns == file.time_ns
    assert len(list((tmp_path / "down").iterdir())) == 1


def test_a_download_without_room_is_refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(bucket)
    store.write("a.txt", b"hello")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 3})())
    with pytest.raises(DiskSpaceError, match="3 bytes free"):
        store.download("a.txt", tmp_path / "a.txt", store.files()["a.txt"])
    assert not (tmp_path / "a.txt").exists()


def test_a_local_copy_follows_what_it_is_of(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/model")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        store.write(name, b"{}")
    copy = mirror(store, tmp_path)
    found = {path.name for path in copy.iterdir() if not path.name.startswith(".")}
    assert found == {"config.json", "tokenizer.json"}
    before = (copy / "config.json").stat().st_ino
    # Of a download whose process was killed, and of one of another file.
    (copy / ".config.json.0123456789ab.partial").touch()
    (copy / ".gone.json.0123456789ab.partial").touch()
    store.remove(["tokenizer.json"])
    assert mirror(store, tmp_path) == copy
    assert not (copy / "tokenizer.json").exists()
    assert (copy / "config.json").stat().st_ino == before
    assert not list(copy.glob(".*.partial"))
    # A node that has none makes it from the path alone.
    elsewhere = Path(str(copy).replace(str(tmp_path), str(tmp_path / "other")))
    assert (present(elsewhere) / "config.json").read_bytes() == b"{}"


def test_what_is_missing_is_named(bucket: str) -> None:
    with pytest.raises(NoSuchObjectError, match="no such object"):
        Store(bucket).read("none", 0, 1)
    for work in (
        lambda: Store("s3://no-such-bucket-here/x").files(),
        lambda: Store("s3://no-such-bucket-here").files(),
        lambda: Store("s3://no-such-bucket-here/x").read("a", 0, 1),
        lambda: Store("s3://no-such-bucket-here/x").write("a", b"1"),
        lambda: open_url("s3://no-such-bucket-here/x/a"),
    ):
        with pytest.raises(NoSuchObjectError, match="no such bucket") as caught:
            work()
        assert "s3://no-such-bucket-here" in str(caught.value)


class _Denying(http.server.BaseHTTPRequestHandler):
    """Denies everything, in S3's words, as to one who does not sign."""

    def do_GET(self) -> None:
        stores.deny(self, f"Access Denied: {stores.SECRET}")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def denying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Denying)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in stores.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    yield
    server.shutdown()
    server.server_close()


def test_missing_credentials_are_told_from_those_that_may_not(
    denying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageAccessError) as caught:
        Store("s3://bucket/x").files()
    assert "no credentials" not in str(caught.value)
    assert stores.SECRET not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for work in (
        lambda: Store("s3://bucket/x").files(),
        lambda: Store("s3://bucket/x").read("a", 0, 1),
        lambda: Store("s3://bucket/x").write("a", b"1"),
    ):
        with pytest.raises(StorageAccessError, match="no credentials were found") as caught:
            work()
        assert "AWS_ACCESS_KEY_ID" in str(caught.value)


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        Store(bucket).files()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def without_hub(name: str) -> Any:
        if name == "huggingface_hub":
            raise ImportError("No module named 'huggingface_hub'")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without_hub)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="pip install --upgrade huggingface_hub"):
        Store("hf://owner/name").files()


def test_the_hub_is_read_only() -> None:
    with pytest.raises(StorageError, match="read only"):
        Store("hf://owner/name").write("a", b"1")

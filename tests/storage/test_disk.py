"""Errors of files in words of ours, and the writers that leave nothing half done."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import ssl
from pathlib import Path
from typing import IO

import pytest

from arm_ray.cli.entry import main
from arm_ray.errors import ArmRayError, DiskSpaceError, RunDirectoryError
from arm_ray.runtime.output.claim import claimed
from arm_ray.storage import atomic
from arm_ray.storage.disk import file_error, files_told


def os_error(name: str, file: str | None = "/a/file") -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ENOSPC", DiskSpaceError),
        ("EDQUOT", DiskSpaceError),
        ("EIO", RunDirectoryError),
        ("EROFS", RunDirectoryError),
        ("EACCES", RunDirectoryError),
        ("ENOENT", RunDirectoryError),
        ("ESTALE", RunDirectoryError),
    ],
)
def test_what_a_file_says_becomes_an_error_with_a_hint(name: str, kind: type[ArmRayError]) -> None:
    with pytest.raises(kind) as caught, files_told("/somewhere"):
        raise os_error(name)
    assert caught.value.where == "/a/file"
    assert os.strerror(getattr(errno, name)) in caught.value.what
    assert caught.value.hint
    nameless = file_error(os_error(name, None), "/somewhere")
    assert nameless is not None
    assert nameless.where == "/somewhere"


@pytest.mark.parametrize("name", ["EPIPE", "ECONNRESET", "ETIMEDOUT", "ECHILD", "ESRCH"])
def test_what_is_about_no_file_stays_what_it_is(name: str) -> None:
    with pytest.raises(OSError) as caught, files_told("/somewhere"):  # noqa: PT011 -- see below
        raise os_error(name, None)
    assert caught.value.errno == getattr(errno, name)
    assert file_error(OSError("a library's own words")) is None


def test_the_network_and_the_process_are_no_files() -> None:
    """Their numbers may be those of files."""
    assert file_error(socket.gaierror(-2, "Name or service not known"), "/run") is None
    assert file_error(ssl.SSLError(1, "certificate verify failed"), "/run") is None
    for name in ("ENETUNREACH", "ENOMEM", "EAGAIN"):
        assert file_error(os_error(name, None), "/run") is None
    many = file_error(os_error("EMFILE"))
    assert many is not None
    assert "ulimit -n" in str(many.hint)


def test_every_job_in_a_directory_tells_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="Input/output error"), claimed(tmp_path, "merge"):
        raise os_error("EIO")


def test_a_command_tells_of_files_beside_its_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_options: object) -> int:
        raise os_error("EROFS")

    monkeypatch.setattr("arm_ray.cli.looking._report", fail)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["report", "run"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.startswith("error: a file cannot be read or written: Read-only file system")
    assert "Traceback" not in said


def test_the_first_error_is_told_where_nothing_can_be_removed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(_self: Path, *, missing_ok: bool = False) -> None:
        raise os_error("EROFS")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OSError, match="No space left"), atomic.atomic_file(tmp_path / "a"):
        raise os_error("ENOSPC")


def test_copies_are_whole_and_replace_what_is_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new" * 1000)
    os.utime(source, ns=(10**18, 10**18))
    source.chmod(0o640)
    target.write_bytes(b"old")
    atomic.copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mtime_ns != 10**18
    atomic.copy_file(source, target, keeps_times=True)
    assert target.stat().st_mtime_ns == 10**18
    assert target.stat().st_mode == source.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_tree_is_copied_up_to_the_first_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "a" / "one").write_text("1")
    (tmp_path / "a" / "below" / "two").write_text("2")
    (tmp_path / "a" / "link").symlink_to("one")
    atomic.copy_tree(tmp_path / "a", tmp_path / "b")
    found = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*")}
    assert found == {"below", "below/two", "link", "one"}
    assert not (tmp_path / "b" / "link").is_symlink()
    copied: list[str] = []

    def copy(source: Path, _target: Path) -> None:
        copied.append(source.name)
        raise os_error("ENOSPC")

    # With its number, by which a full disk is told from other trouble.
    with pytest.raises(DiskSpaceError), files_told(tmp_path):
        atomic.copy_tree(tmp_path / "a", tmp_path / "c", copy)
    assert copied == ["two"]


def test_what_gets_a_name_is_synced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a name is there only with what it is the name of."""
    order: list[str] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(handle: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"name {target.name}")
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Path:
        order.append(f"name {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    partial = tmp_path / "model.partial"
    partial.mkdir()
    atomic.write_text(partial / "README.md", "text")
    atomic.copy_file(partial / "README.md", partial / "copy")
    atomic.put_directory(partial, tmp_path / "model")
    (tmp_path / "b.partial").write_text("x")
    atomic.put_file(tmp_path / "b.partial", tmp_path / "b")
    assert order == [
        "sync .README.md.partial", "name README.md", "sync .copy.partial", "name copy",
        "sync model.partial", "name model", f"sync {tmp_path.name}", "sync b.partial", "name b",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_has_no_end_is_not_copied(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    endless = tmp_path / "a" / "file"
    if kind == "a pipe":
        os.mkfifo(endless)
    else:
        endless.symlink_to("/dev/zero")
    with pytest.raises(OSError, match=f"no file, but {kind}"):
        atomic.copy_file(endless, tmp_path / "b")
    with pytest.raises(OSError, match=f"no file, but {kind}"):
        atomic.copy_tree(tmp_path / "a", tmp_path / "c")
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "c", "file"}


def test_a_tree_within_itself_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "a" / "other").mkdir()
    (tmp_path / "a" / "twice").symlink_to("other")
    atomic.copy_tree(tmp_path / "a", tmp_path / "b")
    for name in ("first", "second"):
        (tmp_path / "a" / "below" / name).symlink_to("..")
    with pytest.raises(OSError, match="leads back") as caught:
        atomic.copy_tree(tmp_path / "a", tmp_path / "c")
    assert caught.value.filename == str(tmp_path / "a" / "below" / "first")


def killed_while_writing(path: Path) -> None:
    """Have a process write a file, and end before it is whole."""
    child = os.fork()
    if child == 0:
        with atomic.atomic_file(path, may_race=True) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_killed_writers_leave_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in ("page", "page", "other"):
        killed_while_writing(tmp_path / name)
    assert len(names_in(tmp_path)) == 2, "one of each file, as each removes those of its own"
    atomic.write_text(tmp_path / "page", "whole", may_race=True)
    left = names_in(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".other.")
    assert left[1] == "page"
    with claimed(tmp_path, "merge"):
        assert names_in(tmp_path) == [".lock", "page"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with atomic.atomic_file(tmp_path / "a", may_race=True) as first:
        first.write(b"first")
        atomic.write_text(tmp_path / "a", "second", may_race=True)
        with claimed(tmp_path, "merge"):
            assert Path(first.name).exists()
    assert (tmp_path / "a").read_text() == "first"
    for name in (".a.partial", ".a.sent.partial", ".a.0123456789ab", "a.0123456789ab.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".a.0123456789ab.partial").mkdir()
    before = names_in(tmp_path)
    atomic.remove_abandoned(tmp_path)
    assert names_in(tmp_path) == before


def test_one_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def locked(file: IO[bytes], how: int) -> None:
        if not removed:
            removed.append(Path(file.name))
            removed[0].unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    atomic.write_text(tmp_path / "a", "whole", may_race=True)
    assert names_in(tmp_path) == ["a"]
    assert removed


def test_what_gets_its_name_is_held_until_it_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def after_others(partial: Path, target: Path) -> Path:
        atomic.remove_abandoned(tmp_path)
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", after_others)
    atomic.write_text(tmp_path / "a", "whole", may_race=True)
    assert (tmp_path / "a").read_text() == "whole"

"""A directory of a store: list, read, write and remove its files.

Failed requests are tried again by the libraries below, a few times and with pauses.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from arm_ray.errors import NoSuchObjectError, StorageError
from arm_ray.storage.atomic import atomic_file
from arm_ray.storage.failures import translated
from arm_ray.storage.filesystem import open_filesystem
from arm_ray.storage.regular import open_regular
from arm_ray.storage.room import check_room
from arm_ray.storage.urls import Url, is_url, parse_url

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file in a store.

    Attributes:
        num_bytes: Its size.
        version: Changes when it is written anew.
        time_ns: When it was written, since 1970; of the hub a number in place of it.
    """

    num_bytes: int
    version: str
    time_ns: int


class Store:
    """What lies below a URL. It can be pickled, and used from several threads.

    Args:
        url: The directory; names of files are relative to it.

    Raises:
        StorageError: By all methods, with what is wrong; of its kinds `NoSuchObjectError` where
            there is nothing, and `StorageAccessError` where access is denied.
    """

    def __init__(self, url: str | Url) -> None:
        self.url = parse_url(url) if isinstance(url, str) else url
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Connections stay behind; each process makes its own.
        return type(self), (str(self.url),)

    def __str__(self) -> str:
        return str(self.url)

    def files(self, *, recursive: bool = False) -> dict[str, StoredFile]:
        """Name -> file, sorted; empty where there is nothing of that name."""
        with translated(self.url, "listed"):
            if self.url.scheme == "hf":
                found = self._hub_files(recursive)
            else:
                found = self._listed(recursive)
        return dict(sorted(found.items()))

    def _listed(self, recursive: bool) -> dict[str, StoredFile]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.url.path, allow_not_found=True, recursive=recursive)
        entries = self._fs.get_file_info(selector)
        if not entries and self._fs.get_file_info(self.url.bucket).type == FileType.NotFound:
            raise FileNotFoundError(self.url.bucket)
        return {
            entry.path[len(self.url.path) + 1 :]: StoredFile(
                entry.size, str(entry.mtime_ns), entry.mtime_ns or 0
            )
            for entry in entries
            if entry.type == FileType.File
        }

    def _hub_files(self, recursive: bool) -> dict[str, StoredFile]:
        hub = self._hub
        try:
            found = hub.find(
                self.url.path, maxdepth=None if recursive else 1, detail=True, refresh=True
            )
        except FileNotFoundError:
            # A repository that is missing is an error; a directory in one is empty.
            depth = 3 if self.url.bucket in ("datasets", "spaces") else 2
            if not hub.exists("/".join(self.url.path.split("/")[:depth])):
                raise
            return {}
        start = len(hub.resolve_path(self.url.path).unresolve()) + 1
        return {
            path[start:]: _hub_file(info)
            for path, info in found.items()
            if info["type"] == "file" and len(path) > start
        }

    def find(self, name: str) -> StoredFile | None:
        """A file; None where there is none."""
        return Store((self.url / name).parent).files().get(name.rpartition("/")[2])

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a file, from one position to before another; fewer where it ends before."""
        with translated(self.url / name, "read"):
            if self.url.scheme == "hf":
                data = self._hub.cat_file((self.url / name).path, start=begin, end=end)
            else:
                data = self._opened(name).read_at(end - begin, begin)
        return bytes(data)

    def read_all(self, name: str) -> bytes:
        """A whole file."""
        with (
            translated(self.url / name, "read"),
            self._fs.open_input_file(self._path(name)) as file,
        ):
            return bytes(file.read())

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading, at any position."""
        with translated(self.url / name, "read"):
            raw = self._fs.open_input_file(self._path(name))
        return io.BufferedReader(_Told(raw, self.url / name), _PIECE_BYTES)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; it is there whole or not at all."""
        self.check_writable()
        place = self.url / name
        with translated(place, "written"), self._output(place) as file:
            file.write(data)
        self._open.pop(name, None)

    def upload(self, local: Path, name: str) -> int:
        """Copy a local file there; it appears whole, or not at all. Returns bytes.

        Raises:
            OSError: The local file cannot be read.
        """
        self.check_writable()
        size = 0
        place = self.url / name
        with (
            open_regular(local) as source,
            translated(place, "written"),
            self._output(place) as target,
        ):
            while piece := source.read(_PIECE_BYTES):
                target.write(piece)
                size += len(piece)
        self._open.pop(name, None)
        return size

    def download(self, name: str, local: Path, file: StoredFile) -> None:
        """Copy a file here; it appears whole, and with its time, or not at all.

        Raises:
            DiskSpaceError: There is no room for it.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        hint = "or set runtime.scratch to a larger disk"
        check_room(local.parent, file.num_bytes, "a copy", self.url / name, hint)
        with atomic_file(local, may_race=True) as target:
            size = 0
            with (
                translated(self.url / name, "read"),
                self._fs.open_input_file(self._path(name)) as source,
            ):
                while piece := source.read(_PIECE_BYTES):
                    size += target.write(piece)
            if size != file.num_bytes:
                raise StorageError(
                    "a file was replaced while it was copied",
                    where=self.url / name,
                    got=f"{size} bytes",
                    expected=f"{file.num_bytes} bytes",
                    hint="run again once nothing writes it any more",
                )
            # The last of its bytes, which would change the time again.
            target.flush()
            os.utime(target.name, ns=(file.time_ns, file.time_ns))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order; those that are not there are passed over."""
        self.check_writable()
        for name in names:
            with translated(self.url / name, "removed"):
                try:
                    self._fs.delete_file(self._path(name))
                except FileNotFoundError:
                    continue
            self._open.pop(name, None)

    def check_writable(self) -> None:
        """Refuse a store that is only read here.

        Raises:
            StorageError: It is the hub.
        """
        if self.url.scheme == "hf":
            raise StorageError(
                "the Hugging Face hub is read only here",
                where=self.url,
                expected="s3://, gs:// or a path",
                hint="write elsewhere and upload it: hf upload OWNER/NAME DIR",
            )

    def _opened(self, name: str) -> Any:
        # Kept: each opening is a request of its own.
        with self._lock:
            file = self._open.get(name)
        if file is None:
            file = self._fs.open_input_file(self._path(name))
            with self._lock:
                self._open[name] = file
        return file

    def _output(self, place: Url) -> Any:
        # By default what is named .gz would be packed once more.
        return self._fs.open_output_stream(place.path, compression=None)

    def _path(self, name: str) -> str:
        return (self.url / name).path

    @property
    def _fs(self) -> Any:
        return open_filesystem(self.url)

    @property
    def _hub(self) -> Any:
        return self._fs.handler.fs


def _hub_file(info: Any) -> StoredFile:
    lfs = info.get("lfs")
    content = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    version = str(content or info.get("blob_id") or info.get("mtime") or "")
    # The hub does not say when, but what: a time made of that, for local copies to be told apart.
    time_ns = int(hashlib.sha256(version.encode()).hexdigest()[:13], 16)
    return StoredFile(info["size"], version, time_ns)


class _Told(io.RawIOBase):
    """A file whose errors are told in our words."""

    def __init__(self, file: Any, url: Url) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with translated(self._url, "read"):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_url(url: str) -> IO[bytes]:
    """Open the file of a URL for reading, at any position.

    Raises:
        StorageError: It cannot be.
    """
    parsed = parse_url(url)
    return Store(parsed.parent).open(parsed.name)


def open_place(given: str) -> IO[bytes]:
    """Open the file of a path or a URL for reading, as its bytes are.

    Raises:
        OSError: It is no regular file, or cannot be read.
        StorageError: The URL cannot be.
    """
    return open_url(given) if is_url(given) else open_regular(Path(given))


def find_url(url: str) -> StoredFile | None:
    """The file of a URL; None where there is no file of that name."""
    parsed = parse_url(url)
    if "/" not in parsed.path:
        return None
    return Store(parsed.parent).files().get(parsed.name)


def require(files: dict[str, StoredFile], url: Url) -> None:
    """Refuse a directory that is not there.

    Raises:
        NoSuchObjectError: It has no files.
    """
    if not files:
        raise NoSuchObjectError(
            "there is nothing at the URL",
            where=url,
            got="no files",
            expected="a directory with files in it",
            hint="check the URL",
        )

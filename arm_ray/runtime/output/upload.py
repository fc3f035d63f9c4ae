"""Brings what is finished in a run's local directory to its URL, beside the run.

The order is such that nothing partial can be loaded: of a state or model the weights go first, and
`config.json`, the index and the manifest last; what is removed loses them first.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import INDEX_NAME, read_json
from arm_ray.errors import ArmRayError, StorageAccessError, StorageError
from arm_ray.runtime.output.claim import CONFIG_NAME
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.storage.lease import Lease
from arm_ray.storage.store import Store

# Between attempts at the end of a run, beside the pauses of the libraries below.
PAUSES_S = (2.0, 5.0, 15.0)
EVENTS_NAME = "events.jsonl"
# What makes a directory loadable, in the order in which it is written.
LAST = (INDEX_NAME, "adapter_config.json", "config.json", states.MANIFEST_NAME)
_OWN_ORDER = ("states", "model", "model.partial")


class RunUpload:
    """Keeps a URL up to date with a run's local directory.

    Args:
        store: The URL.
        local: The directory.
        present: Names of the files that are at the URL.
        prunes: Whether states that are gone here are removed there.
        lease: Held on the URL.
        reporter: Told what people should know.
    """

    def __init__(
        self,
        store: Store,
        local: Path,
        present: Iterable[str],
        prunes: bool,
        lease: Lease,
        reporter: Reporter,
    ) -> None:
        self._store, self._local, self._prunes = store, local, prunes
        self._lease, self._reporter = lease, reporter
        self._there = set(present)
        self._complete = {name for name in directories(self._there) if self._is_complete(name)}
        self._sent: dict[str, tuple[int, int]] = {}
        self._failed = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def start(self) -> None:
        """Upload what is small, so that what cannot be written is told at once, and go on beside.

        Raises:
            StorageError: The URL cannot be written.
        """
        self._send_small(CONFIG_NAME)
        self._thread.start()

    def event(self, _record: Mapping[str, Any]) -> None:
        """Take note that something was finished."""
        self._wake.set()

    def finish(self) -> None:
        """Upload all that is not there yet.

        Raises:
            StorageError: It cannot be; says where everything is.
        """
        self.stop()
        for pause in (*PAUSES_S, None):
            try:
                self._sync()
                return
            except StorageError as error:
                if pause is None or isinstance(error, StorageAccessError):
                    raise self._not_uploaded(error) from error
                self._reporter.warn(f"{error.what}: {error.got}; trying again in {pause:g} s")
                time.sleep(pause)

    def sync_once(self) -> None:
        """Try once to upload what is finished; after `stop`.

        Raises:
            StorageError: It cannot be.
        """
        self._sync()

    def stop(self) -> None:
        """End the thread, after the file that it is at."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._closing.clear()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._sync()
                self._failed = False
            except StorageError as error:
                # The merge goes on; the next event, or its end, tries again.
                if not self._failed:
                    self._reporter.warn(f"{error.what}: {error.got}; the run goes on locally")
                self._failed = True

    def _not_uploaded(self, error: StorageError) -> StorageError:
        return type(error)(
            f"the run could not be uploaded as a whole: {error.what}",
            where=error.where,
            got=error.got,
            expected=error.expected,
            hint=f"everything is in {self._local}; the same command uploads what is missing. "
            f"{error.hint or ''}".rstrip(),
        )

    def _sync(self) -> None:
        if self._lease.is_lost:
            raise StorageError(
                "the run's URL was taken over by another run",
                where=self._store,
                hint="see which of the two is to go on",
            )
        for name in self._small():
            if name != EVENTS_NAME:
                self._send_small(name)
        for directory in states.state_directories(self._local).values():
            if is_whole(directory):
                self._send_directory(f"states/{directory.name}", directory)
        if (self._local / "model").is_dir():
            self._send_directory("model", self._local / "model")
        if self._prunes and not self._closing.is_set():
            self._prune()
        self._send_small(EVENTS_NAME)

    def _small(self) -> list[str]:
        """Names of all files that are neither of a state nor of the model."""
        found = []
        for name in files_below(self._local):
            parts = name.split("/")
            is_hidden = any(part.startswith(".") for part in parts)
            is_aside = parts[0].startswith("model.damaged")
            if not is_hidden and not is_aside and parts[0] not in _OWN_ORDER:
                found.append(name)
        return found

    def _send_small(self, name: str) -> None:
        if self._closing.is_set():
            return
        # What was replaced or removed meanwhile is taken up the next time.
        with contextlib.suppress(FileNotFoundError):
            status = (self._local / name).stat()
            current = (status.st_size, status.st_mtime_ns)
            if self._sent.get(name) != current:
                self._store.upload(self._local / name, name)
                self._sent[name] = current
                self._there.add(name)

    def _send_directory(self, name: str, local: Path) -> None:
        """Upload a state or the model, whole, unless it is there."""
        if name in self._complete:
            return
        files = files_below(local)
        early = [file for file in files if file not in LAST]
        early.sort(key=lambda file: not file.endswith(".safetensors"))
        late = [file for file in LAST if file in files]
        # Half of another one may be there, of a run with other settings that was not finished.
        self._remove([f"{name}/{file}" for file in reversed(LAST)])
        for file in (*early, *late):
            if self._closing.is_set():
                return
            try:
                self._store.upload(local / file, f"{name}/{file}")
            except FileNotFoundError:
                if not local.is_dir() or not is_whole(local):
                    return  # pruned meanwhile
                raise
            self._there.add(f"{name}/{file}")
        self._complete.add(name)

    def _prune(self) -> None:
        kept = {f"states/{p.name}" for p in states.state_directories(self._local).values()}
        for name in sorted(directories(self._there) - kept - {"model"}):
            inside = sorted(n for n in self._there if n.startswith(f"{name}/"))
            first = [f"{name}/{file}" for file in reversed(LAST)]
            self._complete.discard(name)
            self._remove(
                [*(n for n in first if n in inside), *(n for n in inside if n not in first)]
            )

    def _remove(self, names: list[str]) -> None:
        present = [name for name in names if name in self._there]
        if present:
            self._store.remove(present)
            self._there -= set(present)

    def _is_complete(self, name: str) -> bool:
        return is_complete(name, self._there)


def files_below(directory: Path) -> list[str]:
    """The files below a directory, by their paths from there; it may be emptied meanwhile."""
    found = []
    # It passes over directories that vanish, unlike `Path.rglob`.
    for root, _, names in os.walk(directory):
        found += [Path(root, name).relative_to(directory).as_posix() for name in names]
    return sorted(found)


def directories(names: Iterable[str]) -> set[str]:
    """The states and the model that files belong to."""
    found = set()
    for name in names:
        parts = name.split("/")
        if parts[0] == "states" and len(parts) > 2:
            found.add(f"states/{parts[1]}")
        elif parts[0] == "model" and len(parts) > 1:
            found.add("model")
    return found


def is_complete(name: str, present: Iterable[str]) -> bool:
    """Whether a state or the model is at the URL as a whole."""
    if name == "model":
        return bool({"model/config.json", "model/adapter_config.json"} & set(present))
    return f"{name}/{states.MANIFEST_NAME}" in set(present)


def is_whole(directory: Path) -> bool:
    """Whether a local state is finished and has all its weights; or it is the model, which is."""
    if directory.name == "model":
        return True
    if states.read_manifest(directory) is None:
        return False
    try:
        index = read_json(directory / INDEX_NAME)
        return all((directory / name).is_file() for name in set(index["weight_map"].values()))
    except (OSError, ArmRayError, KeyError):
        return False  # its weights lie in parts on the nodes

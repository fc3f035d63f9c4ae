"""A file at a URL that says who works there, so that two do not.

It is renewed while its owner lives, and does not count any more once it is old. Object stores have
no lock: two that begin within the same second may both get through.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator

from arm_ray.errors import ArmRayError, RunDirectoryError
from arm_ray.storage.store import Store

NAME = ".lease"
RENEWED_EVERY_S = 30.0
VALID_S = 120.0


class Lease:
    """A lease that is held; see `leased`.

    Args:
        store: The directory.
        owner: Who holds it.
    """

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._content = store, json.dumps({"owner": owner}).encode()
        self._closing = threading.Event()
        self.is_lost = False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._closing.wait(RENEWED_EVERY_S):
            # A store that cannot be reached for a while is what its validity is longer for.
            with contextlib.suppress(ArmRayError):
                if self._store.read_all(NAME) != self._content:
                    self.is_lost = True
                    return
                self._store.write(NAME, self._content)

    def close(self) -> None:
        """Give it back."""
        self._closing.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(ArmRayError):
            if not self.is_lost:
                self._store.remove([NAME])


@contextlib.contextmanager
def leased(store: Store, who: str) -> Iterator[Lease]:
    """Be the one that works at a URL.

    Args:
        store: The directory.
        who: What works in it, for the error.

    Raises:
        RunDirectoryError: Another one does, on another machine, or did until a moment ago.
        StorageError: The URL cannot be written.
    """
    host = socket.gethostname()
    owner = f"{host}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
    _refuse_other(store, host, who)
    content = json.dumps({"owner": owner}).encode()
    store.write(NAME, content)
    if store.read_all(NAME) != content:
        raise _taken(store, who, "another one has just begun")
    lease = Lease(store, owner)
    try:
        yield lease
    finally:
        lease.close()


def _refuse_other(store: Store, host: str, who: str) -> None:
    found = store.files().get(NAME)
    if found is None:
        return
    try:
        holder = str(json.loads(store.read_all(NAME))["owner"])
    except (ValueError, KeyError, TypeError):
        return
    if holder.startswith(f"{host}, "):
        return  # on one machine the lock of the local directory tells
    # The store's own clock, as the other's and ours may differ.
    probe = f"{NAME}-{uuid.uuid4().hex[:8]}"
    store.write(probe, b"")
    now = store.files()[probe].time_ns
    store.remove([probe])
    age = (now - found.time_ns) / 1e9
    if age < VALID_S:
        raise _taken(store, who, f"{holder}, {age:.0f} s ago")


def _taken(store: Store, who: str, got: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"another {who} is working at the output's URL",
        where=store,
        got=got,
        hint="wait for it, or choose another output; if it was killed, the same command goes on "
        f"{VALID_S:.0f} s after its last sign of life",
    )

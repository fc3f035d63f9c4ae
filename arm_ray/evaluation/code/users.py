"""Users to run programs as: one for each program that runs at the same time.

The limit on processes counts all of a user's processes on the machine, so two programs that run
as the same user would share it.
"""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from arm_ray.errors import SandboxError

# Ids that distributions leave for software to take on demand, within 16 bits.
FIRST_UID, LAST_UID = 60_100, 60_899


class Users:
    """As many places as programs may run at once, each with a user of its own where possible.

    As root, free user ids are taken; other sandboxes of the machine, also of other processes,
    take others. As another user there is no choice: places have no user.

    Args:
        places: How many programs run at once.

    Attributes:
        uids: The user of each place.
    """

    def __init__(self, places: int) -> None:
        self._claims: list[socket.socket] = []
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        uids: list[int | None] = [None] * places if os.getuid() else self._claimed(places)
        self.uids = tuple(uids)
        for uid in uids:
            self._free.put(uid)

    @contextmanager
    def one(self) -> Iterator[int | None]:
        """A place, for as long as the context lasts; waits for a free one."""
        uid = self._free.get()
        try:
            yield uid
        finally:
            self._free.put(uid)

    def close(self) -> None:
        """Gives the user ids back."""
        while self._claims:
            self._claims.pop().close()

    def _claimed(self, places: int) -> list[int | None]:
        taken = _uids_in_use()
        uids: list[int | None] = []
        for uid in range(FIRST_UID, LAST_UID + 1):
            if len(uids) == places:
                break
            if uid not in taken and self._claim(uid):
                uids.append(uid)
        if len(uids) < places:
            self.close()
            raise SandboxError(
                "There are not enough free user ids to run programs as.",
                got=f"{len(uids)} of {FIRST_UID} to {LAST_UID}",
                expected=f"{places}",
                hint="Run fewer programs at once, or close other sandboxes.",
            )
        return uids

    def _claim(self, uid: int) -> bool:
        # A name of the kernel's, not a file: it is free again when this process ends in any way.
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0arm_ray.sandbox.user.{uid}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True


def _uids_in_use() -> set[int]:
    import pwd

    uids = {entry.pw_uid for entry in pwd.getpwall()}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                uids.add(os.stat(f"/proc/{name}").st_uid)
    return uids

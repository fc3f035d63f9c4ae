"""The sandbox that tests run programs in, and what a program left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code.limits import MIB, Limits
from arm_ray.evaluation.code.runner import RUNNER
from arm_ray.evaluation.code.sandbox import Sandbox

QUICK = Limits(
    wall_s=2.0,
    cpu_s=2,
    memory_bytes=512 * MIB,
    processes=16,
    file_bytes=1 * MIB,
    tmp_bytes=4 * MIB,
    output_bytes=256 * 1024,
)


@lru_cache
def has_namespaces() -> bool:
    """Whether this machine lets this user make the namespaces at all, by another tool."""
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--mount", "--pid", "--fork", "--net", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """An isolating sandbox. Only a machine without namespaces may do without these tests."""
    try:
        opened = Sandbox.open(slots=2)
    except SandboxError:
        if has_namespaces():
            raise
        pytest.skip("this machine has no namespaces; the refusal is tested in test_sandbox_refusal")
    with opened:
        yield opened


def processes_left(of: Sandbox) -> list[str]:
    """Command lines of processes on this machine that run as a sandbox's users.

    As root these users are this sandbox's alone. As another user it is the user's own processes
    that run a program in any sandbox.
    """
    uids = {os.getuid() if uid is None else uid for uid in of._users.uids}
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with suppress(OSError):
                line = (directory / "cmdline").read_bytes()
                if not line:
                    continue  # has ended, and waits for its parent
                if directory.stat().st_uid in uids and (
                    os.getuid() == 0 or RUNNER.encode() in line
                ):
                    found.append(line[-200:].decode(errors="replace"))
    return found

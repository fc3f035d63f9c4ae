"""Finds out by experiment whether a sandbox isolates, before anything is run in it.

One program of ours tries what a program must not be able to do and reports what happened. Each
attempt is harmless where it succeeds: at most a few dozen processes that wait, memory that is
never touched, a connection to a port that this process opened for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code import seccomp
from arm_ray.evaluation.code.limits import MIB, Limits, Outcome

Run = Callable[..., Outcome]

_PROCESSES = 16
_LIMITS = Limits(
    wall_s=20.0,
    memory_bytes=1024 * MIB,
    processes=_PROCESSES,
    file_bytes=1 * MIB,
    tmp_bytes=8 * MIB,
)

_PROBE = r"""
import json, os, socket, sys
given = json.loads(sys.stdin.read())
found = {"python": sys.version.split()[0], "uid": os.getuid(), "groups": os.getgroups()}

def works(action):
    try:
        action()
    except Exception:
        return False
    return True

def connect():
    socket.create_connection(("127.0.0.1", given["port"]), timeout=2).close()

def write(path):
    open(path, "x").close()
    os.unlink(path)

def long_file():
    with open("/tmp/long", "wb") as file:
        file.truncate(given["file_bytes"] + 1)

status = dict(line.split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
found["capabilities"] = int(status["CapEff"], 16) | int(status["CapBnd"], 16)
found["no_new_privileges"] = status["NoNewPrivs"].strip() == "1"
found["filtered"] = status["Seccomp"].strip() == "2"
found["network"] = works(connect)
found["vsock"] = works(lambda: socket.socket(40, socket.SOCK_STREAM).close())
found["interfaces"] = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
found["host_files"] = [path for path in given["paths"] if os.path.exists(path)]
found["writable"] = [path for path in given["writes"] if works(lambda: write(path))]
found["processes"] = sum(name.isdigit() for name in os.listdir("/proc"))
found["environment"] = given["variable"] in os.environ or any(
    given["variable"].encode() in open(f"/proc/{pid}/environ", "rb").read()
    for pid in os.listdir("/proc")
    if pid.isdigit() and os.access(f"/proc/{pid}/environ", os.R_OK)
    and works(lambda: open(f"/proc/{pid}/environ", "rb").read()))
found["memory"] = works(lambda: bytearray(given["memory_bytes"] + 1))
found["long_file"] = works(long_file)
tmp = os.statvfs("/tmp")
found["tmp_bytes"] = tmp.f_blocks * tmp.f_frsize

reader, writer = os.pipe()
forked = 0
for _ in range(40):
    try:
        child = os.fork()
    except OSError:
        break
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    forked += 1
os.close(writer)
for _ in range(forked):
    os.wait()
found["forked"] = forked
found["user_namespace"] = os.system("unshare --user true 2>/dev/null") == 0
# A process that would outlive the program.
if not os.fork():
    os.setsid()
    if not os.fork():
        import time
        time.sleep(5)
    os._exit(0)
os.wait()
print(json.dumps(found))
"""


def check_isolation(run: Run) -> str:
    """Checks that what runs in a sandbox is isolated.

    Args:
        run: Runs a program in the sandbox, with ``stdin`` and ``limits``.

    Returns:
        The version of the Python inside.

    Raises:
        SandboxError: It is not; names everything that failed.
    """
    with _bait() as bait:
        given = bait | {
            "writes": ["/x", "/usr/x", "/dev/x", "/proc/x"],
            "file_bytes": _LIMITS.file_bytes,
            "memory_bytes": _LIMITS.memory_bytes,
        }
        outcome = run(_PROBE, stdin=json.dumps(given), limits=_LIMITS)
    if not outcome.passed:
        raise SandboxError(
            "The sandbox's self-test did not run to its end.",
            got=f"{outcome.status}: {outcome.detail}\n{outcome.stderr_tail[-1500:]}",
            hint="The interpreter has to be a Python 3 with its standard library.",
        )
    found = json.loads(outcome.stdout)
    wrong = what_is_wrong(found)
    if wrong:
        raise SandboxError(
            "Model-written code would not be isolated on this machine.",
            got="; ".join(wrong),
            expected="none of this",
            hint="See docs/sandbox.md for what the machine has to allow. Do not run model-written "
            "code here, or only with unsafe_subprocess and nothing of value within reach.",
        )
    return str(found["python"])


def what_is_wrong(found: Mapping[str, Any]) -> list[str]:
    """Says which of the probe's findings must not be."""
    filter_missing = not found["filtered"] and seccomp.filter_program() is not None
    checks = (
        (found["uid"] == 0, "programs run as root, for whom there is no limit on processes"),
        (found["capabilities"], f"programs keep capabilities: {found['capabilities']:x}"),
        (not found["no_new_privileges"], "programs may gain privileges"),
        (filter_missing, "system calls are not filtered"),
        (found["network"], "the network can be reached"),
        (found["vsock"], "the host of a virtual machine can be reached (AF_VSOCK)"),
        (set(found["interfaces"]) - {"lo"}, f"network interfaces: {found['interfaces']}"),
        (found["host_files"], f"files of this machine can be seen: {found['host_files']}"),
        (found["writable"], f"files can be written below: {found['writable']}"),
        # The program, bubblewrap's own, and one more of it.
        (found["processes"] > 3, "other processes can be seen"),
        (found["environment"], "this process's environment can be read"),
        (found["memory"], "the limit on memory does not hold"),
        (found["long_file"], "the limit on the size of files does not hold"),
        (found["tmp_bytes"] > _LIMITS.tmp_bytes, f"{found['tmp_bytes']} bytes of temporary files"),
        (found["forked"] >= _PROCESSES, f"{found['forked']} processes with a limit of 16"),
        (not found["forked"], "programs cannot have a second process at all"),
        (found["user_namespace"], "programs can make user namespaces"),
    )
    return [text for failed, text in checks if failed]


def check_plain(run: Run) -> str:
    """Checks that a program runs at all; returns the version of the Python.

    Raises:
        SandboxError: It does not.
    """
    outcome = run("import sys; print(sys.version.split()[0])", stdin=b"", limits=_LIMITS)
    if not outcome.passed:
        raise SandboxError(
            "Programs cannot be run on this machine.",
            got=f"{outcome.status}: {outcome.detail}",
            hint="The interpreter, setpriv (as root) and prlimit (of util-linux) are needed.",
        )
    return outcome.stdout.strip()


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, Any]]:
    """A file, a port and a variable of this machine, which must not be found from inside."""
    variable = f"ARM_RAY_BAIT_{secrets.token_hex(8)}"
    with (
        tempfile.NamedTemporaryFile(prefix="arm_ray-bait-") as file,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        os.chmod(file.name, 0o644)
        os.environ[variable] = "1"
        paths = [file.name, "/etc/passwd", "/etc/shadow", "/etc/hostname", "/var", "/run", "/sys"]
        try:
            yield {"port": server.getsockname()[1], "variable": variable, "paths": paths}
        finally:
            del os.environ[variable]

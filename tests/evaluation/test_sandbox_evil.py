"""Programs that mean harm, or fail in ugly ways. Every one is bounded by itself as well."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arm_ray.evaluation.code.limits import MIB
from arm_ray.evaluation.code.programs import Program
from arm_ray.evaluation.code.sandbox import Sandbox
from tests.builders.figures import guarantee
from tests.builders.sandboxes import QUICK, processes_left, sandbox

__all__ = ["sandbox"]

# name: program, status, text in its output
SCRIPTS: dict[str, tuple[str, str, str]] = {
    "forks": (
        """
import os, time
made = 0
for _ in range(40):
    try:
        if not os.fork():
            time.sleep(20)
            os._exit(0)
        made += 1
    except BlockingIOError:
        break
print("made", made)
""",
        "passed",
        "made 1",
    ),
    "threads": (
        """
import threading, time
made = 0
for _ in range(40):
    try:
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        made += 1
    except RuntimeError:
        break
print("made", made)
""",
        "passed",
        "made 1",
    ),
    "memory": ("x = []\nfor _ in range(100): x.append(bytearray(50 << 20))", "memory", ""),
    "memory of many": (
        """
import os, time
for _ in range(8):
    if not os.fork():
        x = bytearray(b"1") * (100 << 20)
        time.sleep(20)
time.sleep(20)
""",
        "memory",
        "",
    ),
    "spin": ("while True: pass", "timeout", ""),
    "spin in threads": (
        """
import os
for _ in range(3):
    if not os.fork():
        break
while True: pass
""",
        "timeout",
        "",
    ),
    "sleep": ("import time; time.sleep(60)", "timeout", ""),
    "stop": ("import os; os.kill(os.getpid(), 19)", "timeout", ""),
    "signals": (
        """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, lambda *_: None)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1)
""",
        "timeout",
        "",
    ),
    "print forever": ("while True: print('x' * 1000)", "output", "xxxx"),
    "errors forever": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output", ""),
    "one long line": ("print('x' * (100 << 20))", "output", "xxxx"),
    "large file": (
        "with open('/tmp/x', 'wb') as f:\n    for _ in range(8): f.write(bytes(1 << 20))",
        "failed",
        "",
    ),
    "fill tmp": (
        """
for name in range(40):
    with open(f"/tmp/{name}", "wb") as f:
        f.write(bytes(1 << 19))
""",
        "failed",
        "",
    ),
    "fill shm": (
        """
for name in range(40):
    with open(f"/dev/shm/{name}", "wb") as f:
        f.write(bytes(1 << 19))
""",
        "failed",
        "",
    ),
    "close everything": (
        "import os, time\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\n"
        "time.sleep(60)",
        "timeout",
        "",
    ),
    "recursion": ("def f(): f()\nf()", "failed", ""),
    "segfault": ("import ctypes; ctypes.string_at(0)", "failed", ""),
    "write to standard input": ("import os; os.write(0, b'x')", "failed", ""),
    "grow standard input": ("import os; os.ftruncate(0, 1 << 20)", "failed", ""),
    "no standard input": ("input()", "failed", ""),
    "many files": (
        "files = [open('/dev/null') for _ in range(100)]",
        "failed",
        "",
    ),
    "daemon": (
        """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(60)
    os._exit(0)
print("gone")
""",
        "passed",
        "gone\n",
    ),
    "kill others": (
        """
import os
for pid in range(2, 5000):
    if pid != os.getpid():
        try:
            os.kill(pid, 9)
            print("killed", pid)
        except ProcessLookupError:
            pass
try:
    os.kill(1, 9)
except PermissionError:
    pass
print("alone")
""",
        "passed",
        "alone\n",
    ),
    "kill all": ("import os; os.kill(-1, 9)", "failed", ""),
    "delete files": (
        """
import os, shutil
for path in ("/usr/bin", "/bin", "/dev", "/tmp"):
    shutil.rmtree(path, ignore_errors=True)
print(os.path.exists("/usr/bin/env"), os.path.exists("/dev/null"))
""",
        "passed",
        "True True\n",
    ),
    "change mounts": (
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2))
print(libc.unshare(0x10000000), libc.unshare(0x00020000), libc.chroot(b"/tmp"))
print(libc.memfd_create(b"x", 0), libc.shmget(0, 1 << 20, 0o1600), libc.ptrace(0, 0, 0, 0))
print(os.system("unshare --user --map-root-user true 2>/dev/null") != 0)
""",
        "passed",
        "-1 -1\n-1 -1 -1\n-1 -1 -1\nTrue\n",
    ),
    "become root": (
        """
import os
for action in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        action()
        print("root")
    except PermissionError:
        pass
print(os.system("su -c true 2>/dev/null </dev/null") != 0)
""",
        "passed",
        "True\n",
    ),
    "stop the parent": (
        """
import os
for pid in (1, os.getppid(), -1 * os.getpgrp()):
    for number in (19, 20, 23, 6, 15):
        if pid > 0 and pid != os.getpid():
            try:
                os.kill(pid, number)
            except (PermissionError, ProcessLookupError):
                pass
print("on")
""",
        "passed",
        "on\n",
    ),
    "trace the parent": (
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tries = [libc.ptrace(16, pid, 0, 0) for pid in (1, os.getppid(), os.getpid())]
for name in ("mem", "environ", "maps", "fd/0", "root/etc/passwd", "cwd/x"):
    try:
        open(f"/proc/1/{name}", "rb").read(1)
        tries.append(0)
    except OSError:
        tries.append(-1)
print(sum(found >= 0 for found in tries[:3]), tries[3] >= 0)
""",
        "passed",
        "0 False\n",
    ),
    "sockets of others": (
        """
import socket
reached = []
for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/dbus/system_bus_socket",
             "/tmp/ray/session_latest/sockets/plasma_store", "/run/systemd/private"):
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        reached.append(path)
    except OSError:
        pass
print(reached)
""",
        "passed",
        "[]\n",
    ),
    "zombies": (
        """
import os, time
for _ in range(40):
    try:
        if not os.fork():
            os._exit(0)
    except BlockingIOError:
        break
time.sleep(60)
""",
        "timeout",
        "",
    ),
    "a link to write through": (
        """
import os
written = []
for target in ("/usr/bin/x", "/etc/x", "/proc/sys/kernel/core_pattern", "/dev/mem", "/x"):
    os.symlink(target, "/tmp/link")
    try:
        open("/tmp/link", "w").write("x")
        written.append(target)
    except OSError:
        pass
    os.unlink("/tmp/link")
print(written)
""",
        "passed",
        "[]\n",
    ),
    "a link that changes meanwhile": (
        """
import os, threading, time
ends, reached = time.monotonic() + 0.5, []
def swap():
    while time.monotonic() < ends:
        for target in ("/etc", "/tmp"):
            os.symlink(target, "/tmp/next")
            os.replace("/tmp/next", "/tmp/link")
threading.Thread(target=swap).start()
while time.monotonic() < ends:
    try:
        reached.append(open("/tmp/link/passwd").read())
    except OSError:
        pass
print(reached)
""",
        "passed",
        "[]\n",
    ),
    "hard links to files of the system": (
        """
import os
made = []
for source in ("/usr/bin/env", "/proc/self/environ", "/dev/null"):
    try:
        os.link(source, "/tmp/link")
        made.append(source)
        os.unlink("/tmp/link")
    except OSError:
        pass
print(made)
""",
        "passed",
        "[]\n",
    ),
    "devices": (
        """
import os, stat
made = []
for kind, major, minor in ((stat.S_IFCHR, 1, 1), (stat.S_IFBLK, 8, 0), (stat.S_IFCHR, 5, 0)):
    try:
        os.mknod("/tmp/device", kind | 0o600, os.makedev(major, minor))
        made.append((major, minor))
    except OSError:
        pass
for path in ("/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/kvm", "/dev/fuse"):
    try:
        open(path, "rb")
        made.append(path)
    except OSError:
        pass
print(made)
""",
        "passed",
        "[]\n",
    ),
    "a file with holes": (
        """
try:
    with open("/tmp/x", "wb") as f:
        f.truncate(1 << 40)
    print("made")
except OSError:
    print("refused")
""",
        "passed",
        "refused\n",
    ),
    "errors and output at once": (
        """
import sys, threading
def flood(stream):
    while True:
        stream.write("x" * 10_000)
# Whichever is faster, there is something of the other.
print("xxxx", flush=True)
threading.Thread(target=flood, args=(sys.stderr,), daemon=True).start()
flood(sys.stdout)
""",
        "output",
        "xxxx",
    ),
    "raise limits": (
        """
import resource
for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("raised")
    except ValueError:
        pass
print("same")
""",
        "passed",
        "same\n",
    ),
}


@pytest.fixture(scope="module")
def held() -> Iterator[list[str]]:
    """Names of the attempts that came to nothing."""
    names: list[str] = []
    yield names
    attempts = {*SCRIPTS, *CHEATS}
    guarantee(f"sandbox escapes: {len(attempts - {*names})} of {len(attempts)} attempts")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_end_as_they_should_and_leave_nothing(
    sandbox: Sandbox, held: list[str], name: str
) -> None:
    program, status, text = SCRIPTS[name]
    begun = time.monotonic()
    outcome = sandbox.run(program, limits=QUICK)
    assert outcome.status == status, outcome
    assert text in outcome.stdout
    if text.endswith("\n"):
        assert outcome.stdout == text, outcome
    if name in ("forks", "threads"):
        assert 10 <= int(outcome.stdout.split()[1]) <= 15
    assert len(outcome.stdout) <= QUICK.output_bytes
    assert time.monotonic() - begun < 15
    assert processes_left(sandbox) == []
    held.append(name)


def test_cpu_time_is_limited_apart_from_the_clock(sandbox: Sandbox) -> None:
    limits = QUICK.__class__(wall_s=20.0, cpu_s=1, memory_bytes=512 * MIB)
    outcome = sandbox.run("while True: pass", limits=limits)
    assert (outcome.status, outcome.detail) == ("timeout", "used 1 s of CPU time")


def test_the_network_is_not_there(sandbox: Sandbox) -> None:
    program = """
import socket
for action in (
    lambda: socket.create_connection(("127.0.0.1", {port}), 1),
    lambda: socket.create_connection(("8.8.8.8", 53), 1),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW),
    lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
):
    try:
        action()
        print("open")
    except OSError:
        print("shut")
"""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = sandbox.run(program.format(port=server.getsockname()[1]), limits=QUICK)
    assert outcome.stdout == "shut\n" * 7


def test_files_of_the_machine_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o755)
    paths = [
        *(str(secret), __file__, str(Path.home()), "/etc/shadow", "/etc/passwd", "/etc/hostname"),
        *("/root", "/home", "/var", "/run", "/sys", "/boot", "/opt", "/srv", "/mnt"),
    ]
    program = f"""
import os
paths = {paths!r}
reached = []
for path in paths:
    os.symlink(path, "/tmp/link")
    for way in (path, "/tmp/link", "/proc/self/root" + path, "/proc/1/root" + path,
                "/tmp/../.." + path, "/proc/self/cwd/.." + path):
        if os.path.exists(way):
            reached.append(way)
    os.unlink("/tmp/link")
print(reached)
"""
    assert sandbox.run(program, limits=QUICK).stdout == "[]\n"


def test_secrets_in_the_environment_are_not_there(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("API_KEY", secret)
    program = f"""
import os
found = [str(os.environ), os.popen("env").read()]
for pid in os.listdir("/proc"):
    for name in ("environ", "cmdline"):
        try:
            found.append(open(f"/proc/{{pid}}/{{name}}").read())
        except OSError:
            pass
print({secret[:16]!r} + {secret[16:]!r} in "".join(found))
"""
    assert sandbox.run(program, limits=QUICK).stdout == "False\n"


def test_files_do_not_outlive_a_program(sandbox: Sandbox) -> None:
    name = f"arm_ray-test-{secrets.token_hex(8)}"
    assert sandbox.run(f"open('/tmp/{name}', 'w').write('x')", limits=QUICK).passed
    assert not Path(tempfile.gettempdir(), name).exists()
    assert not sandbox.run(f"open('/tmp/{name}')", limits=QUICK).passed


# What a program does at once, instead of being right.
CHEATS = {
    "exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "exit at exit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(): return 1",
    "kill itself": "import os; os.kill(os.getpid(), 15)",
    "exec true": "import os; os.execv('/bin/true', ['true'])",
    "closed output": "import os; os.close(1); os.close(2)\ndef f(): return 1",
    "exit in the function": "import os\ndef f(): os._exit(0)",
    "SystemExit in the function": "def f(): raise SystemExit(0)",
    "printed token": "print('0' * 32)\nprint('passed')\nimport os; os._exit(0)",
    "noise on every file": """
import os
# The socket's number is what it was in the process that opened it.
for fd in sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2):
    try:
        os.write(fd, b"KKKK" + b"0" * 64)
    except OSError:
        pass
os._exit(0)
""",
    "fork and be right in the child": """
import os
def f():
    return 2 if os.fork() == 0 else os._exit(0)
""",
    "assert that does nothing": (
        "import builtins\n"
        "builtins.AssertionError = type('Quiet', (Exception,), {})\ndef f(): return 1"
    ),
    "exceptions that end well": (
        "import sys, os\nsys.excepthook = lambda *_: os._exit(0)\ndef f(): return 1"
    ),
    "builtins replaced": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\ndef f(): return 1"
    ),
    "a tracer that goes on": (
        "import sys\ndef trace(frame, event, value):\n    return trace\nsys.settrace(trace)\n"
        "def f(): return 1"
    ),
    "main imported": (
        "import __main__, sys\nfor name in list(vars(__main__)):\n"
        "    vars(__main__)[name] = lambda *_: None\ndef f(): return 1"
    ),
    "frames of the runner": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_locals.clear()\n"
        "    frame = frame.f_back\ndef f(): return 1"
    ),
    "functions of the runner through gc": (
        "import gc, types\nfor found in gc.get_objects():\n"
        "    if isinstance(found, types.FunctionType) and found.__name__ == 'start':\n"
        "        found.__code__ = (lambda *_: None).__code__\ndef f(): return 1"
    ),
    "a thread that exits": (
        "import os, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\n"
        "def f(): time.sleep(1); return 1"
    ),
    "an alarm that exits": (
        "import os, signal, time\nsignal.signal(14, lambda *_: os._exit(0))\n"
        "signal.setitimer(0, 0.05)\ndef f(): time.sleep(1); return 1"
    ),
    "the messages of the runner": """
import os
for fd in sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2):
    for message in (b"H", b"T", b"K"):
        try:
            os.write(fd, message)
        except OSError:
            pass
os._exit(0)
""",
    "no more system": "import os, sys\nos.write = os.read = os._exit = print\ndef f(): return 1",
    "no stderr": "import sys; sys.stderr = sys.stdout = None\ndef f(): return 1",
}


@pytest.mark.parametrize("name", CHEATS)
def test_an_early_or_false_end_does_not_pass(sandbox: Sandbox, held: list[str], name: str) -> None:
    outcome = sandbox.run_tests(Program(CHEATS[name], "assert f() == 3", QUICK))
    assert outcome.status == "failed", outcome
    assert processes_left(sandbox) == []
    held.append(name)


def test_replaced_functions_do_not_keep_a_right_program_from_passing(sandbox: Sandbox) -> None:
    code = CHEATS["no more system"]
    assert sandbox.run_tests(Program(code, "assert f() == 1", QUICK)).passed


def test_neither_tests_nor_token_are_there_while_the_program_loads(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(8)
    code = """
import gc, os, sys
seen = [str(sys.argv), str(os.environ)]
frame = sys._getframe()
while frame:
    seen += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
    frame = frame.f_back
seen += [repr(x) for x in gc.get_objects() if isinstance(x, (str, bytes, list, tuple))]
for path in ("/proc/self/cmdline", "/proc/self/environ", "/proc/1/cmdline"):
    try:
        seen.append(open(path).read())
    except OSError:
        pass
for root, _, files in [*os.walk("/tmp"), *os.walk("/dev/shm")]:
    seen += [open(os.path.join(root, name)).read() for name in files]
seen.append(sys.stdin.read())
memory = "\\n".join(seen)
"""
    outcome = sandbox.run_tests(Program(code, f"assert {mark!r} not in memory", QUICK))
    assert outcome.passed, outcome


def test_a_program_that_waits_for_its_tests_on_the_wrong_file_times_out(sandbox: Sandbox) -> None:
    code = """
import os
# The socket's number is what it was in the process that opened it.
for fd in sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2):
    try:
        os.read(fd, 100)
    except OSError:
        pass
"""
    assert sandbox.run_tests(Program(code, "", QUICK)).status == "timeout"


def test_descriptors_of_this_process_are_not_inherited(sandbox: Sandbox) -> None:
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        program = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
        numbers = eval(sandbox.run(program, limits=QUICK).stdout)
    # The three standard ones, and the one that lists.
    assert len(numbers) == 4

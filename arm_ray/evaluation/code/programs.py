"""HumanEval, MBPP, HumanEval-Pro and MBPP-Pro: what is asked, and what is run then.

The rows are those of the benchmarks' own files. ``docs/sandbox.md`` says how the programs differ
from what the benchmarks' own harnesses run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code import livecodebench_prompt
from arm_ray.evaluation.code.extraction import defines, extract_code, sanitized
from arm_ray.evaluation.code.limits import Limits

Benchmark = Literal["humaneval", "mbpp", "humaneval_pro", "mbpp_pro"]
Row = Mapping[str, Any]

# Seconds a program has in the harnesses of all four.
TIME_LIMIT_S = 3.0
_LIMITS = Limits(wall_s=TIME_LIMIT_S)

# Wording of CodeEval-Pro's prompts, by which its published numbers were measured (MIT licence).
_PRO_TEXT = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate "
    "and reliable responses to user instructions.\n@@ Instruction\n{instruction}\n\n@@ Response\n"
)
_PRO_INSTRUCTION = (
    "Write a solution of python file to the following problems, the solution of the second "
    "problem requires single or multiple calls to the first solution.\n"
    "```python\n{first}\n{second}\n```"
)

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "humaneval": ("prompt", "entry_point", "test"),
    "mbpp": ("code", "test_list"),
    "humaneval_pro": ("raw_problem", "new_problem", "test_code"),
    "mbpp_pro": ("raw_problem", "new_problem", "test_code"),
}


@dataclass(frozen=True)
class Program:
    """What is run for one completion.

    Attributes:
        code: The model's code, with what the benchmark puts before it.
        tests: The benchmark's tests. They are run after the code, in the same module.
        limits: What the benchmark allows.
    """

    code: str
    tests: str
    limits: Limits = _LIMITS


@dataclass(frozen=True)
class Prompt:
    """What is put to the model.

    Attributes:
        system: System message, if the benchmark has one.
        user: User message, or the text for a model without a chat template.
        response_prefix: What the answer is made to begin with; not part of the completion.
    """

    system: str | None
    user: str
    response_prefix: str = ""


def prompt(benchmark: str, row: Row) -> Prompt:
    """Makes the prompt for a problem; also of ``livecodebench``.

    For the Pro benchmarks it is the raw text that CodeEval-Pro puts to models, with the first
    problem as the beginning of the answer. The others are instructions for chat models.

    Raises:
        EvaluationError: The benchmark is not known, or the row lacks a column.
    """
    if benchmark == "livecodebench":
        return Prompt(*livecodebench_prompt.texts(row))
    _check(benchmark, row)
    if benchmark == "humaneval":
        return Prompt(
            None,
            "Complete the following Python function. Answer with the whole function, and the "
            f"imports it needs, in one ```python block.\n\n```python\n{row['prompt'].strip()}\n```",
        )
    if benchmark == "mbpp":
        tests = "\n".join(row["test_list"])
        return Prompt(
            None,
            f"{_task(row)}\n\nThe code has to pass these tests:\n\n```python\n{tests}\n```\n\n"
            "Answer with the code, without the tests, in one ```python block.",
        )
    first, second = row["raw_problem"].strip(), row["new_problem"].strip()
    instruction = _PRO_INSTRUCTION.format(first=first, second=second)
    return Prompt(None, _PRO_TEXT.format(instruction=instruction), f"```python\n{first}\n")


def assemble(
    benchmark: str, row: Row, completion: str, *, is_chat: bool | None = None
) -> dict[str, Program]:
    """Makes the programs that decide about a completion.

    Args:
        benchmark: Whose rules hold.
        row: The problem.
        completion: What the model wrote after the prompt.
        is_chat: Whether the completion is a whole answer, with its code in a block, rather than
            what follows the prompt's ``response_prefix`` or the function's head. By default it is
            for HumanEval and MBPP, and is not for the Pro benchmarks.

    Returns:
        Programs by variant: ``plain``; for the Pro benchmarks ``raw`` and ``sanitized``, which
        are scored apart: the higher pass@1 over all problems is the benchmark's.

    Raises:
        EvaluationError: The benchmark is not known, or the row lacks a column.
    """
    _check(benchmark, row)
    if benchmark == "humaneval":
        code = _humaneval_code(row, completion, is_chat=is_chat is not False)
        return {"plain": Program(code, f"{row['test']}\ncheck({row['entry_point']})\n")}
    if benchmark == "mbpp":
        if is_chat is False:
            code = extract_code(completion, "continuation")
        else:
            code = extract_code(completion, "chat", wanted=_tested_name(row))
        return {"plain": Program(code, _mbpp_tests(row))}
    if is_chat:
        code, before = extract_code(completion, "codeeval_pro"), ""
    else:
        code, before = extract_code(completion, "continuation"), row["raw_problem"]
    return {
        "raw": Program(before + code, row["test_code"]),
        "sanitized": Program(before + sanitized(code), row["test_code"]),
    }


def reference(benchmark: str, row: Row) -> Program:
    """Makes the program of a problem's own solution.

    Raises:
        EvaluationError: The benchmark is not known, or the row lacks a column.
    """
    _check(benchmark, row)
    if benchmark == "humaneval":
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        return Program(row["prompt"] + row["canonical_solution"], tests)
    if benchmark == "mbpp":
        return Program(row["code"], _mbpp_tests(row))
    parts = ("raw_problem", "raw_solution", "new_problem", "new_solution")
    return Program("".join(row[part] for part in parts), row["test_code"])


def _humaneval_code(row: Row, completion: str, *, is_chat: bool) -> str:
    name = row["entry_point"]
    if not is_chat:
        return str(row["prompt"]) + extract_code(completion, "continuation")
    code = extract_code(completion, "chat", wanted=name)
    # The prompt stays before a whole function too: it has imports and helpers, and its own
    # function, whose body is a docstring, is replaced.
    return str(row["prompt"]) + ("\n" if defines(code, name) else "") + code


def _task(row: Row) -> str:
    # The sanitized and the full file name this column differently.
    return str(row.get("prompt") or row.get("text") or "").strip()


def _tested_name(row: Row) -> str | None:
    """The function that MBPP's tests call: the first that the solution defines of those called."""
    called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(row["test_list"]))
    return next((name for name in called if defines(row["code"], name)), None)


def _mbpp_tests(row: Row) -> str:
    before = [*(row.get("test_imports") or ()), row.get("test_setup_code") or ""]
    return "\n".join([*before, *row["test_list"]]) + "\n"


def _check(benchmark: str, row: Row) -> None:
    if benchmark not in _COLUMNS:
        raise EvaluationError(
            "The code benchmark is not known.",
            got=benchmark,
            expected=", ".join(get_args(Benchmark)),
        )
    missing = [column for column in _COLUMNS[benchmark] if column not in row]
    if benchmark == "mbpp" and not _task(row):
        missing.append("prompt or text")
    if missing:
        raise EvaluationError(
            f"A row of {benchmark} lacks columns.",
            got="columns " + ", ".join(map(str, row)),
            expected=", ".join(missing),
            hint="Use the benchmark's own file; docs/sandbox.md names it.",
        )

"""LiveCodeBench: its rows, and running a program on a problem's tests.

Every test is a process of its own: programs that read standard input get a real one, functions
are called once in a fresh interpreter. Nothing of the benchmark's own code is imported; where the
verdicts can differ from its own is in ``docs/sandbox.md``.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code.extraction import extract_code
from arm_ray.evaluation.code.limits import Limits, Outcome
from arm_ray.evaluation.code.programs import Program
from arm_ray.evaluation.code.sandbox import Sandbox
from arm_ray.storage.regular import lines_of, open_regular, parse_json

Verdict = Literal["passed", "wrong", "error", "timeout", "memory", "output"]

LIMITS = Limits(wall_s=6.0, cpu_s=12)

_COLUMNS = (
    *("question_content", "question_id", "contest_date", "starter_code"),
    *("public_test_cases", "private_test_cases", "metadata"),
)
# Most bytes that the tests of one problem may unpack to.
_MOST_UNPACKED = 1 << 31
_WRONG = 87

# What programs find imported, as in the benchmark's harness.
_ALL_OF = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *(
        "statistics",
        "itertools",
        "functools",
        "operator",
        "io",
        "sys",
        "json",
        "builtins",
        "typing",
    ),
)
_PRELUDE = (
    "".join(f"from {name} import *\n" for name in _ALL_OF)
    + "".join(f"import {name}\n" for name in _ALL_OF if name not in ("builtins", "typing"))
    + "sys.setrecursionlimit(50000)\n"
)

# After the program, for a function: the names are private to it, as programs define anything.
_CALL = """
def _arm_ray_call(build, read, leave):
    arguments = [read(line) for line in {input!r}.split("\\n")]
    expected = read({output!r})
    found = getattr({owner}, {name!r})(*arguments)
    # Only the outermost: the expected values have no tuples.
    if isinstance(found, tuple):
        found = list(found)
    if not found == expected:
        leave({wrong})

_arm_ray_call(None, __import__("json").loads, __import__("os")._exit)
"""


@dataclass(frozen=True)
class Test:
    """One test: what goes in, and what has to come out."""

    __test__ = False  # not a test of pytest's
    input: str
    output: str


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        row: As in the file.
        function: The method to call; none: the program reads standard input.
    """

    row: Mapping[str, Any]
    function: str | None

    @property
    def key(self) -> str:
        """The benchmark's id."""
        return str(self.row["question_id"])

    @property
    def date(self) -> datetime.date:
        """The day of the contest, which decides whether a model can have seen it."""
        return datetime.datetime.fromisoformat(self.row["contest_date"]).date()

    def tests(self) -> list[Test]:
        """Unpacks the tests: the public ones, then the private ones.

        Raises:
            EvaluationError: They are malformed, or there are none.
        """
        where = f"LiveCodeBench problem {self.key}"
        public = _tests(str(self.row["public_test_cases"]), where)
        private = _tests(unpacked(str(self.row["private_test_cases"]), where), where)
        if not public and not private:
            raise EvaluationError("A problem has no tests.", where=where)
        return public + private


@dataclass(frozen=True)
class Result:
    """How a completion did.

    Attributes:
        code: The code that was run.
        verdicts: One for each test, up to and with the first that was not passed.
        tests: How many tests there are.
        note: The verdict, and what the last program run said.
    """

    code: str
    verdicts: tuple[Verdict, ...]
    tests: int
    note: str

    @property
    def passed(self) -> bool:
        """Whether every test was passed."""
        return self.verdicts == ("passed",) * self.tests


def load_rows(
    path: str | Path,
    *,
    limit: int | None = None,
    release: str | None = None,
    start_date: str | datetime.date | None = None,
    end_date: str | datetime.date | None = None,
) -> list[Problem]:
    """Reads problems, in the order of the files.

    Args:
        path: A file of JSON lines, or the directory of the benchmark's data set.
        limit: How many of the first that are left.
        release: For a directory: ``v5`` or ``release_v5`` is all up to the fifth file,
            ``v4_v5`` the fourth and fifth; by default all that are there.
        start_date: First day of contests, as a date or in ISO form.
        end_date: Last day of contests; that day counts.

    Raises:
        EvaluationError: A file is missing or malformed; names the line. Or nothing is left.
    """
    first, last = _day(start_date, datetime.date.min), _day(end_date, datetime.date.max)
    problems: list[Problem] = []
    for file in _files(Path(path).expanduser(), release):
        for problem in _read(file):
            if first <= problem.date <= last:
                problems.append(problem)
            if limit is not None and len(problems) >= limit:
                return problems
    if not problems:
        raise EvaluationError(
            "No problem of LiveCodeBench is left.", where=path, got=f"{first} to {last}"
        )
    return problems


def problem_of(row: Mapping[str, Any], where: object = "LiveCodeBench") -> Problem:
    """Makes a problem of a row.

    Raises:
        EvaluationError: The row lacks a column, or one cannot be read.
    """
    missing = [name for name in _COLUMNS if not isinstance(row.get(name), str)]
    if missing:
        raise EvaluationError(
            "A row of LiveCodeBench lacks columns.",
            where=where,
            got="columns " + ", ".join(map(str, row)),
            expected=", ".join(missing) + " as text",
        )
    try:
        function = json.loads(row["metadata"]).get("func_name")
        problem = Problem(row, function)
        _ = problem.date
    except (ValueError, AttributeError) as error:
        raise EvaluationError(
            "A row of LiveCodeBench cannot be read.", where=where, got=error
        ) from None
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise EvaluationError("A function's name is none.", where=where, got=repr(function))
    return problem


def run(problem: Problem, completion: str, sandbox: Sandbox, *, limits: Limits = LIMITS) -> Result:
    """Takes the code out of a completion as the benchmark does, and runs it on all tests."""
    return run_code(problem, extract_code(completion, "last"), sandbox, limits=limits)


def run_code(problem: Problem, code: str, sandbox: Sandbox, *, limits: Limits = LIMITS) -> Result:
    """Runs code on a problem's tests, one after the other, up to the first it does not pass.

    Args:
        problem: The problem.
        code: The program, or the class with the method.
        sandbox: Where it runs.
        limits: For each test.

    Raises:
        EvaluationError: The problem's tests are malformed.
        SandboxError: The sandbox failed, which says nothing about the program.
    """
    tests = problem.tests()
    if not code.strip():
        return Result(code, ("error",), len(tests), "error: no code")
    verdicts: list[Verdict] = []
    note = "passed"
    for test in tests:
        # The right answer may be long, and a wrong one somewhat longer.
        most = max(limits.output_bytes, 2 * len(test.output))
        allowed = dataclasses.replace(limits, output_bytes=most)
        if problem.function is None:
            outcome = sandbox.run(_PRELUDE + code, stdin=test.input, limits=allowed)
            is_right = outcome.passed and outputs_match(outcome.stdout, test.output)
        else:
            outcome = sandbox.run_tests(_call(problem.function, code, test, allowed))
            is_right = outcome.passed
        verdicts.append(_verdict(outcome, is_right=is_right))
        if not is_right:
            note = f"{verdicts[-1]}: test {len(verdicts)} of {len(tests)}: {outcome.detail}"
            break
    return Result(code, tuple(verdicts), len(tests), note)


def outputs_match(found: str, expected: str) -> bool:
    """Compares output as the benchmark does.

    Both are stripped and compared line by line: stripped lines have to be equal as text, or
    number by number as decimals.
    """
    found_lines = found.strip().split("\n")
    expected_lines = expected.strip().split("\n")
    return len(found_lines) == len(expected_lines) and all(
        _lines_match(a.strip(), b.strip()) for a, b in zip(found_lines, expected_lines, strict=True)
    )


def unpacked(text: str, where: object = None) -> str:
    """Returns private tests as JSON text; they come as that, or packed.

    Packed is base64 of zlib of a pickle of the JSON text. A pickle can name any function to be
    called, so this one may hold nothing but a text.

    Raises:
        EvaluationError: They are neither, or would be too large.
    """
    if text.lstrip().startswith("["):
        return text
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), _MOST_UNPACKED)
        if stream.unconsumed_tail or not stream.eof:
            raise ValueError(f"more than {_MOST_UNPACKED} bytes, or cut off")
        found = _TextUnpickler(io.BytesIO(data)).load()
    except (ValueError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise _malformed(where, error) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _malformed(where, f"{type(error).__name__}: {error}") from None
    if not isinstance(found, str):
        raise _malformed(where, f"a pickled {type(found).__name__}")
    return found


class _TextUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only text is read")


def _malformed(where: object, got: object) -> EvaluationError:
    return EvaluationError(
        "The private tests of a problem cannot be read.",
        where=where,
        got=got,
        expected="a JSON list, or base64(zlib(pickle(text of a JSON list)))",
    )


def _tests(text: str, where: object) -> list[Test]:
    try:
        return [Test(test["input"], test["output"]) for test in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            "The tests of a problem cannot be read.",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="a JSON list of objects with input and output",
        ) from None


def _call(function: str, code: str, test: Test, limits: Limits) -> Program:
    # The benchmark's own way to tell a class from a plain function.
    has_class = "class Solution" in code
    owner = "Solution()" if has_class else '__import__("sys").modules["program"]'
    call = _CALL.format(
        input=test.input, output=test.output, owner=owner, name=function, wrong=_WRONG
    )
    return Program(f"{_PRELUDE}\n{code}", call, limits)


def _verdict(outcome: Outcome, *, is_right: bool) -> Verdict:
    if is_right:
        return "passed"
    if outcome.passed or outcome.exit_code == _WRONG:
        return "wrong"
    return "error" if outcome.status == "failed" else outcome.status


def _lines_match(found: str, expected: str) -> bool:
    if found == expected:
        return True
    try:
        return [Decimal(a) for a in found.split()] == [Decimal(b) for b in expected.split()]
    except (InvalidOperation, ValueError):
        return False


def _read(file: Path) -> Iterator[Problem]:
    try:
        with open_regular(file) as opened:
            for number, line in enumerate(lines_of(opened), start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield problem_of(_parsed(line.decode("utf-8"), where), where)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            "A file of LiveCodeBench cannot be read.", where=file, got=error
        ) from None


def _parsed(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise EvaluationError("A line is not valid JSON.", where=where, got=error) from None
    if not isinstance(row, dict):
        raise EvaluationError("A line is no object.", where=where, got=type(row).__name__)
    return row


def _files(path: Path, release: str | None) -> list[Path]:
    if not path.is_dir():
        if release is not None:
            raise EvaluationError(
                "A release is made of several files.",
                where=path,
                expected="a directory with test.jsonl, test2.jsonl and so on",
            )
        return [path]
    there = {number: path / _file_name(number) for number in range(1, 100)}
    there = {number: file for number, file in there.items() if file.is_file()}
    wanted = list(there) if release is None else _numbers(release)
    missing = [_file_name(number) for number in wanted if number not in there]
    if missing or not wanted:
        raise EvaluationError(
            "Files of LiveCodeBench are missing.",
            where=path,
            got=", ".join(file.name for file in there.values()) or "none of them",
            expected=", ".join(missing) or _file_name(1),
        )
    return [there[number] for number in wanted]


def _file_name(number: int) -> str:
    return "test.jsonl" if number == 1 else f"test{number}.jsonl"


def _numbers(release: str) -> list[int]:
    match = re.fullmatch(r"(?:release_)?v(\d+)(?:_v(\d+))?", release)
    if match is None:
        raise EvaluationError(
            "The release of LiveCodeBench is not understood.",
            got=release,
            expected="v5, release_v5 or v4_v5",
        )
    if match[2] is None:
        # A release holds the ones before it; only the fine-grained names are single files.
        return list(range(1, int(match[1]) + 1))
    return list(range(int(match[1]), int(match[2]) + 1))


def _day(given: str | datetime.date | None, default: datetime.date) -> datetime.date:
    if given is None:
        return default
    if isinstance(given, datetime.date):
        return given
    try:
        return datetime.date.fromisoformat(given)
    except ValueError as error:
        raise EvaluationError(
            "A date is not understood.", got=error, expected="2025-01-31"
        ) from None

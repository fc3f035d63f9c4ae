"""LiveCodeBench's format, and verdicts on toy problems."""

from __future__ import annotations

import base64
import datetime
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code import livecodebench
from arm_ray.evaluation.code.limits import MIB, Limits
from arm_ray.evaluation.code.livecodebench import (
    Problem,
    load_rows,
    outputs_match,
    problem_of,
    run,
    run_code,
    unpacked,
)
from arm_ray.evaluation.code.programs import prompt
from arm_ray.evaluation.code.sandbox import Sandbox
from tests.builders.sandboxes import sandbox

__all__ = ["sandbox"]
FILE = Path(__file__).parent / "data_code" / "livecodebench.jsonl"
PROBLEMS = {problem.key: problem for problem in load_rows(FILE)}
LIMITS = Limits(wall_s=2.0, memory_bytes=512 * MIB, output_bytes=MIB)
RIGHT = {
    "toy-sum": "input()\nprint(sum(map(int, input().split())))",
    "toy-half": "for x in map(int, input().split()):\n    print(x / 2)",
    "toy-pairs": """class Solution:
    def countPairs(self, nums: List[int], target: int) -> int:
        return sum(a + b == target for a, b in combinations(nums, 2))""",
    "toy-span": """class Solution:
    def span(self, words: List[str]) -> List[str]:
        return (min(words, key=len), max(words, key=len))""",
}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize("key", RIGHT)
def test_right_programs_pass(sandbox: Sandbox, key: str) -> None:
    problem = PROBLEMS[key]
    result = run(problem, f"Let me see.\n```python\n{RIGHT[key]}\n```\n", sandbox, limits=LIMITS)
    assert result.passed, result
    assert result.verdicts == ("passed",) * len(problem.tests())
    assert (result.code, result.note) == (RIGHT[key], "passed")


@pytest.mark.parametrize(
    ("key", "code", "verdicts"),
    [
        ("toy-sum", "print(6)", ("passed", "wrong")),
        ("toy-sum", "", ("error",)),
        ("toy-sum", "1 / 0", ("error",)),
        ("toy-sum", "while True: pass", ("timeout",)),
        ("toy-sum", "while True: print(1)", ("output",)),
        ("toy-sum", "x = bytearray(1 << 30)", ("memory",)),
        ("toy-sum", "print(6); 1 / 0", ("error",)),
        (
            "toy-pairs",
            "class Solution:\n  def countPairs(self, n, t): return 1",
            ("passed", "wrong"),
        ),
        ("toy-pairs", "class Solution: pass", ("error",)),
        ("toy-pairs", "class Solution:\n  def countPairs(self, n, t): exit(0)", ("error",)),
        ("toy-pairs", "import os; os._exit(0)", ("error",)),
        ("toy-pairs", "def (", ("error",)),
    ],
)
def test_wrong_programs_stop_at_their_first_failure(
    sandbox: Sandbox, key: str, code: str, verdicts: tuple[str, ...]
) -> None:
    limits = Limits(wall_s=1.0, memory_bytes=512 * MIB, output_bytes=MIB)
    result = run_code(PROBLEMS[key], code, sandbox, limits=limits)
    assert result.verdicts == verdicts, result
    assert not result.passed
    assert result.note.startswith(verdicts[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nn = int(sys.stdin.readline())\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nd = sys.stdin.buffer.read().split()\nprint(sum(map(int, d[1:])))",
        "d = open(0).read().split()\nprint(sum(map(int, d[1:])))",
        "def main():\n  input()\n  print(sum(map(int, input().split())))\n"
        "if __name__ == '__main__':\n  main()",
        "input()\nprint(sum(map(int, input().split())))\nexit()",
        "import os\nos.read(0, 2)\nprint(eval(os.read(0, 99).decode().strip().replace(' ', '+')))",
    ],
)
def test_programs_may_read_their_input_in_any_way(sandbox: Sandbox, code: str) -> None:
    result = run_code(PROBLEMS["toy-sum"], code, sandbox, limits=LIMITS)
    assert result.passed, result


def test_a_plain_function_does_too(sandbox: Sandbox) -> None:
    code = "def span(words):\n    return [min(words, key=len), max(words, key=len)]"
    assert run_code(PROBLEMS["toy-span"], code, sandbox, limits=LIMITS).passed


@pytest.mark.parametrize(
    ("found", "expected", "match"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1 2  \n\t3\n\n", "1 2\n3", True),
        ("1.0 2\n3e0", "1 2.00\n3", True),
        ("1  2", "1 2", True),
        ("1\n\n2", "1\n2", False),
        ("yes", "Yes", False),
        ("a b", "a  b", False),
        ("1 a", "1.0 a", False),
        ("50000000000000000", "50000000000000001", False),
        ("0.3", "0.30000000000000004", False),
        ("sNaN", "1", False),
        ("nan", "1", False),
        ("", "", True),
        ("", "1", False),
    ],
)
def test_output_is_compared_by_line_and_then_by_number(
    found: str, expected: str, match: bool
) -> None:
    assert outputs_match(found, expected) is match


def test_packed_and_plain_private_tests_are_read() -> None:
    assert len(PROBLEMS["toy-sum"].tests()) == 3
    assert PROBLEMS["toy-sum"].tests()[2].output == "1000000000001\n"
    assert unpacked('[{"x": 1}]') == '[{"x": 1}]'
    assert unpacked(packed("[1]")) == "[1]"


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/arm_ray-must-not-be-there",)


@pytest.mark.parametrize(
    "text",
    [
        packed(Attack()),
        packed(["[]"]),
        packed(datetime.date(2024, 1, 1)),
        packed("[]")[:-8],
        base64.b64encode(b"nothing").decode(),
        base64.b64encode(zlib.compress(b"nothing")).decode(),
        "not base64",
    ],
)
def test_a_pickle_that_is_more_than_text_is_refused(text: str) -> None:
    with pytest.raises(EvaluationError, match="private tests"):
        unpacked(text, "row 1")
    assert not Path("/tmp/arm_ray-must-not-be-there").exists()


def test_what_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "_MOST_UNPACKED", 1000)
    with pytest.raises(EvaluationError, match="private tests"):
        unpacked(packed("x" * 100_000))


def test_problems_are_chosen_by_date_and_number() -> None:
    assert [p.key for p in load_rows(FILE, limit=2)] == ["toy-sum", "toy-half"]
    assert [p.key for p in load_rows(FILE, start_date="2024-06-01", end_date="2024-09-15")] == [
        "toy-half",
        "toy-pairs",
    ]
    assert [p.key for p in load_rows(str(FILE), start_date=datetime.date(2025, 1, 1))] == [
        "toy-span"
    ]
    with pytest.raises(EvaluationError, match="No problem"):
        load_rows(FILE, start_date="2030-01-01")
    with pytest.raises(EvaluationError, match="date is not understood"):
        load_rows(FILE, start_date="last week")


def test_releases_are_made_of_files(tmp_path: Path) -> None:
    lines = FILE.read_text().splitlines()
    for name, line in zip(("test", "test2", "test3", "test4"), lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")

    def keys(release: str | None) -> list[str]:
        return [problem.key for problem in load_rows(tmp_path, release=release)]

    assert keys("v1") == ["toy-sum"]
    assert keys("release_v2") == ["toy-sum", "toy-half"]
    assert keys("v2_v3") == ["toy-half", "toy-pairs"]
    assert len(keys(None)) == 4
    with pytest.raises(EvaluationError, match=r"test5\.jsonl"):
        keys("v5")
    with pytest.raises(EvaluationError, match="not understood"):
        keys("latest")
    with pytest.raises(EvaluationError, match="several files"):
        load_rows(FILE, release="v1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"starter_code": None}, "starter_code"),
        ({"metadata": "["}, "cannot be read"),
        ({"metadata": "[]"}, "cannot be read"),
        ({"contest_date": "soon"}, "cannot be read"),
        ({"metadata": '{"func_name": "f(); import os"}'}, "name is none"),
    ],
)
def test_malformed_rows_are_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    row = dict(PROBLEMS["toy-sum"].row) | change
    with pytest.raises(EvaluationError, match=text):
        problem_of(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(row))
    with pytest.raises(EvaluationError, match="line 2"):
        load_rows(file)


@pytest.mark.parametrize("text", ["[", "[1]", '[{"input": "x"}]', "{}"])
def test_malformed_tests_are_refused(text: str) -> None:
    row = dict(PROBLEMS["toy-sum"].row) | {"public_test_cases": text}
    with pytest.raises(EvaluationError):
        Problem(row | {"private_test_cases": "[]"}, None).tests()


def test_the_prompt_has_the_question_and_the_form_of_the_answer() -> None:
    made = prompt("livecodebench", PROBLEMS["toy-sum"].row)
    assert made.system is not None
    assert made.user.startswith("### Question:\nThe first line holds n")
    assert "```python\n# YOUR CODE HERE\n```" in made.user
    made = prompt("livecodebench", PROBLEMS["toy-span"].row)
    assert "class Solution:\n    def span" in made.user
    assert made.user.endswith("### Answer: (use the provided format with backticks)\n\n")

"""Prompts, extraction and programs of the code benchmarks, on a few of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.code import check_references
from arm_ray.evaluation.code.extraction import Style, defines, extract_code, sanitized
from arm_ray.evaluation.code.programs import assemble, prompt, reference
from arm_ray.evaluation.code.sandbox import Sandbox
from tests.builders.sandboxes import sandbox

__all__ = ["sandbox"]
DATA = Path(__file__).parent / "data_code"
FILES = {
    "humaneval": DATA / "humaneval.jsonl",
    "mbpp": DATA / "mbpp.jsonl",
    "humaneval_pro": DATA / "humaneval_pro.json",
    "mbpp_pro": DATA / "mbpp_pro.json",
}
ROWS: dict[str, list[Any]] = {
    name: list(check_references.read_rows(f)) for name, f in FILES.items()
}
EVERY = [(name, index) for name, rows in ROWS.items() for index in range(len(rows))]


def solution(benchmark: str, row: Any) -> str:
    """The reference solution as a completion of the benchmark's prompt."""
    if benchmark == "humaneval":
        return f"Sure:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone."
    if benchmark == "mbpp":
        return f"```python\n{row['code']}\n```"
    return f"{row['raw_solution']}{row['new_problem']}{row['new_solution']}```\nThat is it."


@pytest.mark.parametrize(("benchmark", "index"), EVERY)
def test_references_pass_and_a_wrong_answer_does_not(
    sandbox: Sandbox, benchmark: str, index: int
) -> None:
    row = ROWS[benchmark][index]
    assert sandbox.run_tests(reference(benchmark, row)).passed
    programs = assemble(benchmark, row, solution(benchmark, row))
    assert set(programs) == ({"raw", "sanitized"} if "pro" in benchmark else {"plain"})
    for program in programs.values():
        outcome = sandbox.run_tests(program)
        assert outcome.passed, outcome
    for wrong in ("", "```python\npass\n```", "    pass\n", "I do not know."):
        for program in assemble(benchmark, row, wrong).values():
            assert not sandbox.run_tests(program).passed


def test_the_command_checks_references(
    capsys: pytest.CaptureFixture[str], sandbox: Sandbox
) -> None:
    assert sandbox.isolation == "bubblewrap"
    assert check_references.main(["mbpp_pro", str(FILES["mbpp_pro"])]) == 0
    assert "mbpp_pro: 1 of 1 reference solutions pass (1.0000)" in capsys.readouterr().out


def test_the_command_says_what_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sandbox: Sandbox
) -> None:
    assert sandbox.isolation == "bubblewrap"
    file = tmp_path / "mbpp.jsonl"
    file.write_text(FILES["mbpp"].read_text().replace("return 2 * x", "return x"))
    assert check_references.main(["mbpp", str(file)]) == 1
    out = capsys.readouterr().out
    assert "3: failed: AssertionError" in out
    assert "2 of 3" in out
    assert check_references.main(["mbpp", str(tmp_path / "missing")]) == 2
    file.write_text("")
    assert check_references.main(["mbpp", str(file)]) == 2


@pytest.mark.parametrize(
    ("style", "completion", "code"),
    [
        ("continuation", "  return 1\n```\nNow more", "  return 1\n"),
        ("continuation", "  return 1\n", "  return 1\n"),
        ("chat", "Text\n```python\na = 1\n```\n```python\nb\n```", "a = 1\n"),
        ("chat", "```bash\npip\n```\n```py\na = 1\n```", "a = 1\n"),
        ("chat", "```\na = 1\n```", "a = 1\n"),
        ("chat", "```Python\na = 1", "a = 1\n"),
        ("chat", "a = 1", "a = 1"),
        ("chat", "<think>\n```python\nx\n```\n</think>\n```python\na = 1\n```", "a = 1\n"),
        ("chat", "1. First\n   ```python\n   a = 1\n   ```", "   a = 1\n"),
        ("last", "```python\nx\n```\nor\n```python\na = 1\n```", "a = 1"),
        ("last", "```python\na = 1", ""),
        ("codeeval_pro", "Here:\n```python\na = 1\n```\nend", "\na = 1\n"),
        ("codeeval_pro", "a = 1\n```", "a = 1\n"),
    ],
)
def test_code_is_taken_out(style: Style, completion: str, code: str) -> None:
    assert extract_code(completion, style) == code


def test_the_block_that_defines_the_function_is_taken() -> None:
    completion = "```python\nprint(1)\n```\n```python\ndef f():\n  pass\n```"
    assert extract_code(completion, wanted="f") == "def f():\n  pass\n"
    assert extract_code(completion, wanted="g") == "print(1)\n"


@pytest.mark.parametrize(
    ("code", "is_so"),
    [
        ("def f(x): pass", True),
        ("async def f(x): pass", True),
        ("class f: pass", True),
        ("f = lambda: 1", True),
        ("f: object = 1", True),
        ("f (1)", False),
        ("f == 1", False),
        ("def ff(x): pass", False),
        ("    def f(x): pass", False),
        ("x = f", False),
    ],
)
def test_definitions_are_found(code: str, is_so: bool) -> None:
    assert defines(code, "f") is is_so


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("a\nif __name__ == '__main__':\n  b", "a\n"),
        ("a # Test\nif __name__: b", "a # Test\n"),
        ("a\n# Test cases\nb", "a\n"),
        ("a\n# Example usage\nb", "a\n"),
        ("a\n# Example:\nb", "a\n# Example:\nb"),
        ("a", "a"),
    ],
)
def test_what_is_appended_is_cut_off(code: str, left: str) -> None:
    assert sanitized(code) == left


def test_sanitizing_can_save_a_program(sandbox: Sandbox) -> None:
    row = ROWS["mbpp_pro"][0]
    completion = solution("mbpp_pro", row).split("```")[0] + "# Test\nassert double_all([1]) == 3\n"
    programs = assemble("mbpp_pro", row, completion)
    assert not sandbox.run_tests(programs["raw"]).passed
    assert sandbox.run_tests(programs["sanitized"]).passed


def test_a_chat_answer_of_the_pro_benchmarks_stands_alone(sandbox: Sandbox) -> None:
    row = ROWS["mbpp_pro"][0]
    whole = row["raw_problem"] + solution("mbpp_pro", row)
    programs = assemble("mbpp_pro", row, f"Here:\n```python\n{whole}", is_chat=True)
    assert all(sandbox.run_tests(program).passed for program in programs.values())


def test_a_body_alone_completes_humaneval(sandbox: Sandbox) -> None:
    row = ROWS["humaneval"][0]
    for completion in (row["canonical_solution"], f"```python\n{row['canonical_solution']}```"):
        assert sandbox.run_tests(assemble("humaneval", row, completion)["plain"]).passed
    base = assemble("humaneval", row, row["canonical_solution"], is_chat=False)
    assert sandbox.run_tests(base["plain"]).passed


def test_the_prompts_of_the_pro_benchmarks_are_the_raw_text() -> None:
    made = prompt("mbpp_pro", ROWS["mbpp_pro"][0])
    assert made.system is None
    assert made.user.startswith("You are an exceptionally intelligent coding assistant")
    first = "# Write a function to double a number.\ndef double(x):"
    second = "# Write a function to double each number of a list.\ndef double_all(numbers):"
    assert f"```python\n{first}\n{second}\n```\n\n@@ Response\n" in made.user
    assert made.user.endswith("@@ Response\n")
    assert made.response_prefix == f"```python\n{first}\n"


def test_the_other_prompts_hold_the_task() -> None:
    row = ROWS["humaneval"][0]
    assert row["prompt"].strip() in prompt("humaneval", row).user
    for row in ROWS["mbpp"]:
        user = prompt("mbpp", row).user
        assert row.get("prompt", row.get("text")) in user
        assert all(test in user for test in row["test_list"])


def test_braces_in_a_problem_stay(sandbox: Sandbox) -> None:
    assert sandbox.slots
    row = ROWS["mbpp_pro"][0] | {"raw_problem": "# {x} {{y}}\ndef double(x):\n"}
    assert "# {x} {{y}}" in prompt("mbpp_pro", row).user


def test_a_foreign_row_or_benchmark_is_refused() -> None:
    with pytest.raises(EvaluationError, match="lacks columns") as caught:
        assemble("humaneval", {"prompt": "x"}, "")
    assert "entry_point, test" in str(caught.value)
    with pytest.raises(EvaluationError, match="prompt or text"):
        prompt("mbpp", {"code": "", "test_list": []})
    with pytest.raises(EvaluationError, match="not known"):
        prompt("apps", {})

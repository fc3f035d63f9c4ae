"""Every grader of a task, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.graders import Answer, Grader, GraderSpec, last_number, load_scorer
from arm_ray.evaluation.settings import GradingSettings

MATH = GraderSpec("gsm8k", "math", "gsm8k")


@pytest.fixture
def grader() -> Iterator[Grader]:
    made = Grader(GradingSettings())
    yield made
    made.close()


def test_math_is_graded_both_ways(grader: Grader) -> None:
    answers = [
        Answer("So it is \\boxed{18}.", "18"),
        # The toolkit takes a hundredth for the same; math-verify does not.
        Answer("So it is \\boxed{0.18}.", "18"),
        Answer("I do not know.", "18"),
    ]
    verdicts = grader.grade(MATH, answers)
    assert [v.scores["strict"] for v in verdicts] == [1.0, 0.0, 0.0]
    assert [v.scores["qwen_compat"] for v in verdicts] == [1.0, 1.0, 0.0]
    assert [v.answer for v in verdicts] == ["18", "0.18", None]


def test_numbers_and_texts(grader: Grader) -> None:
    number = GraderSpec("mine", "questions", "number")
    answers = [Answer("29 - 26 = 3", " 3.0"), Answer("1,200 men", "1200"), Answer("none", "1")]
    assert [v.scores["score"] for v in grader.grade(number, answers)] == [1.0, 1.0, 0.0]
    exact = GraderSpec("mine", "questions", "exact")
    answers = [Answer(" The  Moon\n", "the moon"), Answer("moon", "the moon")]
    assert [v.scores["score"] for v in grader.grade(exact, answers)] == [1.0, 0.0]
    assert last_number("7 - ( 3 + 2 ) = 2") == 2.0


def test_code_is_run_in_the_sandbox(grader: Grader) -> None:
    assert grader.ready(True) == "bubblewrap"
    row = {
        "task_id": "HumanEval/x",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "test": "def check(f):\n    assert f(2) == 4\n",
    }
    spec = GraderSpec("humaneval", "code", "humaneval")
    right = "```python\ndef double(x):\n    return 2 * x\n```"
    wrong = "```python\ndef double(x):\n    return x\n```"
    verdicts = grader.grade(spec, [Answer(right, row=row), Answer(wrong, row=row)])
    assert [v.scores["passed"] for v in verdicts] == [1.0, 0.0]
    assert [v.note for v in verdicts] == ["passed", "failed"]


def test_both_ways_to_cut_a_pro_program_are_scored(grader: Grader) -> None:
    row = {
        "raw_problem": "def one():\n",
        "new_problem": "def two():\n",
        "test_code": "assert two() == 2\n",
    }
    # The model's own test is wrong and spoils the program, unless it is cut off.
    completion = (
        "    return 1\n\ndef two():\n    return one() + one()\n\n# Test\nassert two() == 3\n```"
    )
    spec = GraderSpec("humaneval_pro", "code", "humaneval_pro")
    [verdict] = grader.grade(spec, [Answer(completion, row=row)])
    assert verdict.scores["passed_sanitized"] == 1.0
    assert verdict.scores["passed_raw"] == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(completion, row):\n    return 3\n", "returned no score"),
        ("def score(completion, row):\n    return float('nan')\n", "returned no score"),
        ("def score(completion, row):\n    raise KeyError(row['question'])\n", "KeyError: 'why'"),
        ("def other():\n    pass\n", "cannot be loaded"),
        ("import nothing_of_this_name\n", "cannot be loaded"),
    ],
)
def test_a_scorer_that_fails_is_told_with_what_it_failed_on(
    tmp_path: Path, grader: Grader, text: str, words: str
) -> None:
    (tmp_path / "scorer.py").write_text(text)
    spec = GraderSpec("mine", "questions", "python", f"{tmp_path}/scorer.py:score")
    with pytest.raises(EvaluationError, match=words):
        grader.grade(spec, [Answer("because", row={"question": "why"})])


def test_a_scorer_sees_completion_and_row(tmp_path: Path, grader: Grader) -> None:
    (tmp_path / "scorer.py").write_text(
        "def score(completion, row):\n    return completion.count(row['letter']) / 10\n"
    )
    spec = GraderSpec("mine", "questions", "python", f"{tmp_path}/scorer.py:score")
    [verdict] = grader.grade(spec, [Answer("banana", row={"letter": "a"})])
    assert verdict.scores == {"score": 0.3}
    with pytest.raises(EvaluationError, match="path/to/file"):
        load_scorer("score")

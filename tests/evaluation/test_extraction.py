"""What is taken for the answer, in each mode, and for the gold answer of a row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.grading.extraction import Extraction, extract_answer, gold_answer

balanced = st.recursive(
    st.text("ab1,+^_ \\frac", max_size=6).map(lambda s: s.replace("\\", "\\frac ")),
    lambda inner: st.tuples(inner, inner, inner).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"),
    max_leaves=12,
)


@given(balanced, st.text("xyz \n.", max_size=20))
def test_nested_braces_of_the_last_box(content: str, tail: str) -> None:
    text = rf"first \boxed{{wrong}} then $\boxed{{{content}}}$ {tail}"
    found = extract_answer(text, "qwen_compat")
    assert (found.how, found.unclosed) == ("boxed", False)
    if content.strip():
        assert extract_answer(text) == Extraction(content.strip(), "boxed")
    else:
        assert extract_answer(text) == Extraction("wrong", "boxed")


@given(st.text(max_size=300))
def test_no_text_is_an_error(text: str) -> None:
    for mode in ("strict", "qwen_compat"):
        found = extract_answer(text, mode)  # type: ignore[arg-type]
        assert (found.answer is None) == (found.how == "none")


@pytest.mark.parametrize(
    ("text", "strict", "compat"),
    [
        (r"\boxed{7}. Wait, \boxed{5}", ("5", "boxed"), ("5", "boxed")),
        (r"\boxed{7} and then \boxed{5", ("7", "boxed"), ("5", "boxed")),
        (r"\boxed{7}; answers go in \boxed{}", ("7", "boxed"), ("", "boxed")),
        (r"\boxed{\left\{1,2\right.}", (r"\left\{1,2\right.", "boxed"), None),
        (r"\fbox{3}", ("3", "boxed"), ("3", "last_number")),
        (r"\boxed 5$ and 6", ("5", "boxed"), ("5", "boxed")),
        (r"\boxed {5}", ("5", "boxed"), ("{5}", "boxed")),
        ("The answer is 5.", ("5", "phrase"), ("5", "phrase")),
        ("the answer is: $x+1$, of course", ("x+1", "phrase"), (" $x+1$, of course", "phrase")),
        ("The answer is 4. But 7 too", ("4", "phrase"), ("4. But 7 too", "phrase")),
        ("The final answer is $3$. I hope it is.", ("3", "phrase"), ("3", "phrase")),
        ("so 3+4\n#### 1,234", ("1,234", "phrase"), ("1234", "last_number")),
        ("Costs 1,234 in all.", ("1,234", "last_number"), ("1234", "last_number")),
        ("答案是12", ("12", "last_number"), ("12", "phrase")),
        ("It is -0.5", ("-0.5", "last_number"), ("-0.5", "last_number")),
        ("no idea", (None, "none"), (None, "none")),
        ("", (None, "none"), (None, "none")),
        (r"\boxed{5}<|im_end|>\boxed{6}", ("5", "boxed"), ("5", "boxed")),
        (r"\boxed{5}</s> 6", ("5", "boxed"), ("5", "boxed")),
        ("\\boxed{1\n  2}", ("1\n  2", "boxed"), ("12", "boxed")),
    ],
)
def test_orders_of_search(
    text: str, strict: tuple[str | None, str], compat: tuple[str | None, str] | None
) -> None:
    found = extract_answer(text)
    assert (found.answer, found.how) == strict
    if compat:
        found = extract_answer(text, "qwen_compat")
        assert (found.answer, found.how) == compat


def test_a_box_that_was_cut_off_is_told() -> None:
    assert extract_answer(r"\boxed{5").unclosed
    assert extract_answer(r"\boxed{7} \boxed{5").unclosed
    assert not extract_answer(r"\boxed{5} \boxed{7}").unclosed
    assert extract_answer(r"\boxed{5", "qwen_compat") == Extraction("5", "boxed", True)


@pytest.mark.parametrize(
    ("benchmark", "row", "gold"),
    [
        ("gsm8k", {"answer": "4+4=<<4+4=8>>8\n#### 8"}, "8"),
        (
            "math",
            {"solution": r"a \boxed{1} b $\boxed{\frac{1}{2}}$", "answer": "0.5"},
            r"\frac{1}{2}",
        ),
        ("MATH-500", {"solution": r"$\boxed{3}$", "answer": "4"}, "3"),
        ("minerva", {"solution": r"\boxed{6.5e8}."}, "6.5e8"),
        ("olympiadbench", {"final_answer": ["$2$,$3$"]}, "$2$,$3$"),
        ("college_math", {"answer": " $\\$4500$ "}, "$\\$4500$"),
        ("svamp", {"Answer": 145.0}, "145.0"),
        ("asdiv", {"answer": "9 (apples)"}, "9"),
        ("mawps", {"target": 3}, "3"),
    ],
)
def test_gold_answers(benchmark: str, row: dict[str, Any], gold: str) -> None:
    assert gold_answer(benchmark, row) == gold


@pytest.mark.parametrize(
    ("benchmark", "row"),
    [
        ("gsm8k", {"answer": "8"}),
        ("gsm8k", {"answer": "8 ####"}),
        ("math", {"answer": "8"}),
        ("math", {"solution": "nothing"}),
        ("math", {"solution": None}),
        ("olympiadbench", {"final_answer": []}),
        ("olympiadbench", {"final_answer": "5"}),
        ("college_math", {}),
        ("nosuch", {"answer": "5"}),
    ],
)
def test_rows_without_a_gold_answer(benchmark: str, row: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError):
        gold_answer(benchmark, row)

"""Verdicts of both modes, against recorded ones and by property."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arm_ray.evaluation.grading import grade, parsing, qwen_compat, strict
from arm_ray.evaluation.grading.extraction import gold_answer
from arm_ray.evaluation.grading.normalise import normalised
from arm_ray.evaluation.grading.pool import GraderPool, GradingItem
from arm_ray.evaluation.grading.qwen_strings import canonical, number_in_words

DATA = Path(__file__).parent / "data"
PAIRS = json.loads((DATA / "grader_pairs.json").read_text(encoding="utf-8"))["pairs"]

# Where strict is right and math-verify alone is not, because of how e-notation is written.
IMPROVED = {
    ("6.5e8", r"6.5 \times 10^8"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("3.23e-5", r"3.23 \times 10^{-5}"),
    ("2.45e6", "2450000"),
}
quick = settings(max_examples=60, deadline=None)
needs_grammar = pytest.mark.skipif(
    parsing._GRAMMAR is None, reason="this antlr4 cannot load SymPy's LaTeX grammar"
)


def rows(name: str) -> list[Any]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(limit_s=30) as made:
        yield made


def boxed(answer: str) -> str:
    return rf"So it is $\boxed{{{answer}}}$."


@needs_grammar
def test_compat_repeats_the_toolkit_on_every_pair(pool: GraderPool) -> None:
    items = [GradingItem(boxed(p["boxed_answer"]), p["gold"], p["bench"]) for p in PAIRS]
    wrong = [
        (p["gold"], p["boxed_answer"])
        for p, verdict in zip(PAIRS, pool.grade(items), strict=True)
        if verdict.qwen_compat != p["qwen_toolkit"]
    ]
    assert wrong == []


def test_strict_is_math_verify_but_for_notation(pool: GraderPool) -> None:
    items = [GradingItem(boxed(p["boxed_answer"]), p["gold"], p["bench"]) for p in PAIRS]
    differ = {
        (p["gold"], p["boxed_answer"])
        for p, verdict in zip(PAIRS, pool.grade(items), strict=True)
        if verdict.strict != p["math_verify_0_9_0"]
    }
    assert differ == IMPROVED
    assert all(strict.equal(answer, gold) for gold, answer in IMPROVED)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p['gold']} | {p['boxed_answer']}")
def test_canonical_texts_are_the_toolkit_s(pair: dict[str, Any]) -> None:
    assert canonical(canonical(pair["boxed_answer"])) == pair["qwen_pred_norm"]
    assert qwen_compat.prepared_gold(pair["gold"], pair["bench"])[1] == pair["qwen_gold_norm"]


@needs_grammar
def test_recorded_verdicts_on_800_traces(pool: GraderPool) -> None:
    traces = rows("qwen_traces.jsonl")
    items, expected = [], []
    for row in traces:
        gold = gold_answer("math", {"solution": row["gold_solution_tail"]})
        items += [GradingItem(text, gold, "math") for text in row["completions"]]
        expected += row["scores"]
    verdicts = pool.grade(items)
    assert (len(items), sum(expected)) == (800, 728)
    assert [v.qwen_compat for v in verdicts] == expected
    # The one where the toolkit is wrong: 10{,}000 against 10000.
    assert [v.strict != e for v, e in zip(verdicts, expected, strict=True)].count(True) == 1


@needs_grammar
def test_verdicts_of_the_toolkit_s_own_code(pool: GraderPool) -> None:
    recorded = rows("toolkit_verdicts.jsonl")
    items = [GradingItem(r["completion"], r["gold"], r["bench"]) for r in recorded]
    wrong = [
        (r["gold"], r["completion"], r["toolkit"])
        for r, verdict in zip(recorded, pool.grade(items), strict=True)
        if verdict.qwen_compat != r["toolkit"]
    ]
    assert len(recorded) > 500
    assert wrong == []


numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-1000, 1000, places=3, allow_nan=False).map(str),
)
fractions = st.tuples(st.integers(1, 99), st.integers(1, 99)).map(
    lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"
)
golds = st.one_of(
    numbers,
    fractions,
    fractions.map(lambda f: rf"2x+{f}"),
    fractions.map(lambda f: rf"\sqrt{{{f}}}"),
    st.lists(numbers, min_size=2, max_size=4).map(lambda n: f"({', '.join(n)})"),
    st.sampled_from([r"\text{Evelyn}", r"(-\infty, 2]", r"\begin{pmatrix}1\\2\end{pmatrix}", "B"]),
)


@quick
@given(golds)
def test_the_gold_answer_is_right(gold: str) -> None:
    assert strict.judge(boxed(gold), gold)
    assert qwen_compat.judge(boxed(gold), gold)


@quick
@given(st.integers(1, 10**6), st.integers(1, 50).filter(lambda n: n != 10))
@example(18, 9)
@example(18, 11)
def test_tolerance_of_numbers(gold: int, tenths: int) -> None:
    near = f"{gold * (1 + tenths * 1e-5):.8f}"
    assert qwen_compat.judge(boxed(near), str(gold)) == (tenths < 10)
    # math-verify rounds to six places: a millionth and more is a difference.
    assert not strict.judge(boxed(near), str(gold))


@quick
@given(st.integers(2, 10**6))
def test_per_cent_leniency(gold: int) -> None:
    for factor in (100, 1, 0.01):
        assert qwen_compat.judge(boxed(repr(gold * factor)), str(gold))
    for factor in (10, 0.1, 1000):
        assert not qwen_compat.judge(boxed(repr(gold * factor)), str(gold))
    assert not strict.judge(boxed(str(gold * 100)), str(gold))


@quick
@given(st.integers(1, 999), st.integers(-30, 30))
def test_e_notation(mantissa: int, exponent: int) -> None:
    short, long = f"{mantissa}e{exponent}", rf"{mantissa} \times 10^{{{exponent}}}"
    assert normalised(short) == long
    assert strict.judge(boxed(long), short)
    assert strict.judge(boxed(short), long)


@pytest.mark.parametrize("text", ["2e", "x2e3", "e5", "0x1e5", r"\alpha2e3", "2e3x", "1.2.3e4"])
def test_what_is_not_e_notation_stays(text: str) -> None:
    assert normalised(text) == text


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("twenty-one", "21"),
        ("three hundred and five", "305"),
        ("two apples", "2"),
        ("one million two thousand", "1002000"),
        ("one point five", "1.5"),
        ("point", "0"),
        ("007", "7"),
        ("thousand and one", "thousand and one"),
        ("two thousand thousand", "two thousand thousand"),
        ("Evelyn", "Evelyn"),
        ("²", "²"),
    ],
)
def test_numbers_in_words(words: str, number: str) -> None:
    assert number_in_words(words) == number


def test_a_bare_tuple_is_not_read_in_part() -> None:
    assert not strict.judge(r"\boxed{3}", r"\left( 3, \frac{\pi}{2} \right)")
    assert strict.judge(r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)")


@pytest.mark.parametrize("answer", [r"50\%", "50", r"50 \%"])
def test_per_cent_signs_are_read_whatever_antlr_is_installed(answer: str) -> None:
    assert strict.judge(boxed(answer), "50")
    assert strict.judge(boxed("0.5"), r"50\%")


def test_units_stay_for_minerva() -> None:
    assert grade(boxed("5 m"), "5", "qwen_compat", benchmark="math")
    assert not grade(boxed("5 m"), "5", "qwen_compat", benchmark="minerva_math")


def test_dollars_of_college_math() -> None:
    assert not grade(boxed("4500"), r"$\$4500$", "qwen_compat", benchmark="college_math")
    assert grade(boxed("4500"), r"$\$4500$", "qwen_compat")
    assert grade(boxed("4500"), r"$\$4500$", benchmark="college_math")


@pytest.mark.parametrize("mode", ["strict", "qwen_compat"])
def test_it_works_on_any_thread(mode: Any) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(grade(boxed("0.5"), r"\frac12", mode)))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(4) as threads:
        found += threads.map(lambda n: grade(boxed(str(n)), "3", mode), range(1, 6))
    assert found == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {path}')",
        "(open('{path}','w'),1)",
        "(eval(chr(49)),1)",
        "(exec(input()),1)",
        "(().__class__.__base__,1)",
        "(pi.evalf,1)",
        "(print(5),1)",
    ],
)
def test_a_model_s_text_is_not_run(text: str, tmp_path: Path) -> None:
    path = tmp_path / "made"
    text = text.replace("{path}", str(path))
    with pytest.raises(Exception):  # noqa: B017, PT011
        parsing.read_python(text)
    with pytest.raises(Exception):  # noqa: B017, PT011
        parsing.as_sympy(text)
    assert not qwen_compat.judge(boxed(text), "1")
    assert not path.exists()


def test_python_notation_is_still_read() -> None:
    assert parsing.read_python("(1, 2)") == (1, 2)
    assert parsing.read_python("{2, 1}") == {1, 2}
    assert str(parsing.read_python("sqrt(8)+max(1,2)+x")) == "x + 2 + 2*sqrt(2)"


def test_without_the_grammar_the_other_parsers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_GRAMMAR", None)
    parsing.read.cache_clear()
    try:
        assert qwen_compat.judge(boxed("0.5"), r"\frac{1}{2}")
        assert qwen_compat.judge(boxed("(x+1)^2"), "x^2+2x+1")
        assert not qwen_compat.judge(boxed("(x+1)^2"), "x^2+2x+2")
    finally:
        parsing.read.cache_clear()

r"""The verdicts of the Qwen2.5-Math toolkit, with which most published figures were made.

What it lets pass on purpose: numbers within a relative 1e-4, and numbers off by a factor of 100
either way, as if one of the two were in per cent. What it does by accident is kept too; the docs
list it. A comparison that raises in the toolkit, which ends its run, is wrong here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isclose
from typing import Any

import sympy

from arm_ray.evaluation.grading.extraction import (
    benchmark_name,
    choice_in_answer,
    choice_of,
    extract_answer,
    is_letter,
    keeps_units,
    one_line,
    only_letters,
    until_end_of_turn,
)
from arm_ray.evaluation.grading.parsing import as_sympy, read
from arm_ray.evaluation.grading.qwen_strings import canonical

_RELATIVE = 1e-4
_BRACKETED = re.compile(r"[(\[].+[)\]]")
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", re.DOTALL)
_BRACES = str.maketrans("", "", "{}()")


def judge(completion: str, gold: str, *, benchmark: str | None = None) -> bool:
    """The toolkit's verdict on a completion.

    Args:
        completion: The model's whole text.
        gold: The gold answer, as `gold_answer` returns it.
        benchmark: The benchmark's name; decides how the gold answer is prepared, and whether
            units stay.

    Raises:
        Exception: Where the toolkit raises, for example on brackets nested too deeply.
    """
    text = until_end_of_turn(completion)
    if not text or text == "error":
        return False
    found = extract_answer(text, "qwen_compat").answer or ""
    keep = keeps_units(benchmark)
    # It prepares the answer twice, and the second time can change it further.
    answer = canonical(canonical(found, keep_units=keep), keep_units=keep)
    first, second = prepared_gold(gold, benchmark)
    if is_letter(first) and not is_letter(answer):
        answer = choice_of(text)
    elif not only_others(first) and only_others(answer):
        answer = only_letters(answer)
    return equal(answer, second)


def only_others(text: str) -> bool:
    """Whether a text holds anything but the letters A to E."""
    return only_letters(text) != text


def prepared_gold(gold: str, benchmark: str | None) -> tuple[str, str]:
    """The gold answer as the toolkit has it while it generates, and when it compares.

    Args:
        gold: The gold answer, as `gold_answer` returns it.
        benchmark: The benchmark's name.

    Returns:
        Both forms; the second is a second preparation of the first for most benchmarks.
    """
    name = benchmark_name(benchmark)
    if name == "math":
        once = canonical(one_line(gold))
        return once, once
    if keeps_units(name):
        if name == "minerva_math":
            gold = canonical(one_line(gold), keep_units=True)
        for old, new in ((r"\neq", r"\ne"), (r"\leq", r"\le"), (r"\geq", r"\ge")):
            gold = gold.replace(old, new)
        return gold, gold
    if name == "math500":
        gold = one_line(gold)
    elif name in {"college_math", "gaokao2023en"}:
        gold = gold.replace("$", "").strip()
    elif name == "olympiadbench":
        gold = gold.strip("$")
    once = canonical(gold)
    return once, canonical(once)


def equal(answer: str, gold: str) -> bool:
    """Whether two prepared answers are the same to the toolkit.

    Args:
        answer: The model's, in canonical form.
        gold: The gold answer, in canonical form.

    Raises:
        RecursionError: If brackets are nested too deeply.
    """
    if answer.strip().lower() == gold.strip().lower():
        return True
    if is_letter(gold) and choice_in_answer(answer) == gold:
        return True
    numbers = number(answer), number(gold)
    if numbers[0] is not None and numbers[1] is not None:
        # Two numbers that differ are final: nothing else is tried.
        factors = (numbers[1] / 100, numbers[1], numbers[1] * 100)
        return any(isclose(factor, numbers[0], rel_tol=_RELATIVE) for factor in factors)
    if not answer:
        return False
    answer, gold = answer.strip(), gold.strip()
    if "pmatrix" in answer and "pmatrix" not in gold:
        gold = _braces_to_matrix(gold)
    return (
        _same_but_for_brackets(answer, gold)
        or _same_parts(answer, gold)
        or _same_matrices(answer, gold)
        or _same_equations(answer, gold)
        or same_value(answer, gold)
    )


def number(text: str) -> float | None:
    """A plain number, with commas anywhere or a final per cent sign; else ``None``."""
    text = text.replace(",", "")
    try:
        return float(text)
    except ValueError:
        pass
    if not text.endswith("%"):
        return None
    try:
        return float(text[:-1].removesuffix("\\")) / 100
    except ValueError:
        return None


def _braces_to_matrix(gold: str) -> str:
    r"""``{1,2}`` as a matrix; the commas become single backslashes, as in the toolkit."""
    groups: list[str] = re.findall(r"\{.*,.*\}", gold.strip())
    rows = [group.strip("{}").replace(",", "\\") for group in groups]
    return ", ".join(rf"\begin{{pmatrix}}{row}\end{{pmatrix}}" for row in rows)


def _same_but_for_brackets(answer: str, gold: str) -> bool:
    """Equal as text once brackets are left out: ``[3,5)`` is ``(3,5]``."""
    square = answer.startswith("[") and answer.endswith("]") and not gold.startswith("(")
    round_ = answer.startswith("(") and answer.endswith(")") and not gold.startswith("[")
    if square or round_:
        answer, gold = answer.strip("[]()"), gold.strip("[]()")
    return answer.translate(_BRACES).lower() == gold.translate(_BRACES).lower()


def _same_parts(answer: str, gold: str) -> bool:
    """Both in brackets, of whichever kinds, and equal part by part in the same order."""
    if not (_BRACKETED.match(answer) and _BRACKETED.match(gold)):
        return False
    return _all_equal(answer[1:-1].split(","), gold[1:-1].split(","))


def _all_equal(answers: list[str], golds: list[str]) -> bool:
    return len(answers) == len(golds) and all(map(equal, answers, golds))


def _same_matrices(answer: str, gold: str) -> bool:
    matrices = _MATRIX.fullmatch(answer), _MATRIX.fullmatch(gold)
    if not (matrices[0] and matrices[1]):
        return False
    ours, theirs = (
        [row.strip().split("&") for row in matrix.group(1).split(r"\\") if row.strip()]
        for matrix in matrices
        if matrix
    )
    return len(ours) == len(theirs) and all(map(_all_equal, ours, theirs))


def _same_equations(answer: str, gold: str) -> bool:
    """Two equations up to sign; or one, with a short left side, against a value."""
    counts = answer.count("="), gold.count("=")
    if counts == (1, 1):
        ours, theirs = _difference(answer), _difference(gold)
        return same_value(ours, theirs) or same_value(f"-({ours})", theirs)
    for text, count, other in ((answer, counts[0], counts[1]), (gold, counts[1], counts[0])):
        left, _, right = text.partition("=")
        if count == 1 and other == 0 and len(left.strip()) <= 2:
            return equal(right, gold) if text is answer else equal(answer, right)
    return False


def _difference(equation: str) -> str:
    left, right = equation.split("=")
    return f"{left.strip()} - ({right.strip()})"


def same_value(answer: str, gold: str) -> bool:
    """Whether SymPy finds two texts equal, exactly or to a relative 1e-4.

    Args:
        answer: The model's, in canonical form.
        gold: The gold answer, in canonical form.
    """
    a, b = read(answer), read(gold)
    checks: tuple[Callable[[Any, Any], Any], ...] = (
        lambda a, b: str(a) == str(b) or a == b,
        lambda a, b: a.equals(as_sympy(b)) or sympy.simplify(a - b) == 0,
        lambda a, b: abs(a.lhs - a.rhs).equals(abs(b.lhs - b.rhs)),
        lambda a, b: isclose(_evaluated(b), _evaluated(a), rel_tol=_RELATIVE),
        _same_rounded_matrix,
    )
    return any(_holds(check, a, b) for check in checks)


def _holds(check: Callable[[Any, Any], Any], a: Any, b: Any) -> bool:
    # What SymPy cannot compare raises, in more ways than can be listed.
    try:
        return bool(check(a, b))
    except Exception:
        return False


def _evaluated(value: Any) -> float:
    return float(sympy.N(as_sympy(value, exact=True)))


def _same_rounded_matrix(a: Any, b: Any) -> Any:
    if a.shape != b.shape:
        return False
    return a.applyfunc(lambda x: round(x, 3)).equals(b.applyfunc(lambda x: round(x, 3)))

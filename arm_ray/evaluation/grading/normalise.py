r"""How answers are written alike before math-verify sees them. No SymPy.

Only notation that math-verify reads wrongly, or not at all, is changed; what an answer says is
not. The same is done to the gold answer.
"""

from __future__ import annotations

import re

from arm_ray.evaluation.grading.extraction import benchmark_name

# 6.5e8, -3.23E-5; not 2e (a product), x2e3 (a name) or 0x1e5.
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w|\.\d)")
_BRACED_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))")
_DOLLAR = re.compile(r"(?<!\\)\$")


def normalised(text: str) -> str:
    r"""An answer with ``6.5e8`` as ``6.5 \times 10^{8}`` and ``10{,}000`` as ``10,000``.

    Dollar signs that open and close formulas are dropped, because the answer is put into a
    formula of its own; an escaped one, for money, stays.

    Args:
        text: An answer or a gold answer.
    """
    text = text.replace("\0", "")
    text = _BRACED_COMMA.sub(",", text).replace("{,}", ",")
    text = _E_NOTATION.sub(lambda match: rf"{match[1]} \times 10^{{{int(match[2])}}}", text)
    return _DOLLAR.sub("", text).strip()


def normalised_gold(gold: str, benchmark: str | None) -> str:
    """A gold answer for math-verify.

    Args:
        gold: The gold answer, as `gold_answer` returns it.
        benchmark: The benchmark's name.
    """
    if benchmark_name(benchmark) == "asdiv":
        gold = re.sub(r"\(.*?\)", "", gold)
    return normalised(gold)


def compact(text: str) -> str:
    """A text without white space, to see whether two are the same at first sight."""
    return "".join(text.split())

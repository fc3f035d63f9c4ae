r"""The strict verdict: math-verify on nothing but the extracted answer.

Two traps of math-verify are kept away from here. A gold answer that is not wrapped can be read
in part (``\left( 3, \frac{\pi}{2} \right)`` bare is 3), so it is always put between dollar signs.
And a whole text with several boxes is read as the set of all of them, so only the extracted
answer is handed over, in a box of its own.

math-verify's own limits are off: they need a signal of the main thread, in whole seconds, for
each step. The worker that calls this has one limit around all of it.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from arm_ray.evaluation.grading.extraction import extract_answer
from arm_ray.evaluation.grading.latex_grammar import repair
from arm_ray.evaluation.grading.normalise import compact, normalised, normalised_gold

repair()

# It warns once that its limits are off, which is so on purpose.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def judge(completion: str, gold: str, *, benchmark: str | None = None) -> bool:
    """The strict verdict on a completion.

    Args:
        completion: The model's whole text.
        gold: The gold answer, as `gold_answer` returns it.
        benchmark: The benchmark's name.

    Returns:
        Whether the completion has an answer that is the gold answer.
    """
    answer = extract_answer(completion, "strict", benchmark=benchmark).answer
    return answer is not None and equal(answer, gold, benchmark=benchmark)


def equal(answer: str, gold: str, *, benchmark: str | None = None) -> bool:
    """Whether an answer is the gold answer.

    Args:
        answer: What was extracted.
        gold: The gold answer, as `gold_answer` returns it.
        benchmark: The benchmark's name.
    """
    answer, gold = normalised(answer), normalised_gold(gold, benchmark)
    if not answer or not gold:
        return False
    if compact(answer) == compact(gold):
        return True  # also where neither can be read
    golds = _parsed_gold(gold)
    if not golds:
        return False
    # The order of the arguments matters: gold first.
    answers = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(golds, answers, timeout_seconds=None))


@lru_cache(maxsize=8192)
def _parsed_gold(gold: str) -> list[Any]:
    # Reading a gold answer can take longer than comparing with it, and each is met many times.
    return list(parse(f"${gold}$", parsing_timeout=None))

"""Math graders: a strict one, and one that repeats the Qwen2.5-Math toolkit's verdicts."""

from __future__ import annotations

from arm_ray.evaluation.grading.extraction import Mode
from arm_ray.evaluation.grading.pool import GradingItem, shared_pool

__all__ = ["Mode", "grade"]


def grade(
    completion: str, gold: str, mode: Mode = "strict", *, benchmark: str | None = None
) -> bool:
    """Whether a completion's final answer is the gold answer.

    Works on any thread: the work is done in a child process that is started with the first call
    and stays until this process ends. For many completions, `pool.GraderPool` is quicker.

    Args:
        completion: The model's whole text, without the prompt.
        gold: The benchmark's gold answer, as `extraction.gold_answer` takes it from a row.
        mode: ``strict`` (math-verify) or ``qwen_compat`` (the Qwen2.5-Math toolkit's verdicts).
        benchmark: The benchmark's name, as ``gsm8k``, ``math500``, ``olympiadbench``,
            ``college_math`` or ``minerva_math``. Decides how the gold answer is prepared, and
            whether units count.

    Returns:
        The verdict. A text without an answer, one that cannot be read, and one that takes too
        long to compare are wrong.

    Raises:
        EvaluationError: If the grader process cannot be started.
    """
    return shared_pool().verdict(GradingItem(completion, gold, benchmark), mode)

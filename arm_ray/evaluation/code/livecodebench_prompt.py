"""The prompt of LiveCodeBench for models without one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The wording is the benchmark's own (MIT licence), so that scores can be compared.
_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) "
    "and will generate a correct Python program that matches the specification and passes all "
    "tests."
)
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose "
    "your code within delimiters."
)
_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not "
    "directly test on the sample inputs). Enclose your code within delimiters as follows. Ensure "
    "that when the python program runs, it reads the inputs, runs the algorithm and writes output "
    "to STDOUT."
)


def texts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the system message, the user message, and an empty beginning of the answer."""
    starter = row["starter_code"]
    task = _WITH_STARTER if starter else _WITHOUT_STARTER
    code = starter or "# YOUR CODE HERE"
    user = (
        f"### Question:\n{row['question_content']}\n\n"
        f"### Format: {task}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
    return _SYSTEM, user, ""

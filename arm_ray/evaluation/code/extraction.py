"""Takes the code out of a completion."""

from __future__ import annotations

import re
from typing import Literal

FENCE = "```"

# continuation  the prompt ended within a fenced block: everything up to the block's end
# chat          a fenced block of an answer
# last          between the last two lines that hold a fence, as LiveCodeBench does it
# codeeval_pro  after the first block of Python, as CodeEval-Pro does it for chat models
Style = Literal["continuation", "chat", "last", "codeeval_pro"]


def extract_code(completion: str, style: Style = "chat", *, wanted: str | None = None) -> str:
    """Takes the code out of a completion.

    Args:
        completion: What the model wrote.
        style: Where its code is.
        wanted: With ``chat``: a function; the first block that defines it is taken. Without such
            a block, or without a name, it is the first block, preferably of Python. A block that
            is not closed goes to the end. Without any block the whole text is the code. What
            stands before the end of a reasoning section (``</think>``) is not looked at.
    """
    if style == "continuation":
        return completion.split(FENCE, 1)[0]
    if style == "codeeval_pro":
        return completion.split(f"{FENCE}python", 1)[-1].split(FENCE, 1)[0]
    if style == "last":
        return _between_last_fences(completion)
    text = completion.rsplit("</think>", 1)[-1]
    blocks = _blocks(text)
    if not blocks:
        return text
    if wanted is not None:
        for _language, code in blocks:
            if defines(code, wanted):
                return code
    for language, code in blocks:
        if language in ("python", "python3", "py"):
            return code
    return blocks[0][1]


def defines(code: str, name: str) -> bool:
    """Whether code defines a function, class or variable of this name at its top level."""
    text = re.escape(name)
    definition = rf"^(?:(?:async\s+)?def|class)\s+{text}\b|^{text}\s*(?::[^=\n]*)?=(?!=)"
    return bool(re.search(definition, code, re.M))


def sanitized(code: str) -> str:
    """Cuts off what models append to a solution, by CodeEval-Pro's rule.

    That is: from the first ``if __name__`` on; else from the first ``# Test`` on; else from the
    first ``# Example`` that is followed by a space on.
    """
    for mark in ("if __name__", "# Test"):
        if mark in code:
            return code.split(mark, 1)[0]
    return code.split("# Example ", 1)[0]


def _between_last_fences(text: str) -> str:
    lines = text.split("\n")
    fences = [index for index, line in enumerate(lines) if FENCE in line]
    if len(fences) < 2:
        return ""
    return "\n".join(lines[fences[-2] + 1 : fences[-1]])


def _blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks: language in lower case, and code."""
    blocks: list[tuple[str, str]] = []
    language: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        is_fence = line.lstrip().startswith(FENCE)
        if language is None:
            if is_fence:
                language, lines = line.strip().strip("`").strip().lower(), []
        elif is_fence:
            blocks.append((language, "\n".join(lines) + "\n"))
            language = None
        else:
            lines.append(line)
    if language is not None:
        blocks.append((language, "\n".join(lines) + "\n"))
    return blocks

r"""Finding the answer in a model's text, and the gold answer in a benchmark's row. No SymPy.

Two orders of search, one for each mode. In both, text after an end-of-turn marker is not read.

``strict``: the last ``\boxed{...}`` that is closed and holds something; else what follows the
last ``####`` or "answer is"; else the last number.

``qwen_compat``: that of the Qwen2.5-Math toolkit: "final answer is $...$. I hope"; else what
follows the last "boxed", closed or not; else what follows "he answer is", "final answer is" or
"答案是"; else the last number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arm_ray.errors import EvaluationError

Mode = Literal["strict", "qwen_compat"]
How = Literal["boxed", "phrase", "last_number", "none"]

_STOPS = ("</s>", "<|im_end|>", "<|endoftext|>")
_ALIASES = {
    "college": "college_math",
    "minerva": "minerva_math",
    "olympiad": "olympiadbench",
    "math_500": "math500",
}
_LETTERS = frozenset("ABCDE")

_BOX = re.compile(r"\\f?boxed\b|\\fbox\b")
_ONE_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|-?\d[\d,]*(?:\.\d+)?|[^\s{}$\\])")
_PHRASE = re.compile(r"####|answer\s+is\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Extraction:
    """What was taken for the answer.

    Attributes:
        answer: The answer as the model wrote it, or ``None``.
        how: Where it was found.
        unclosed: Whether the last box is not closed, as in a text that was cut off. In
            ``qwen_compat`` the answer is then the rest of the text.
    """

    answer: str | None
    how: How
    unclosed: bool = False


def benchmark_name(name: str | None) -> str | None:
    """The name by which a benchmark is known here: ``MATH-500`` is ``math500``."""
    if name is None:
        return None
    name = name.strip().lower().replace("-", "_")
    return _ALIASES.get(name, name)


def keeps_units(benchmark: str | None) -> bool:
    """Whether the toolkit leaves words of units in the answers to a benchmark."""
    return benchmark_name(benchmark) in {"carp_en", "minerva_math"}


def extract_answer(
    completion: str, mode: Mode = "strict", *, benchmark: str | None = None
) -> Extraction:
    """Finds the answer in a model's text.

    Args:
        completion: The whole text, without the prompt.
        mode: Whose order of search.
        benchmark: The benchmark's name; neither order depends on it today.

    Returns:
        The answer as written, with how it was found. Never an error, whatever the text.
    """
    del benchmark
    text = until_end_of_turn(completion)
    return _extract_strict(text) if mode == "strict" else _extract_qwen(text)


def until_end_of_turn(completion: str) -> str:
    """The text before the first end-of-turn marker that was decoded as text, stripped."""
    for stop in _STOPS:
        completion = completion.split(stop, 1)[0]
    return completion.strip()


# --- strict ---------------------------------------------------------------------------------


def _extract_strict(text: str) -> Extraction:
    answer, unclosed = _last_box(text)
    if answer is not None:
        return Extraction(answer, "boxed", unclosed)
    phrases = [match.end() for match in _PHRASE.finditer(text)]
    for start in reversed(phrases):
        answer = _after_phrase(text[start:])
        if answer:
            return Extraction(answer, "phrase", unclosed)
    numbers = _NUMBER.findall(text)
    if numbers:
        return Extraction(numbers[-1], "last_number", unclosed)
    return Extraction(None, "none", unclosed)


def _last_box(text: str) -> tuple[str | None, bool]:
    """The content of the last box that is closed and not empty; whether the last is not closed."""
    unclosed = False
    boxes = list(_BOX.finditer(text))
    # A text of nothing but opened boxes must not be searched from each of them to the end.
    for position, match in enumerate(reversed(boxes[-50:])):
        content = _box_content(text, match.end())
        if content is None:
            unclosed = unclosed or position == 0
        elif content.strip():
            return content.strip(), unclosed
    return None, unclosed


def _box_content(text: str, start: int) -> str | None:
    rest = re.compile(r"\s*\{").match(text, start)
    if rest is None:
        token = _ONE_TOKEN.match(text, start)
        return token.group(1) if token else ""
    return closed_braces(text, rest.end())


def closed_braces(text: str, start: int) -> str | None:
    r"""The text from ``start``, just behind an opening brace, to the brace that closes it.

    Escaped braces (``\{``) are characters like others.

    Args:
        text: Any text.
        start: Index of the first character inside.

    Returns:
        What is inside, or ``None`` if it is never closed.
    """
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : match.start()]
    return None


def _after_phrase(rest: str) -> str:
    """The first line after a phrase, or the first formula in it, without a final full stop."""
    line = rest.lstrip(" \t:*\r\n").split("\n", 1)[0].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if line.startswith(opening):
            return line[len(opening) :].split(closing, 1)[0].strip()
    # "is 5. Since ...": an answer in plain words ends with its sentence.
    sentence = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]
    return sentence.strip().strip("*").strip()


# --- qwen_compat ----------------------------------------------------------------------------


def _extract_qwen(text: str) -> Extraction:
    text = text.replace("ки", "")  # a token that one of their models liked to end with
    unclosed = False
    how: How = "phrase"
    if "final answer is $" in text and "$. I hope" in text:
        answer = text.split("final answer is $", 1)[1].split("$. I hope", 1)[0].strip()
    elif "boxed" in text:
        how = "boxed"
        answer, unclosed = _last_box_of_any_kind(text)
    elif "he answer is" in text:
        answer = text.rsplit("he answer is", 1)[1].strip()
    elif "final answer is" in text:
        answer = text.rsplit("final answer is", 1)[1].strip()
    elif "答案是" in text:
        answer = text.split("答案是")[1].strip().split("\n\n")[0].strip()
    else:
        numbers = re.findall(r"-?\d*\.?\d+", text.replace(",", ""))
        if not numbers:
            return Extraction(None, "none")
        how, answer = "last_number", numbers[-1]
    return Extraction(one_line(answer), how, unclosed)


def _last_box_of_any_kind(text: str) -> tuple[str, bool]:
    """What follows the last "boxed": all of the text if its brace is not closed."""
    rest = text.rsplit("boxed", 1)[1]
    if not rest.startswith("{"):
        return rest.split("$", 1)[0].strip(), False
    depth = 0
    for match in re.finditer(r"[{}]", rest):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return rest[1 : match.start()], False
    return rest[1:], True


def one_line(answer: str) -> str:
    """The answer in one line, less one leading colon, one final full stop and one slash."""
    answer = re.sub(r"\n\s*", "", answer).removeprefix(":")
    return answer.removesuffix(".").removesuffix("/")


def choice_of(text: str) -> str:
    """The letter that a text chooses, for gold answers A to E; else the tidied text.

    Args:
        text: A whole completion.

    Returns:
        After "choice is" or "answer is": the first letter A to E that stands alone; without
        such a phrase: the last one.
    """
    text = text.strip("\n")
    triggers = ("choice is", "answer is")
    if any(text.count(trigger) > 1 for trigger in triggers):
        text = text.split("\n\n")[0]  # a completion that went on with further examples
    pieces = re.split("|".join(triggers), text)
    return _letter(pieces[-1], first=len(pieces) > 1)


def choice_in_answer(answer: str) -> str:
    """The last letter A to E that stands alone in an answer; else the tidied answer."""
    return _letter(answer, first=False)


def _letter(text: str, *, first: bool) -> str:
    text = text.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = re.findall(r"\b([A-E])\b", text.upper())
    if letters:
        return str(letters[0 if first else -1])
    return text.strip().strip(".").rstrip(".").rstrip("/")


def is_letter(text: str) -> bool:
    """Whether a text is one of the letters A to E."""
    return len(text) == 1 and text in _LETTERS


def only_letters(text: str) -> str:
    """The letters A to E of a text, for gold answers that are several of them."""
    return "".join(character for character in text if character in _LETTERS)


# --- gold answers ---------------------------------------------------------------------------


def gold_answer(benchmark: str, row: Mapping[str, Any]) -> str:
    """Takes the gold answer out of a benchmark's row, as `grade` wants it.

    Args:
        benchmark: The benchmark's name, as ``gsm8k``, ``math500`` or ``college_math``.
        row: One row of its data.

    Raises:
        EvaluationError: If the benchmark is not known, or the row lacks what it needs.
    """
    name = benchmark_name(benchmark)
    reader = _GOLD.get(name or "")
    if reader is None:
        raise EvaluationError(
            f"It is not known where benchmark {benchmark!r} keeps its gold answers.",
            got=repr(benchmark),
            expected=", ".join(sorted(_GOLD)),
            hint="Take the gold answer from the row yourself.",
        )
    return reader(row, benchmark)


def _field(row: Mapping[str, Any], name: str, benchmark: str) -> str:
    value = row.get(name)
    if isinstance(value, str | int | float) and str(value).strip():
        return str(value).strip()
    raise _lacking(row, benchmark, f"text or a number in column {name!r}")


def _lacking(row: Mapping[str, Any], benchmark: str, expected: str) -> EvaluationError:
    columns = ", ".join(map(repr, row)) or "none"
    return EvaluationError(
        f"A row of {benchmark} has no gold answer.",
        got=f"columns {columns}",
        expected=expected,
        hint="Correct the data, or name the benchmark that it is.",
    )


def _after_hashes(row: Mapping[str, Any], benchmark: str) -> str:
    _, hashes, gold = _field(row, "answer", benchmark).partition("####")
    if not hashes or not gold.strip():
        raise _lacking(row, benchmark, "an 'answer' with the result after '####'")
    return gold.strip()


def _box_of_solution(row: Mapping[str, Any], benchmark: str) -> str:
    # Not the column "answer": the toolkit reads the solution, and the two are not always alike.
    solution = _field(row, "solution", benchmark)
    found = _extract_qwen(solution)
    if not found.answer:
        raise _lacking(row, benchmark, r"a 'solution' with \boxed{...}")
    return found.answer.strip()


def _first_final_answer(row: Mapping[str, Any], benchmark: str) -> str:
    answers = row.get("final_answer")
    if isinstance(answers, list | tuple) and answers and isinstance(answers[0], str):
        return answers[0].strip()
    raise _lacking(row, benchmark, "a list of text in column 'final_answer'")


def _column(name: str) -> Callable[[Mapping[str, Any], str], str]:
    return lambda row, benchmark: _field(row, name, benchmark)


def _without_unit(row: Mapping[str, Any], benchmark: str) -> str:
    return re.sub(r"\(.*?\)", "", _field(row, "answer", benchmark)).strip()


_GOLD: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "gsm8k": _after_hashes,
    "math": _box_of_solution,
    "math500": _box_of_solution,
    "minerva_math": _box_of_solution,
    "olympiadbench": _first_final_answer,
    "svamp": _column("Answer"),
    "asdiv": _without_unit,
    "mawps": _column("target"),
    **{
        name: _column("answer")
        for name in ("college_math", "carp_en", "gaokao2023en", "aime24", "aime25", "amc23")
    },
}

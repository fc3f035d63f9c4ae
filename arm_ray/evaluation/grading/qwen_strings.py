r"""The canonical text of an answer as the Qwen2.5-Math toolkit writes it, damage included.

The toolkit compares answers after rewriting them with a long, ordered list of replacements. Some
of them lose part of the answer: ``x=\pm 3`` becomes ``\3`` because "pm" is in its list of units,
and ``-4x+3y=-23`` becomes ``-4x+3-23`` because ``y=`` is dropped wherever it stands. Published
figures contain these losses, so they are kept here, step by step and in the same order.
No SymPy.
"""

from __future__ import annotations

import re

# Order matters, and so does saying a word twice: each pattern also removes nothing where an
# earlier one took a delimiter, and gets another chance later. A dot stands for any character.
_UNIT_WORDS_TEXT = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|"
    "rd|o|gm|p . m|lb|tile|per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|"
    "no change|men|soldier|pie|bc|excess|st|inches|noon|percent|by|gal|kmh|c|acre|rise|a . m|th|"
    "π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|women|feet|am|pm|hr|cu cm|square|"
    "v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|minute|min|second|man|woman|"
    "sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|"
    "mm|apple|liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|"
    "meter|inch"
)
_UNIT_WORDS = _UNIT_WORDS_TEXT.split("|")

# Each pattern with the text that must be there for it to match, which is far quicker to look for.
_UNITS = [
    (re.compile(rf"(^|\W){word}($|\W)"), word.split(".")[0])
    for word in [*_UNIT_WORDS, *(word + "s" for word in _UNIT_WORDS)]
]

_Replacements = tuple[tuple[str, str], ...]

_BEFORE_UNITS: _Replacements = (
    ("bmatrix", "pmatrix"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\neq", r"\ne"),
    (r"\leq", r"\le"),
    (r"\geq", r"\ge"),
    (r"\left", ""),
    (r"\right", ""),
    (r"\{", "{"),
    (r"\}", "}"),
)
_AFTER_UNITS: _Replacements = (
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
    ("$", ""),
    (r"\(", ""),
    (r"\)", ""),
)
_AFTER_WORDS: _Replacements = (
    ("x=", ""),
    ("y=", ""),
    ("z=", ""),
    (r"x\in", ""),
    (r"y\in", ""),
    (r"z\in", ""),
    (r"x\to", ""),
    (r"y\to", ""),
    (r"z\to", ""),
    (r"\emptyset", "{}"),
    (r"(-\infty,\infty)", r"\mathbb{R}"),
    (r"\%", ""),
    ("%", ""),
    (" .", " 0."),
    ("{.", "{0."),
    ("infinity", r"\infty"),
)
_AFTER_INFINITY: _Replacements = ((r"+\inity", r"\infty"), ("and", ""), (r"\mathbf", ""))

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"]
_TEENS += ["sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {
    **{word: value for value, word in enumerate([*_ONES, *_TEENS])},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
    "hundred": 100,
}
_SCALES = {"billion": 10**9, "million": 10**6, "thousand": 10**3}
_VALUES = {**_SMALL, **_SCALES}


def canonical(text: str, *, keep_units: bool = False) -> str:
    """Rewrites an answer as the toolkit does before it compares.

    Args:
        text: An answer, or a gold answer.
        keep_units: Whether words of the list of units stay, as in minerva_math.

    Returns:
        The rewritten answer; applying this again may change it further.
    """
    text = text.strip().replace("\n", "").rstrip(".").replace(r"\!", "")
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text)
    text = text.replace(r"\end{array}", r"\end{pmatrix}")
    text = _replace(text, _BEFORE_UNITS)
    text = _without_last_text(text)
    if not keep_units:
        text = _without_units(text)
    text = number_in_words(_replace(text, _AFTER_UNITS))
    text = _replace(re.sub(r"\\text\{(.*?)\}", r"\1", text), _AFTER_WORDS)
    if r"\infty" not in text:
        text = text.replace("inf", r"\infty")
    text = re.sub(r"\\mbox{.*?}", "", _replace(text, _AFTER_INFINITY))
    if "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(\d+)\.0*([^\d])", r"\1\2", text)
    text = re.sub(r"(\d+)\.0*$", r"\1", text)
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return _slash_to_frac(_braced_fracs(text))


def _replace(text: str, replacements: _Replacements) -> str:
    for old, new in replacements:
        text = text.replace(old, new)
    return text


def _without_last_text(text: str) -> str:
    r"""Drops a ``\text{...}`` at the end, unless it is all there is."""
    shorter = re.sub(r"\\text{.*?}$", "", text).strip()
    return shorter or text


def _without_units(text: str) -> str:
    for _ in range(2):
        for pattern, needed in _UNITS:
            if needed in text:
                # A unit that is the whole answer is the answer.
                text = pattern.sub(r"\1\2", text) or text
    return text


def _braced_fracs(text: str) -> str:
    r"""``\frac12`` and ``\frac1{72}`` with all their braces."""
    head, *tails = text.split(r"\frac")
    parts = [head]
    for tail in tails:
        if tail.startswith("{"):
            parts.append(rf"\frac{tail}")
        elif len(tail) < 2:
            return text
        elif tail[1] == "{":
            parts.append(rf"\frac{{{tail[0]}}}{tail[1:]}")
        else:
            parts.append(rf"\frac{{{tail[0]}}}{{{tail[1]}}}{tail[2:]}")
    return "".join(parts)


def _slash_to_frac(text: str) -> str:
    r"""``a/b`` of two integers, or of anything with a root in it, as ``\frac{a}{b}``."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    if all("sqrt" in side or _is_plain_integer(side) for side in sides):
        return rf"\frac{{{sides[0]}}}{{{sides[1]}}}"
    return text


def _is_plain_integer(text: str) -> bool:
    try:
        return str(int(text)) == text
    except ValueError:
        return False


def number_in_words(text: str) -> str:
    """A number written in words as digits, by the rules of the ``word2number`` package.

    Words that are no number words are passed over ("two apples" is 2), digits lose leading
    zeros, and whatever those rules cannot read comes back as it was.

    Args:
        text: Any text.

    Returns:
        The number, or the text.
    """
    flat = text.replace("-", " ").lower()
    try:
        if flat.isdigit():
            return str(int(flat))
        words = [word for word in flat.split() if word in _VALUES or word == "point"]
        return str(_value_of(words)) if words else text
    except (ValueError, IndexError):
        return text


def _value_of(words: list[str]) -> float:
    """The value of number words.

    Raises:
        ValueError: If a scale or the point comes twice, or the scales rise.
        IndexError: If a scale has no number before it.
    """
    if any(words.count(word) > 1 for word in [*_SCALES, "point"]):
        raise ValueError("a scale comes twice")
    whole, _, digits = _partition(words, "point")
    fraction: float = 0
    if digits and all(word in _ONES for word in digits):
        fraction = float("0." + "".join(str(_VALUES[word]) for word in digits))
    if len(whole) <= 1:
        return sum(_VALUES[word] for word in whole) + fraction
    present = [word for word in whole if word in _SCALES]
    if present != sorted(present, key=lambda word: -_SCALES[word]):
        raise ValueError("a smaller scale comes before a larger one")
    total, rest = 0, whole
    for scale in present:
        before, _, rest = _partition(rest, scale)
        total += _below_thousand(before) * _SCALES[scale]
    if rest:
        total += _below_thousand(rest)
    return total + fraction


def _partition(words: list[str], at: str) -> tuple[list[str], bool, list[str]]:
    if at not in words:
        return words, False, []
    place = words.index(at)
    return words[:place], True, words[place + 1 :]


def _below_thousand(words: list[str]) -> int:
    """The value of up to four words; of more than that the rules read only the first."""
    numbers = [_VALUES[word] for word in words]
    if len(numbers) == 2 and 100 not in numbers:
        return numbers[0] + numbers[1]
    if 2 <= len(numbers) <= 4:
        return numbers[0] * numbers[1] + sum(numbers[2:])
    return numbers[0]

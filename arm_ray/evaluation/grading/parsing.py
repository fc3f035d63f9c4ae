r"""From the text of an answer to a SymPy object, without running what a model wrote.

SymPy's ``parse_expr`` and ``sympify`` evaluate their text as Python, with ``eval``, ``exec`` and
``open`` within reach. The toolkit whose verdicts `qwen_compat` repeats hands them the model's
text as it is. Here such text gets the same parser with names for mathematics only, and text that
could reach anything else (attributes, strings, dunder names) counts as not parsed. Together with
the memory and time limits of the worker this guards against accidents and simple attacks; it is
no sandbox.
"""

from __future__ import annotations

import builtins
import io
import re
import tokenize
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import antlr4
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.parsing.latex import _parse_latex_antlr as sympy_latex
from sympy.parsing.latex import parse_latex as stock_parse_latex
from sympy.parsing.sympy_parser import (
    convert_xor,
    parse_expr,
    rationalize,
    standard_transformations,
)

from arm_ray.evaluation.grading.extraction import closed_braces
from arm_ray.evaluation.grading.latex_grammar import repair

repair()


class UnsafeTextError(ValueError):
    """A text is not handed to Python's evaluation."""


# --- LaTeX through SymPy's own grammar ------------------------------------------------------


def _grammar_classes() -> tuple[type[Any], type[Any]] | None:
    """SymPy's lexer and parser, if the installed antlr4 can load their tables."""
    lexer = getattr(sympy_latex, "LaTeXLexer", None)
    parser = getattr(sympy_latex, "LaTeXParser", None)
    if lexer is None or parser is None:
        return None
    # Both print a line to stdout for every text where antlr4 is not exactly 4.11.
    quiet = {"checkVersion": lambda *_: None}
    return type("_Lexer", (lexer,), quiet), type("_Parser", (parser,), quiet)


_GRAMMAR = _grammar_classes()


def read_latex(text: str) -> Any:
    r"""SymPy's reading of the longest start of a text that is LaTeX; the rest is ignored.

    ``parse_latex`` itself refuses every antlr4 but 4.11, although its tables load with 4.10 to
    4.13. With an antlr4 that cannot load them (4.9, which hydra wants) this always raises.

    Raises:
        Exception: If the text does not start as LaTeX does, of whatever kind SymPy raises.
    """
    if _GRAMMAR is None:
        return stock_parse_latex(text)
    text = text.strip()
    listener = sympy_latex.MathErrorListener(text)
    make_lexer, make_parser = _GRAMMAR
    lexer = make_lexer(antlr4.InputStream(text))
    parser = make_parser(antlr4.CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    return sympy_latex.convert_relation(parser.math().relation())


# --- Python notation ------------------------------------------------------------------------

# Where SymPy keeps what writes files, opens windows, evaluates text or changes its own state.
_CLOSED_MODULES = (
    "sympy.core.cache",
    "sympy.core.symbol",
    "sympy.core.sympify",
    "sympy.interactive",
    "sympy.parsing",
    "sympy.plotting",
    "sympy.printing",
    "sympy.testing",
    "sympy.utilities",
)
_OPEN_BUILTINS = {"abs", "divmod", "len", "max", "min", "pow", "round", "sorted", "sum"}


def _closed(*_: Any, **__: Any) -> Any:
    raise UnsafeTextError("not a function of mathematics")


def _names() -> dict[str, Any]:
    """The names that a text may use: as ``parse_expr`` has them, with the rest closed."""
    names: dict[str, Any] = {}
    for name in sympy.__all__:
        value = getattr(sympy, name)
        module = getattr(value, "__module__", None) or ""
        closed = module.startswith(_CLOSED_MODULES) and not isinstance(value, type)
        if closed or not isinstance(value, sympy.Basic | type | types.FunctionType):
            value = _closed if callable(value) else value
        names[name] = value
    for name, value in vars(builtins).items():
        if isinstance(value, types.BuiltinFunctionType):
            names[name] = value if name in _OPEN_BUILTINS else _closed
    # The transformations write these calls, each with a text that they quote themselves.
    for name in ("Symbol", "Function", "Integer", "Float", "Rational", "Lambda"):
        names[name] = getattr(sympy, name)
    names["factorial"] = sympy.factorial
    names["__builtins__"] = {}
    return names


_NAMES = _names()


def _refuse_more_than_mathematics(text: str) -> None:
    previous = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            fstring = tokenize.tok_name[token.type].startswith("FSTRING")
            if token.type == tokenize.STRING or fstring:
                raise UnsafeTextError("a string")
            if token.type == tokenize.NAME and (previous == "." or "__" in token.string):
                raise UnsafeTextError("an attribute")
            previous = token.string
    except (tokenize.TokenError, SyntaxError, IndentationError) as error:
        raise UnsafeTextError("not Python") from error


def read_python(text: str, *extra: Callable[..., Any]) -> Any:
    """Evaluates a text in Python's notation: numbers, names of mathematics, tuples, sets, lists.

    Args:
        text: The text.
        extra: Transformations of ``parse_expr`` after the standard ones.

    Returns:
        A SymPy object, or a Python tuple, set, list, number or truth value.

    Raises:
        Exception: If the text is no such expression, of whatever kind Python or SymPy raise;
            `UnsafeTextError` if it uses more than mathematics.
    """
    _refuse_more_than_mathematics(text)
    # A copy: evaluation may add names.
    return parse_expr(
        text, transformations=(*standard_transformations, *extra), global_dict=dict(_NAMES)
    )


def as_sympy(value: Any, *, exact: bool = False) -> Any:
    """What SymPy's methods make of an operand: a text is read once more, as ``sympify`` does.

    Args:
        value: A result of `read`.
        exact: Whether decimals become fractions.

    Raises:
        Exception: If a text cannot be read.
    """
    if not isinstance(value, str):
        return value
    return read_python(value.replace("\n", ""), *([rationalize] if exact else []), convert_xor)


# --- LaTeX through latex2sympy --------------------------------------------------------------

_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
# Read by the installed version, but not by the one that the toolkit carries.
_UNKNOWN_TO_TOOLKIT = re.compile(r"\\mathrm\{[^A-Za-z{}]*\}|\d_")


def read_other_latex(text: str) -> Any:
    r"""latex2sympy's reading: matrices and lists, and little else that the first two cannot read.

    The toolkit carries an old version that knows no intervals, tuples or sets, and reads
    ``{a,b}``, ``a;b`` and ``a,b`` as lists, in order. The installed version reads more; what it
    reads beyond the old one is refused here, because the toolkit compares it as text.

    Raises:
        Exception: If it cannot be read, of whatever kind latex2sympy raises.
    """
    items = _list_items(text)
    if items:
        return [_read_item(item) for item in items]
    if _UNKNOWN_TO_TOOLKIT.search(text):
        raise ValueError("not known to the toolkit's version")
    value = latex2sympy(text, normalization_config=None, conversion_config=_CONVERSION)
    if isinstance(value, sympy.Set | sympy.Tuple | sympy.And | tuple | list | set):
        raise TypeError("not known to the toolkit's version")
    return value


def _read_item(text: str) -> Any:
    # The old version leaves 2/4 as it stands, as SymPy's grammar does and the installed one not.
    try:
        return read_latex(text)
    except Exception:
        return read_other_latex(text)


def _list_items(text: str) -> list[str]:
    """The items of a text that is a list; none if it is not."""
    text = text.strip()
    inside = closed_braces(text, 1) if text.startswith("{") else None
    items = _split_outside_brackets(text if inside is None else inside)
    return items if len(items) > 1 else []


def _split_outside_brackets(text: str) -> list[str]:
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return items


_READERS: tuple[Callable[[str], Any], ...] = (read_latex, read_python, read_other_latex)


@lru_cache(maxsize=8192)
def read(text: str) -> Any:
    r"""The first reading that succeeds, each reader trying ``\\`` as a single backslash first.

    Args:
        text: An answer in canonical form.

    Returns:
        What the first reader made of it; the text itself where all failed.
    """
    for reader in _READERS:
        for variant in dict.fromkeys((text.replace("\\\\", "\\"), text)):
            try:
                return reader(variant)
            except Exception:  # noqa: S112
                continue  # whatever it was, the next reader may do better
    return text

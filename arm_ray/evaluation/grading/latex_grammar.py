r"""A repair of latex2sympy2_extended's grammar tables, for both graders.

Its tables for antlr4 4.9 and 4.11 lack one of the tokens that its converter asks every atom for,
so that all atoms tested after it fail, ``50\%`` among them; those for 4.13 have it. Without the
repair, verdicts would depend on which antlr4 is installed.
"""

from __future__ import annotations

from typing import Any

from latex2sympy2_extended.antlr_parser import PSParser


def _absent(_: Any) -> None:
    """No such token in this atom."""


def repair() -> None:
    """Lets atoms answer that they hold no such token. Harmless where it is not needed."""
    atom = PSParser.AtomContext
    if not hasattr(atom, "FUNC_GAMMA"):
        atom.FUNC_GAMMA = _absent

"""The ranges in the annotations of settings."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from annotated_types import Ge, Gt, Le, Lt

_LIMITS: tuple[tuple[type, str, Callable[[Any, Any], bool]], ...] = (
    (Gt, "above", operator.gt),
    (Ge, "at least", operator.ge),
    (Lt, "below", operator.lt),
    (Le, "at most", operator.le),
)


def out_of_range(annotation: Any, value: float) -> str | None:
    """What a number must be, by an annotation such as `Annotated[float, Ge(0)]`; None: it is."""
    for limit in getattr(annotation, "__metadata__", ()):
        for kind, word, holds in _LIMITS:
            if isinstance(limit, kind):
                bound = getattr(limit, kind.__name__.lower())
                if not holds(value, bound):
                    return f"{word} {bound:g}"
    return None

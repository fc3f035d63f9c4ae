"""What is imported when it is used: names of a package that is light itself, and whole modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def lazily(
    package: str, places: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: Its name.
        places: Name -> the module that has it.
    """

    def get(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return get, names


class LaterModule:
    """Stands for a module, which is imported when something of it is first used.

    Args:
        name: Its full name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self._name), name)


def ray_is_joined() -> bool:
    """Whether this process has joined Ray; to ask does not import it."""
    # A module that another thread is importing is there, but not all of it.
    asked = getattr(sys.modules.get("ray"), "is_initialized", None)
    return asked is not None and bool(asked())

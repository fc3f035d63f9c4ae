"""One line for each guarantee that tests have counted, at the end of what pytest prints."""

from __future__ import annotations

_LINES: list[str] = []


def guarantee(name: str, held: int, asked: int) -> None:
    """Take note of how often something held that always has to."""
    _LINES.append(f"guarantee: {name}: {held} of {asked}")


def lines() -> list[str]:
    """All of this process."""
    return list(_LINES)

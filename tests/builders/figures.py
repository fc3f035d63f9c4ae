"""One line for each promise that tests have counted, at the end of what pytest prints.

Also of tests that other processes of pytest-xdist have run. `tests/conftest.py` has the hooks.
"""

from __future__ import annotations

LINES: list[str] = []


def guarantee(text: str) -> None:
    """Take note of how often something held that always has to: "inputs refused: 7 of 7"."""
    LINES.append(f"guarantee: {text}")

"""The colours of the page, light and dark, and how well they can be told apart."""

from __future__ import annotations

from collections.abc import Mapping

Theme = Mapping[str, str]

# `text` and `muted` are for words on `ground` and `panel`; `base`, `checkpoint` and `merged` are
# also for words; the others are for marks.
LIGHT: Theme = {
    "ground": "#ffffff",
    "panel": "#f6f7f8",
    "line": "#dfe2e6",
    "text": "#1b1f24",
    "muted": "#59626d",
    "base": "#6a7280",
    "checkpoint": "#a05a00",
    "merged": "#1558c0",
    "gained": "#0b7a3b",
    "lost": "#b3261e",
    "forward": "#3b7dd8",
    "merge": "#0f8a7e",
    "score": "#8250df",
    "stage": "#6a7280",
    "low": "#eef3fb",
    "middle": "#7aa7e0",
    "high": "#0c3d8c",
}
DARK: Theme = {
    "ground": "#14171b",
    "panel": "#1c2026",
    "line": "#343a43",
    "text": "#e6e9ed",
    "muted": "#a2abb7",
    "base": "#9aa4b2",
    "checkpoint": "#e2a04a",
    "merged": "#79b0ff",
    "gained": "#58c98a",
    "lost": "#ff8f87",
    "forward": "#5b9bf0",
    "merge": "#35c2b2",
    "score": "#b794f6",
    "stage": "#9aa4b2",
    "low": "#1f2a3a",
    "middle": "#3f78c4",
    "high": "#d5e6ff",
}
# What is read as words, and what is but drawn.
WORDS = ("text", "muted", "base", "checkpoint", "merged", "gained", "lost")
MARKS = ("base", "checkpoint", "merged", "forward", "merge", "score", "stage")
GROUNDS = ("ground", "panel")


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.1).

    Args:
        one: `#rrggbb`.
        other: The same.
    """
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

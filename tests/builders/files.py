"""Small text files, and the directories that they are in."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

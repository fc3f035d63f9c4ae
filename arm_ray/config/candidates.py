"""Candidates that are named by a run's directory and a range of steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from arm_ray.errors import ConfigError
from arm_ray.storage.urls import is_url

# `checkpoint-100`, `global_step_100`, `global_step100_hf`, `step_100`.
_STEP = re.compile(r"(.*?)(\d+)(_hf)?")
_KEYS = ("run", "from", "to", "every")


def with_ranges(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Content of a merge's configuration with the directories in place of ranges of candidates.

    A range is `{run: DIR, from: 100, to: 400, every: 50}`, as the whole list or in it; `from`, `to`
    and `every` may be left out. The directories are in the order of their steps.

    Raises:
        ConfigError: It is no range, or nothing is in it.
    """
    given = content.get("candidates")
    items = [given] if isinstance(given, dict) else given
    if not isinstance(items, list) or not any(isinstance(item, dict) for item in items):
        return content
    found: list[Any] = []
    for item in items:
        found += _directories(item, f"{source}: candidates") if isinstance(item, dict) else [item]
    return {**content, "candidates": found}


def _directories(item: dict[str, Any], where: str) -> list[str]:
    wrong = [key for key in item if key not in _KEYS]
    numbers = {key: item.get(key) for key in _KEYS[1:]}
    wrong += [
        key
        for key, value in numbers.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int))
    ]
    run, every = item.get("run"), numbers["every"]
    is_step = wrong or every is None or every >= 1
    if wrong or not is_step or not isinstance(run, str) or is_url(run):
        raise ConfigError(
            "a range of candidates is not written as one",
            where=where,
            got=item,
            expected="{run: DIR, from: 100, to: 400, every: 50}: a directory on this machine, and "
            "whole numbers, which may be left out",
        )
    root = Path(run).expanduser()
    steps = _steps(root)
    first = numbers["from"] if numbers["from"] is not None else min(steps, default=0)
    last = numbers["to"] if numbers["to"] is not None else max(steps, default=0)
    every = every or 1
    chosen = [s for s in sorted(steps) if first <= s <= last and (s - first) % every == 0]
    if not chosen:
        known = ", ".join(map(str, sorted(steps))) or "no directory whose name ends in a step"
        raise ConfigError(
            "a range of candidates holds no checkpoint",
            where=where,
            got=f"{item}; in {root}: {known}",
            expected="steps that are there",
        )
    several = [step for step in chosen if len(steps[step]) > 1]
    if several:
        raise ConfigError(
            "a step of a range of candidates is there more than once",
            where=where,
            got=", ".join(steps[several[0]]),
            expected="one directory for each step",
            hint="name the directories one by one",
        )
    return [str(root / steps[step][0]) for step in chosen]


def _steps(root: Path) -> dict[int, list[str]]:
    """Step -> names of the directories below that end in it."""
    found: dict[int, list[str]] = {}
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError:
        names = []
    for name in names:
        match = _STEP.fullmatch(name)
        if match:
            found.setdefault(int(match[2]), []).append(name)
    return found

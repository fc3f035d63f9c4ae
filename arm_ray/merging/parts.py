"""Settings that differ between parts of a model: by depth, and by the names of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from arm_ray.merging.settings import EVERYWHERE, PARTWISE_LIST, MethodSettings


def passes(name: str, pattern: str) -> bool:
    """Whether a tensor is of a part of the model.

    Args:
        name: Of the tensor.
        pattern: A piece of the name (`self_attn`), or, with `*` or `?` in it, a pattern for all of
            it but `.weight` (`*.down_proj`).
    """
    if set(pattern) & set("*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    return pattern in name


def part_of(name: str, patterns: Sequence[str]) -> str | None:
    """The first of the filters that a tensor passes, `*` last; None: it passes none."""
    ordered = sorted(patterns, key=lambda pattern: pattern == EVERYWHERE)
    return next((pattern for pattern in ordered if passes(name, pattern)), None)


def at_depth(values: Sequence[float], depth: float) -> float:
    """A value between those of a list that is spread evenly over the layers.

    Args:
        values: For the first layer, …, for the last.
        depth: 0 the first layer, 1 the last.
    """
    place = depth * (len(values) - 1)
    below = min(int(place), max(0, len(values) - 2))
    share = place - below
    if share == 0.0 or len(values) == 1:
        return values[below]
    return (1.0 - share) * values[below] + share * values[below + 1]


def resolved(settings: MethodSettings, name: str, depth: float) -> MethodSettings:
    """The settings of one tensor.

    Args:
        settings: Of the method.
        name: Of the tensor.
        depth: Of its layer: 0 the first, 1 the last.
    """
    if not settings.by_part:
        return settings
    found = settings
    for key, values in settings.by_part.items():
        pattern = part_of(name, list(values))
        if pattern is not None:
            found = with_value(found, key, at_depth(values[pattern], depth))
    return found


def with_value(settings: MethodSettings, key: str, value: float) -> MethodSettings:
    """The settings with another value of a key such as `coefficient` or `average.weights.1`."""
    changed: MethodSettings = _changed(settings, key.split("."), value)
    return changed


def _changed(place: Any, path: Sequence[str], value: float) -> Any:
    if not path:
        return value
    name, *rest = path
    if name.isdigit():
        index = int(name)
        inner = _changed(place[index], rest, value)
        return (*place[:index], inner, *place[index + 1 :])
    return replace(place, **{name: _changed(getattr(place, name), rest, value)})


def without_weight(settings: MethodSettings, tensors: Mapping[str, float]) -> list[str]:
    """What is wrong with weights by part: the first tensor that has none above zero, a sentence.

    Args:
        settings: Of the method.
        tensors: Name -> depth.
    """
    if not any(key.startswith(f"{PARTWISE_LIST}.") for key in settings.by_part):
        return []
    for name, depth in tensors.items():
        if not any(resolved(settings, name, depth).average.weights or ()):
            return [f"method.{PARTWISE_LIST}: the weights of all models are zero for {name}"]
    return []


def unmatched(
    by_part: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]
) -> list[str]:
    """What is wrong with filters: those that no tensor passes first, a sentence each."""
    found = []
    for key, values in by_part.items():
        used = {part_of(name, list(values)) for name in names}
        found += [
            f"method.{key}: no tensor of the model is {pattern!r}, or another filter takes them all"
            for pattern in values
            if pattern != EVERYWHERE and pattern not in used
        ]
    return found

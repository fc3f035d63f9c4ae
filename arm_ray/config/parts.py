"""Values of `method` that differ between parts of a model, as a configuration writes them.

A key takes a number; a list of numbers, which are spread over the depth of the model; or a mapping
from parts of names to one of these:

    coefficient: 0.7
    coefficient: [0.2, 0.8]
    coefficient: {self_attn: 0.5, "*.down_proj": [0.4, 0.9], default: 0.7}

Of `average.weights` each model's is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

from arm_ray.errors import ConfigError
from arm_ray.merging.limits import out_of_range
from arm_ray.merging.settings import EVERYWHERE, PARTWISE, PARTWISE_LIST, MethodSettings

_DEFAULT = "default"
_KEYS = ", ".join(PARTWISE)


def with_parts(
    content: dict[str, Any], source: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Content of a merge's configuration with `method.by_part` in place of lists and mappings.

    Args:
        content: The content, after the overrides.
        source: Where it is from, for messages.
        overrides: `key.key=value`: what they set holds in place of what `by_part` says of it.

    Raises:
        ConfigError: They are not what a key takes; all problems, one line each.
    """
    method = content.get("method")
    if not isinstance(method, dict):
        return content
    method, problems = dict(method), list[str]()
    by_part = _written(method.get("by_part") or {}, problems)
    for text in overrides:
        by_part.pop(text.partition("=")[0].strip().removeprefix("method."), None)
    listed = _found(method, PARTWISE_LIST.split("."))
    entries = range(len(listed)) if isinstance(listed, list) else ()
    for key in (*PARTWISE, *(f"{PARTWISE_LIST}.{index}" for index in entries)):
        path = key.split(".")
        given = _found(method, path)
        if not isinstance(given, list | dict):
            continue
        values, default = _parts(f"method.{key}", key, given, problems)
        by_part.pop(key, None)
        if values:
            by_part[key] = values
        if default is None and path[-1].isdigit():
            # An entry of a list has a number of its own, which a part `*` takes the place of.
            if EVERYWHERE not in values:
                problems.append(f"  - method.{key}: says nothing for other parts; add `default`")
            default = (values.get(EVERYWHERE) or [0.0])[0]
        method = _with(method, path, default)
    for key in by_part:
        if not key.startswith(f"{PARTWISE_LIST}."):
            continue
        if int(key.rpartition(".")[2]) >= len(_found(method, PARTWISE_LIST.split(".")) or ()):
            problems.append(f"  - method.by_part.{key}: there is no such entry of the list")
    if problems:
        raise ConfigError(
            "\n".join(["the values of parts of a model cannot be used", *problems]), where=source
        )
    method.pop("by_part", None)
    if by_part:
        method["by_part"] = by_part
    return {**content, "method": method}


def _found(place: Any, path: Sequence[str]) -> Any:
    """What a configuration says at a place; None: nothing."""
    for name in path:
        if isinstance(place, list) and name.isdigit():
            place = place[int(name)]
        else:
            place = place.get(name) if isinstance(place, dict) else None
    return place


def _with(place: Any, path: Sequence[str], value: float | None) -> Any:
    """The same with another value at a place; None: without it."""
    name, *rest = path
    if isinstance(place, list):
        index = int(name)
        return [*place[:index], value, *place[index + 1 :]]
    changed = dict(place)
    if rest:
        changed[name] = _with(place[name], rest, value)
    elif value is None:
        changed.pop(name)
    else:
        changed[name] = value
    return changed


def _is_partwise(key: str) -> bool:
    before, _, last = key.rpartition(".")
    return key in PARTWISE or (before == PARTWISE_LIST and last.isdigit())


def _written(given: Any, problems: list[str]) -> dict[str, dict[str, list[float]]]:
    """What a configuration that arm_ray has written says in `by_part` itself."""
    if not isinstance(given, dict):
        problems.append(f"  - method.by_part: got {given!r}, expected a mapping")
        return {}
    found = {}
    for key, parts in given.items():
        where = f"method.by_part.{key}"
        if not _is_partwise(key):
            problems.append(f"  - {where}: no key with values by part; they are {_KEYS}")
        elif not isinstance(parts, dict):
            problems.append(f"  - {where}: got {parts!r}, expected a mapping from parts to lists")
        elif parts:
            found[key] = {
                str(part): _numbers(
                    f"{where}.{part}",
                    key,
                    list(values) if isinstance(values, list | tuple) else [values],
                    problems,
                )
                for part, values in parts.items()
            }
    return found


def _parts(
    where: str, key: str, value: Any, problems: list[str]
) -> tuple[dict[str, list[float]], float | None]:
    """Filter -> values over the depth; and the number that holds elsewhere, where there is one."""
    if isinstance(value, list):
        return {EVERYWHERE: _numbers(where, key, value, problems)}, None
    found: dict[str, list[float]] = {}
    default: float | None = None
    for pattern, given in value.items():
        place = f"{where}.{pattern}"
        numbers = _numbers(place, key, given if isinstance(given, list) else [given], problems)
        if pattern not in (_DEFAULT, EVERYWHERE):
            found[str(pattern)] = numbers
        elif len(numbers) == 1:
            default = numbers[0]
        else:
            found[EVERYWHERE] = numbers
    if not value:
        problems.append(f"  - {where}: is an empty mapping")
    return found, default


def _numbers(where: str, key: str, values: list[Any], problems: list[str]) -> list[float]:
    if not values:
        problems.append(f"  - {where}: is an empty list")
    good = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"  - {where}: got {value!r}, expected a number or a list of numbers")
            continue
        wrong = _out_of_range(key, float(value))
        if wrong:
            problems.append(f"  - {where}: got {value}, expected {wrong}")
        good.append(float(value))
    return good


def _out_of_range(key: str, value: float) -> str | None:
    """What a value of a key must be, where it is not that."""
    if key.startswith(f"{PARTWISE_LIST}."):
        return "at least 0" if value < 0.0 else None
    section, _, name = key.partition(".")
    owner = type(getattr(MethodSettings(), section)) if name else MethodSettings
    annotation: Any = get_type_hints(owner, include_extras=True)[name or section]
    return out_of_range(annotation, value)

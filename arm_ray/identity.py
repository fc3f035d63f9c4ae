"""What a key of the configuration decides: one mark, on the field that declares it.

A run goes on, and a score is used again, only where the keys are the same that decide its result.
A field without a mark decides the result. Others say so where they are declared::

    output: Annotated[str, NOTHING]
    threads: Annotated[int, RESULT] = 1          in a section whose `DECIDES` is `NOTHING`
    evaluation: Annotated[Evaluation, Decides("model", only=("select",))]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Decides:
    """What a key has an influence on.

    Attributes:
        what: `result`: the merged states, trained weights or scores. `model`: only what is
            published of them. `nothing`: neither.
        only: Of a section: the keys that this holds for; the others decide nothing. Empty: all.
        but: Of a section: keys that decide nothing.
    """

    what: Literal["result", "model", "nothing"]
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()


RESULT, MODEL, NOTHING = Decides("result"), Decides("model"), Decides("nothing")
# The attribute of a section's class that says what its fields without a mark decide.
_DEFAULT = "DECIDES"


def identity(
    section: type, content: Mapping[str, Any], *, with_model: bool = False
) -> dict[str, Any]:
    """The keys that decide a result, with their values.

    Args:
        section: The class of the section: a pydantic model or a dataclass.
        content: Its content as JSON has it. Keys that the class does not know decide.
        with_model: Whether keys that decide only what is published count too.
    """
    counts = {RESULT.what, MODEL.what} if with_model else {RESULT.what}
    hints = get_type_hints(section, include_extras=True)
    default: Decides = getattr(section, _DEFAULT, RESULT)
    found: dict[str, Any] = {}
    for key, value in content.items():
        mark, inner = _mark(hints.get(key)), section_in(hints.get(key))
        decides = mark or default
        if mark is not None and (mark.only or mark.but):
            if decides.what in counts and isinstance(value, Mapping):
                found[key] = {
                    name: member
                    for name, member in value.items()
                    if (not mark.only or name in mark.only) and name not in mark.but
                }
        elif decides is RESULT and inner is not None and isinstance(value, Mapping):
            found[key] = identity(inner, value, with_model=with_model)
        elif decides.what in counts:
            found[key] = value
    return found


def decides(section: type, path: Sequence[str]) -> Literal["result", "model", "nothing"]:
    """What a key has an influence on; see `Decides.what`.

    Args:
        section: The class of the section that the path begins in.
        path: Names of the sections around the key, and its own.
    """
    name, *rest = path
    hint = get_type_hints(section, include_extras=True).get(name)
    mark, inner = _mark(hint), section_in(hint)
    default: Decides = getattr(section, _DEFAULT, RESULT)
    own = mark or default
    if rest and (own.only or own.but):
        counts = (not own.only or rest[0] in own.only) and rest[0] not in own.but
        return own.what if counts else NOTHING.what
    if rest and inner is not None and own is RESULT:
        return decides(inner, rest)
    return own.what


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys that differ between two nested sections, one line each: `key: old -> new`."""
    before, after = dict(flat(old)), dict(flat(new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        # A key that is absent is as one that is null.
        if before.get(key) != after.get(key)
    ]


def _mark(annotation: Any) -> Decides | None:
    if get_origin(annotation) is not Annotated:
        return None
    return next((m for m in annotation.__metadata__ if isinstance(m, Decides)), None)


def section_in(annotation: Any) -> type[Any] | None:
    """The class of a section that a field holds, inside of unions and lists too; None: none."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        is_section = dataclasses.is_dataclass(annotation) or hasattr(annotation, "model_fields")
        return annotation if is_section else None
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return next((found for part in parts if (found := section_in(part)) is not None), None)


def is_mapping(annotation: Any) -> bool:
    """Whether a field holds a mapping, inside of unions too."""
    if get_origin(annotation) is Annotated:
        return is_mapping(get_args(annotation)[0])
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True
    return origin in (Union, UnionType) and any(map(is_mapping, get_args(annotation)))

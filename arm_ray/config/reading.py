"""Reads a configuration: YAML, dotted overrides, and errors that name the nearest key."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError

from arm_ray.config.other_tools import translated
from arm_ray.errors import ConfigError, StorageError
from arm_ray.identity import is_mapping, section_in
from arm_ray.secrets import hidden
from arm_ray.storage.regular import read_text
from arm_ray.storage.urls import checked
from arm_ray.storage.yaml_text import FASTEST, LARGEST_YAML, load_yaml

# Characters of a value that an error repeats.
_SHOWN = 300
SectionT = TypeVar("SectionT", bound=BaseModel)


def validate(
    model: type[SectionT], content: dict[str, Any], overrides: Sequence[str] = (), *, source: str
) -> SectionT:
    """Apply overrides to parsed content and validate it against any configuration model.

    Raises:
        ConfigError: All problems, one line each, with the nearest known key.
    """
    content = overridden(content, overrides)
    content = {str(k): _plain_paths(value, f"{source}: {k}") for k, value in content.items()}
    try:
        # As JSON: there the strict reading of values admits mappings as dataclasses.
        return model.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ConfigError(
            _describe_all(model, error),
            where=source,
            hint="correct the keys above; nothing was started",
        ) from None


def _plain_paths(value: Any, where: str) -> Any:
    """Content with paths in place of `file://` URLs; what carries credentials is refused."""
    if isinstance(value, dict):
        return {str(key): _plain_paths(child, f"{where}.{key}") for key, child in value.items()}
    if isinstance(value, list):
        return [_plain_paths(child, f"{where}.{index}") for index, child in enumerate(value)]
    if not isinstance(value, str):
        return value
    unwanted = "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
    if unwanted:
        # Neither can stand in a file's name, nor be written down.
        raise ConfigError(
            "a text holds a character that is none",
            where=where,
            got=ascii(value)[:200],
            expected="text without NUL and halves of characters",
        )
    try:
        return checked(value)
    except StorageError as error:
        raise ConfigError(
            error.what, where=where, got=error.where, expected=error.expected, hint=error.hint
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; duplicate keys are errors and `1e-4` is a number.

    Raises:
        ConfigError: The file is missing, is no YAML, or is not a mapping.
    """
    try:
        text = read_text(path, LARGEST_YAML)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the configuration file cannot be read",
            where=path,
            got=error,
            expected="a readable YAML file in UTF-8",
            hint="check the path",
        ) from None
    try:
        content = load_yaml(text, _Loader)
    except ValueError as error:
        raise ConfigError(
            "the configuration file is not valid YAML",
            where=path,
            got=error,
            hint="correct the file; nothing was started",
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            "the configuration file does not hold keys and values",
            where=path,
            got=_kind(content),
            expected="a mapping with base, candidates, output, …",
        )
    return content


def overridden(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a configuration with overrides, `key.key=value`, which are YAML values."""
    content = copy.deepcopy(content)
    for text in overrides:
        apply_override(content, text)
    return content


def apply_override(content: dict[str, Any], text: str) -> None:
    """Set one `section.key=value` in parsed configuration content, in place.

    Raises:
        ConfigError: `text` is not of that form, or a part of its path is not a section.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"the override {text!r} is not understood",
            where="command line",
            got=text,
            expected="section.key=value, for example schedule.max_iterations=4",
        )
    section = content
    for part in parts[:-1]:
        # An empty section (`runtime:` with nothing below) parses as null.
        child = section.get(part)
        if child is None:
            child = section[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"the override {text!r} does not fit the file",
                where=part,
                got=f"{part} is {child!r}",
                expected=f"{part} to be a section",
            )
        section = child
    try:
        section[parts[-1]] = load_yaml(value, _Loader)
    except ValueError as error:
        raise ConfigError(
            f"the value of the override {text!r} is not valid YAML",
            where=key,
            got=error,
            expected="a value as in a file: a number, a text, [a, b] or {a: b}",
        ) from None


def _kind(value: Any) -> str:
    """What a value of YAML is, in its own words."""
    if value is None:
        return "nothing"
    return {"dict": "a mapping", "list": "a list", "str": "a text"}.get(
        type(value).__name__, f"{value!r}"
    )


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(FASTEST):  # type: ignore[misc]
    """A safe loader that reads `1e-4` as a number (as YAML 1.2 does) and refuses duplicate keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before `<<` brings in keys, which those that stand beside it may replace.
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_duplicates(node)
        super().flatten_mapping(node)

    def _refuse_duplicates(self, node: yaml.MappingNode) -> None:
        keys: set[Any] = set()
        for found, _ in node.value:
            key = found.value if found.tag == _MERGE else self.construct_object(found, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or mapping stands for a key", found.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", found.start_mark
                )
            keys.add(key)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    # The class attribute is shared with the base class: copy it before adding to it.
    _class.yaml_implicit_resolvers = {
        first: list(resolvers) for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


_UNION_MEMBERS = ("constrained-int", "constrained-float", "TaskSettings")
_UNION_KINDS = ("literal[", "dict[", "list[")


def _describe_all(model: type[BaseModel], error: ValidationError) -> str:
    by_key: dict[tuple[str, ...], list[Any]] = {}
    found = error.errors()
    for item in found:
        if item["type"] == "string_type" and item["loc"][-1] == "str":
            # A task may also be a name alone; what is wrong with it as a section says more.
            continue
        if item["type"] == "too_short" and any(
            other["loc"][: len(item["loc"])] == item["loc"] and other is not item for other in found
        ):
            # Pydantic counts the entries that are right.
            continue
        # Pydantic names the members of a union in the location; they are no keys.
        location = tuple(
            str(p)
            for p in item["loc"]
            if str(p) not in _UNION_MEMBERS and not str(p).startswith(_UNION_KINDS)
        )
        by_key.setdefault(location, []).append(item)
    problems = [_describe(model, location, items) for location, items in by_key.items()]
    head = f"the configuration has {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([head, *(f"  - {problem}" for problem in problems)])


def _describe(model: type[BaseModel], location: Sequence[str], items: Sequence[Any]) -> str:
    item, key = items[0], ".".join(location)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, name = location
        known = _known_keys(model, parents)
        if "." in name:
            return (
                f"{key}: unknown key; in a file, sections are nested: {name.split('.')[0]}: {{…}}"
            )
        ours = translated(parents, name, is_merge="candidates" in model.model_fields)
        if ours:
            return f"{key}: unknown key; {ours}"
        return f"{key}: unknown key; {nearest(name, known) or 'known here: ' + ', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: required, but absent"
    value = item["input"]
    messages = " or ".join(i["msg"][0].lower() + i["msg"][1:] for i in items)
    got = "null" if value is None else f"{_shortened(repr(value))} ({type(value).__name__})"
    text = f"{key}: got {got}; {messages}"
    choices = re.findall(r"'([^']+)'", item.get("ctx", {}).get("expected", ""))
    like = nearest(value, choices) if isinstance(value, str) else ""
    return f"{text}; {like}" if like else text


def _shortened(text: str) -> str:
    """A value as an error says it: not all of a long one, and no secrets in it."""
    text = hidden(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def nearest(name: str, known: Sequence[str]) -> str:
    """A question after the known name that is most like a wrong one; empty: none is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def _known_keys(model: Any, location: Sequence[str]) -> list[str]:
    is_name = False
    for part in location:
        if part.isdigit() or is_name:
            # The entries of a list or mapping have the keys that their section has.
            is_name = False
            continue
        if issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
        else:
            annotation = get_type_hints(model)[part]
        is_name = is_mapping(annotation)
        model = section_in(annotation)
    return [*model.model_fields] if issubclass(model, BaseModel) else _field_names(model)


def _field_names(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, every key written out."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False))

"""Every configuration key: its meaning, type, default, and what reads it.

All of it is taken from where a key is declared: the text below a field is its meaning. `arm-ray
config` prints it, and `docs/configuration.md` is made of it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from arm_ray.config import EvaluateConfig, MergeConfig
from arm_ray.errors import ConfigError
from arm_ray.following.config import AttachConfig
from arm_ray.identity import decides, is_mapping, section_in
from arm_ray.merging.settings import OPERATOR_NAMES, MethodSettings
from arm_ray.study.config import StudyConfig
from arm_ray.training.config import GrpoConfig, SftConfig
from arm_ray.training.pipeline import PipelineConfig

# Of the runs that go on where they were stopped: what a key decides, in words.
_DECIDES: Mapping[str, str] = {
    "result": "the result: a run that has begun does not go on with another value",
    "model": "what is published: it may change until that is done",
    "nothing": "nothing of the result: it may change whenever a run goes on",
}
_RESUMED = ("arm-ray merge", "arm-ray attach", "arm_ray.jobs.sft", "arm_ray.jobs.grpo")
# What reads a configuration file -> what the file holds.
READERS: Mapping[str, type[BaseModel]] = {
    "arm-ray merge": MergeConfig,
    "arm-ray evaluate": EvaluateConfig,
    "arm-ray attach": AttachConfig,
    "arm-ray pipeline": PipelineConfig,
    "arm-ray study": StudyConfig,
    "arm_ray.jobs.sft": SftConfig,
    "arm_ray.jobs.grpo": GrpoConfig,
}
_WIDTH = 100
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
_WORDS: Mapping[Any, str] = {
    bool: "true/false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "anything",
}


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: Dotted, as an override has it; `[]` stands for each member of a list, `NAME` for the
            names that a mapping has.
        takes: Its type, in words.
        default: As YAML has it; None where it must be given.
        meaning: What it does.
        owner: The class that declares it.
        is_section: Whether it holds keys of its own.
        readers: What reads it: commands, jobs, and operators of `method`.
        decides: What it has an influence on, where a run may go on with another value; else empty.
    """

    name: str
    takes: str
    default: str | None
    meaning: str
    owner: type[Any]
    is_section: bool
    readers: tuple[str, ...]
    decides: str = ""

    @property
    def section(self) -> str:
        """The keys around it: `runtime`; empty at the top of a file."""
        return self.name.rpartition(".")[0]


def all_keys() -> list[Key]:
    """All keys, those of `arm-ray merge` first; one that several read is there once."""
    merged: dict[tuple[str, type[Any]], Key] = {}
    for reader, model in READERS.items():
        for key in _keys_of(model, "", reader):
            if reader in _RESUMED:
                path = key.name.replace("[]", "").split(".")
                key = dataclasses.replace(key, decides=decides(model, path))
            known = merged.get((key.name, key.owner))
            readers = key.readers if known is None else (*known.readers, *key.readers)
            first = key if known is None else known
            merged[key.name, key.owner] = dataclasses.replace(first, readers=readers)
    return [_with_operators(key) for key in merged.values()]


def find_keys(name: str) -> list[Key]:
    """The keys of a name: of several where jobs have different ones, and those of a section.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    keys = all_keys()
    found = [key for key in keys if key.name == name]
    found += [key for key in keys if key.section in (name, f"{name}[]")]
    if found:
        return found
    names = list(dict.fromkeys(key.name for key in keys))
    # Somebody may know the last part alone.
    near = [other for other in names if other.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(name, names, n=3)
    raise ConfigError(
        f"there is no configuration key {name!r}",
        got=name,
        expected=" or ".join(near) if near else "a key such as schedule.window_size",
        hint="arm-ray config lists them all",
    )


def describe(keys: Sequence[Key]) -> str:
    """Keys for a terminal, one after the other."""
    parts = []
    for key in keys:
        lines = [key.name, *_indented(key.meaning)]
        lines += _indented(f"takes: {key.takes}")
        if key.decides and not key.is_section:
            lines += _indented(f"decides: {_DECIDES[key.decides]}")
        shown = "none, it must be given" if key.default is None else key.default
        lines += _indented(f"default: {shown}")
        lines += _indented(f"read by: {', '.join(key.readers)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def listing() -> str:
    """All keys for a terminal: each with the beginning of its meaning on one line."""
    keys = [key for key in all_keys() if not key.is_section]
    lines = [f"{key.name:36} {key.meaning}" for key in keys]
    return "\n".join(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 2]} …" for line in lines)


def as_markdown() -> str:
    """The page `docs/configuration.md`."""
    sections: dict[tuple[str, type[Any]], list[Key]] = {}
    keys = all_keys()
    for key in keys:
        sections.setdefault((key.section, key.owner), []).append(key)
    lines = [
        "# Configuration keys",
        "",
        "This page is made by `arm-ray config --markdown` of the texts beside the fields;",
        "`arm-ray config KEY` prints one of them. A key is given in the YAML file or, with its",
        "dotted name, on the command line: `schedule.window_size=3`.",
    ]
    for (section, owner), members in sections.items():
        readers = ", ".join(f"`{name}`" for name in _common_readers(members))
        title = f"`{section}`" if section else f"Top level of {readers}"
        lines += ["", f"## {title}", "", *_wrapped(inspect.getdoc(owner) or "")]
        if section:
            lines += ["", *_wrapped(f"Read by {readers}.")]
        lines.append("")
        for key in members:
            lines += _bullet(key)
    return "\n".join(lines) + "\n"


def _common_readers(members: Sequence[Key]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for key in members for name in key.readers))


def _bullet(key: Key) -> list[str]:
    own = key.name.rpartition(".")[2]
    default = "must be given" if key.default is None else f"default `{key.default}`"
    default = "a section" if key.default == "its own defaults" else default
    text = f"`{own}` ({key.takes}; {default}): {key.meaning}"
    text = text.replace("(section; a section)", "(section)")
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False
    )


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _keys_of(owner: type[Any], prefix: str, reader: str) -> Iterator[Key]:
    texts = field_texts(owner)
    for name, (annotation, default) in _fields(owner).items():
        inner = section_in(annotation)
        meaning = texts.get(name) or (inspect.getdoc(inner) if inner else None) or ""
        full = f"{prefix}{name}"
        yield Key(
            full,
            type_in_words(annotation),
            default,
            " ".join(meaning.split()),
            _declared_by(owner, name),
            inner is not None,
            (reader,),
        )
        if inner is not None:
            suffix = "[]" if _is_list_of(annotation, inner) else ""
            suffix = ".NAME" if is_mapping(annotation) else suffix
            yield from _keys_of(inner, f"{full}{suffix}.", reader)


def _declared_by(owner: type[Any], name: str) -> type[Any]:
    """The class whose body has the field: the owner, or what it inherits from."""
    return next(c for c in owner.__mro__ if name in inspect.get_annotations(c))


def _fields(owner: type[Any]) -> dict[str, tuple[Any, str | None]]:
    """Name -> annotation and default as YAML has it."""
    if issubclass(owner, BaseModel):
        return {
            name: (_annotation(info), _default(info.get_default(call_default_factory=True)))
            for name, info in owner.model_fields.items()
        }
    hints = typing.get_type_hints(owner, include_extras=True)
    found: dict[str, tuple[Any, str | None]] = {}
    for entry in dataclasses.fields(owner):
        value: Any = PydanticUndefined
        if entry.default is not dataclasses.MISSING:
            value = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            value = entry.default_factory()
        found[entry.name] = (hints[entry.name], _default(value))
    return found


def _annotation(info: FieldInfo) -> Any:
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _default(value: Any) -> str | None:
    if value is PydanticUndefined:
        return None
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return "its own defaults"
    return json.dumps(value, default=str) if not isinstance(value, str) else value or '""'


def type_in_words(annotation: Any) -> str:
    """What a field takes: `auto, cpu or cuda`; `integer, at least 1`; `list of texts or null`."""
    *first, last = _alternatives(annotation)
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(annotation: Any) -> list[str]:
    if annotation in _WORDS:
        return [_WORDS[annotation]]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = " and ".join(words for limit in arguments[1:] for words in _limits(limit))
        return [f"{type_in_words(arguments[0])} {limits}".rstrip()]
    if origin is Literal:
        return [str(value) for value in arguments]
    if origin in (typing.Union, types.UnionType):
        parts = [words for part in arguments for words in _alternatives(part)]
        # Last, what stands for nothing.
        return [*(words for words in parts if words != "null"), *["null"] * ("null" in parts)]
    if origin in (list, tuple):
        return [f"list of {_as_one(type_in_words(arguments[0]))}"]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [f"mapping of names to {_as_one(type_in_words(arguments[1]))}"]
    return ["section"]


def _as_one(words: str) -> str:
    return words if words.isalpha() else f"({words})"


def _limits(limit: Any) -> list[str]:
    """The words for what an annotation demands of a value."""
    if isinstance(limit, FieldInfo):
        return [words for part in limit.metadata for words in _limits(part)]
    if isinstance(limit, MinLen):
        return ["(not empty)"] if limit.min_length == 1 else [f"({limit.min_length} or more)"]
    for kind, sign in _SIGNS.items():
        if isinstance(limit, kind):
            return [f"{sign} {getattr(limit, kind.__name__.lower()):g}"]
    return []


def _is_list_of(annotation: Any, section: type[Any]) -> bool:
    if get_origin(annotation) in (list, tuple):
        return True
    parts = get_args(annotation)
    return any(_is_list_of(part, section) for part in parts if not isinstance(part, type))


def field_texts(owner: type[Any]) -> dict[str, str]:
    """The text below each field of a class, its parents' fields included."""
    found: dict[str, str] = {}
    for parent in reversed(owner.__mro__):
        if parent.__module__.partition(".")[0] != __name__.partition(".")[0]:
            continue
        [body] = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = str(after.value.value)
    return found


def _with_operators(key: Key) -> Key:
    """A key of `method` with the operators that read it in place of the command."""
    part = key.name.split(".")[1] if key.name.startswith("method.") else ""
    if not part or part not in _operator_sections():
        return key
    operators = [
        name for name in OPERATOR_NAMES if part in MethodSettings(operator=name).sections_read
    ]
    text = f"method.operator {', '.join(operators)}" if operators else f"method.edit {part}"
    return dataclasses.replace(key, readers=(text,))


def _operator_sections() -> set[str]:
    return {
        entry.name
        for entry in dataclasses.fields(MethodSettings)
        if entry.default_factory is not dataclasses.MISSING
        and entry.name not in ("options", "by_part")
    }

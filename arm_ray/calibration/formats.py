"""From a row of data to a sample: which columns are used, and what they must hold. No Ray.

Formats:

* ``text``: one column of text.
* ``prompt_completion``: two columns, both text or both lists of chat messages.
* ``messages``: one column of chat messages, ``[{"role": ..., "content": ...}, ...]``, or as
  ShareGPT has them, ``[{"from": ..., "value": ...}, ...]``.

``auto`` takes the first of messages, prompt and completion, text whose columns hold something;
then conversations, as messages; then question and answer, instruction and output, instruction and
response, as prompt and completion.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from arm_ray.config import DataConfig
from arm_ray.errors import CalibrationError

# Column of tool definitions that chat templates take beside the messages.
TOOLS_COLUMN = "tools"

_ALIASES = (("question", "answer"), ("instruction", "output"), ("instruction", "response"))
# Where ShareGPT's rows have their messages, and beside them, in some data, what the system says.
CONVERSATIONS = "conversations"
_SYSTEM = "system"
# Who speaks, in ShareGPT's words and the usual ones.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class Layout:
    """How rows become samples.

    Attributes:
        format: ``text``, ``prompt_completion`` or ``messages``.
        columns: The columns this needs: one, or the prompt's and the completion's.
        system: The column of what the system says before the messages; None: there is none.
    """

    format: str
    columns: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class TextSample:
    """Text to tokenise.

    Attributes:
        text: The text.
        end: Whether the end-of-sequence token belongs after it.
    """

    text: str
    end: bool


@dataclass(frozen=True)
class ChatSample:
    """Chat messages to put through the tokenizer's chat template.

    Attributes:
        messages: The messages, each with a ``role``.
        tools: Tool definitions for the template, if the row has them.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def choose_layout(settings: DataConfig, columns: Mapping[str, bool], where: object) -> Layout:
    """Decides which columns of the data make a sample.

    All columns of all rows decide, not the first row alone, so that the choice depends neither
    on the shuffle nor on which row comes first.

    Args:
        settings: The format asked for and the names of the columns.
        columns: Every column that some row has, with whether some row holds more in it than
            nothing or empty text.
        where: The data, for errors.

    Raises:
        CalibrationError: If the columns asked for are missing, or ``auto`` finds none it knows.
    """
    by_format = {
        "messages": (settings.messages_column,),
        "prompt_completion": (settings.prompt_column, settings.completion_column),
        "text": (settings.text_column,),
    }
    if settings.format != "auto":
        wanted = by_format[settings.format]
        for name in wanted:
            if name not in columns:
                raise missing_column(name, columns, where, "data")
        return Layout(settings.format, wanted)
    for format_name, names in by_format.items():
        if all(columns.get(name) for name in names):
            return Layout(format_name, names)
    if columns.get(CONVERSATIONS):
        return Layout("messages", (CONVERSATIONS,), _SYSTEM if columns.get(_SYSTEM) else None)
    for pair in _ALIASES:
        # Instructions that come with an "input" have no one way to be joined: refuse to guess.
        if all(columns.get(name) for name in pair) and not columns.get("input"):
            return Layout("prompt_completion", pair)
    raise CalibrationError(
        "The format of the calibration data cannot be told from its columns.",
        where=where,
        got=_found(columns),
        expected="; or ".join(
            " and ".join(names) for names in [*by_format.values(), (CONVERSATIONS,), *_ALIASES]
        ),
        hint="Set the format and the column names, or rename the columns. Instructions with an "
        "'input' column have to be joined into a prompt first.",
    )


def missing_column(name: str, columns: Iterable[str], where: object, what: str) -> CalibrationError:
    """Returns the error for a column that is not there, with the nearest name there is."""
    columns = list(columns)
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return CalibrationError(
        f"The calibration {what} has no column {name!r}.",
        where=where,
        got=_found(columns),
        expected=f"a column {name!r}",
        hint=hint + "Set the name of the column or the format, or correct the data.",
    )


def _found(columns: Iterable[str]) -> str:
    names = [repr(name) for name in columns]
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return f"columns {', '.join(names[:30])}{more}" if names else "no columns"


def to_sample(row: Mapping[str, Any], layout: Layout, where: object) -> TextSample | ChatSample:
    """Takes the sample out of a row.

    Args:
        row: The row, by column.
        layout: Which columns make the sample.
        where: The row's file and line, for errors.

    Raises:
        CalibrationError: If the row lacks a column, or the column holds something else.
    """
    for name in layout.columns:
        if name not in row:
            raise missing_column(name, row, where, "row")
    if layout.format == "text":
        return TextSample(_text(row, layout.columns[0], where), end=False)
    tools = _tools(row, where)
    if layout.format == "messages":
        messages = _messages(row, layout.columns[0], where)
        system = row.get(layout.system) if layout.system else None
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return ChatSample(messages, tools)
    first, second = layout.columns
    if isinstance(row[first], list) and isinstance(row[second], list):
        return ChatSample(_messages(row, first, where) + _messages(row, second, where), tools)
    if isinstance(row[first], list) or isinstance(row[second], list):
        raise CalibrationError(
            f"{first!r} and {second!r} of a calibration row are of different kinds.",
            where=where,
            got=f"{_kind(row[first])} and {_kind(row[second])}",
            expected="text in both, or a list of chat messages in both",
            hint="Correct the row.",
        )
    # As TRL joins them: nothing between the two, the end-of-sequence token after them.
    return TextSample(_text(row, first, where) + _text(row, second, where), end=True)


def _text(row: Mapping[str, Any], name: str, where: object) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    raise CalibrationError(
        f"Column {name!r} of a calibration row is not text.",
        where=where,
        got=_kind(value),
        expected="text",
        hint="Correct or remove the row, or name another column.",
    )


def _messages(row: Mapping[str, Any], name: str, where: object) -> list[dict[str, Any]]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise _not_messages(name, where, "an empty list" if value == [] else _kind(value))
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise _not_messages(name, where, f"{_kind(message)} as message {number}")
        if not isinstance(plain_message(message).get("role"), str):
            keys = ", ".join(map(repr, message)) or "no keys"
            got = f"message {number} without a role, with {keys}"
            if isinstance(message.get("from"), str):
                got = f"message {number} from {message['from']!r}"
            raise _not_messages(name, where, got)
    return [_without_nulls(plain_message(message)) for message in value]


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A chat message with `role` and `content`, also if it has the `from` and `value` of ShareGPT.

    Args:
        message: As the row has it; a speaker that is not known stays.
    """
    speaker = message.get("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if isinstance(message.get("role"), str) or role is None:
        return message
    others = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")}
    return {"role": role, "content": message.get("value"), **others}


def _not_messages(name: str, where: object, got: str) -> CalibrationError:
    return CalibrationError(
        f"Column {name!r} of a calibration row is not a list of chat messages.",
        where=where,
        got=got,
        expected='[{"role": "user", "content": "..."}, ...], or '
        f'[{{"from": "human", "value": "..."}}, ...] from {", ".join(_SPEAKERS)}',
        hint="Correct or remove the row, or name another column or format.",
    )


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    # Arrow gives every struct of a column the fields of all of them, with null where a message
    # has none. A template that asks whether a field is defined must not see those. A content
    # of null stays: it is how a message with tool calls only is written.
    return {key: _clean(value) for key, value in message.items() if value is not None} | (
        {"content": None} if message.get("content", "") is None else {}
    )


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _tools(row: Mapping[str, Any], where: object) -> list[Any] | None:
    tools = row.get(TOOLS_COLUMN)
    if isinstance(tools, str) and tools.strip():
        # Often kept as JSON text, because tool definitions differ too much for one schema.
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise CalibrationError(
                f"Column {TOOLS_COLUMN!r} of a calibration row is not JSON.",
                where=where,
                got=str(error),
                expected="a list of tool definitions",
                hint="Correct or remove the row.",
            ) from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise CalibrationError(
            f"Column {TOOLS_COLUMN!r} of a calibration row is not a list.",
            where=where,
            got=_kind(tools),
            expected="a list of tool definitions",
            hint="Correct or remove the row.",
        )
    return [_clean(tool) for tool in tools]


def _kind(value: Any) -> str:
    names: dict[type, str] = {type(None): "null", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")

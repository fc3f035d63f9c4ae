"""Texts without the secrets that may be in them."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "…"
# Environment variables that hold secrets, by their names: HF_TOKEN, WANDB_API_KEY,
# AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, MY_API_TOKEN.
_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY|PRIVATE_KEY"
    r"|CREDENTIALS?)$",
    re.I,
)
# Shorter values are parts of many words.
_SHORTEST, _SHORTEST_NAMED = 6, 4
_LONGEST_WORD = 12
# `user:password@` and `token@` before a host, and values of a query that grant access.
_AUTHORITY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?P<key>[?&#;][^=&\s]*(?:token|secret|password|signature|credential|key|sig)[^=&\s]*=)"
    r"(?!\$\{\w+\}(?:[&\s'\",;:)]|$))[^&\s'\"]+",
    re.I,
)
# Tokens that are known by how they begin: Hugging Face, OpenAI and the like, GitHub, AWS.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_BEARER = re.compile(r"\b(?P<kind>Bearer|Basic) +[A-Za-z0-9._~+/=-]{8,}", re.I)
_BEGINNINGS = ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "AKIA", "ASIA")
_NAMES = re.compile(r"(token|secret|password|passwd|api_?key|credential)s?$", re.I)


def environment_hidden(text: str) -> str:
    """A text without the values of environment variables that are secrets."""
    for _, forms in _secrets():
        for form in forms:
            if form in text:
                text = text.replace(form, HIDDEN)
    return text


def secret_in(text: str) -> str | None:
    """The environment variable whose secret a text holds; None: of none.

    A password that is a plain word (`postgres`) is found in many a path: it does not count.
    """
    for name, forms in _secrets():
        value = os.environ[name]
        is_word = value.isalpha() and len(value) < _LONGEST_WORD
        if not is_word and any(form in text for form in forms):
            return name
    return None


def shortened(text: str, longest: int) -> str:
    """A text without its middle, where it is long.

    It has no secrets then: of one that was cut in two, nobody could know the halves for it.

    Args:
        text: The text.
        longest: Most characters of it that are left.
    """
    if len(text) > longest:
        text = hidden(text)
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-longest // 2 :]}"


def named(text: str, used: Mapping[str, str]) -> str:
    """A text with `${NAME}` in place of the values of variables, and without secrets.

    Args:
        text: The text.
        used: Name -> value, of all that were put into something that the text may repeat.
    """
    for name, value in used.items():
        # Shorter ones are parts of many words.
        if len(value) >= _SHORTEST_NAMED:
            for form in _forms(value):
                text = text.replace(form, f"${{{name}}}")
    return hidden(text)


def _secrets() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Environment variables that hold secrets, and the forms of each value; paths are none."""
    for name, value in os.environ.items():
        if _is_secret(name) and len(value.strip()) >= _SHORTEST and not _is_path(name, value):
            yield name, _forms(value)


def _is_path(name: str, value: str) -> bool:
    """Whether a value says where something is; keys of AWS may begin with a slash as well."""
    is_file = name.upper().endswith(("CREDENTIAL", "CREDENTIALS"))
    return value.startswith("/") and (is_file or os.path.exists(value))


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    return _VARIABLE.search(name) is not None


@functools.lru_cache(maxsize=256)
def _forms(value: str) -> tuple[str, ...]:
    """How a value may stand in a text: as it is, in JSON, in a URL, in base64; longest first.

    A line's end that came with a file is no part of it.
    """
    value = value.strip()
    forms = {value, json.dumps(value)[1:-1]}
    forms |= {base64.b64encode(value.encode(errors="surrogateescape")).decode().rstrip("=")}
    for quoted in (quote, quote_plus):
        forms |= {quoted(value, safe=safe, errors="replace") for safe in ("", "/")}
    return tuple(sorted(forms, key=len, reverse=True))


def hidden(text: str) -> str:
    """A text without secrets: those of the environment, in URLs, and tokens of known kinds."""
    return patterns_hidden(environment_hidden(text))


def patterns_hidden(text: str) -> str:
    """A text without what looks like a secret: in URLs, and tokens of known kinds."""
    # Logs are long, and most of their lines have none of these.
    if "://" in text and "@" in text:
        text = _AUTHORITY.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text and any(mark in text for mark in "?&#;"):
        text = _QUERY.sub(rf"\g<key>{HIDDEN}", text)
    if any(beginning in text for beginning in _BEGINNINGS):
        text = _TOKEN.sub(HIDDEN, text)
    if "earer " in text or "asic " in text or "EARER " in text:
        text = _BEARER.sub(rf"\g<kind> {HIDDEN}", text)
    return text


def all_hidden(content: Any) -> Any:
    """Content of JSON or YAML without secrets: see `hidden`, and values of keys named like one."""
    if isinstance(content, Mapping):
        return {
            key: HIDDEN
            if isinstance(value, str) and value and _NAMES.search(str(key))
            else all_hidden(value)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [all_hidden(value) for value in content]
    return hidden(content) if isinstance(content, str) else content

"""Texts without the secrets that may be in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "…"
_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
# `user:password@` and `token@` before a host, and values of a query that grant access.
_AUTHORITY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?P<key>[?&][^=&\s]*(?:token|secret|password|signature|credential|key|sig)[^=&\s]*=)"
    r"[^&\s'\"]+",
    re.I,
)
# Tokens that are known by how they begin: Hugging Face, OpenAI and the like, GitHub, AWS.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_BEGINNINGS = ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "AKIA", "ASIA")
_NAMES = re.compile(r"(token|secret|password|passwd|api_?key|credential)s?$", re.I)


def environment_hidden(text: str) -> str:
    """A text without the values of environment variables that are secrets."""
    for name in _VARIABLES:
        value = os.environ.get(name)
        if value and len(value) >= 4:
            text = text.replace(value, HIDDEN)
    return text


def hidden(text: str) -> str:
    """A text without secrets: those of the environment, in URLs, and tokens of known kinds."""
    return patterns_hidden(environment_hidden(text))


def patterns_hidden(text: str) -> str:
    """A text without what looks like a secret: in URLs, and tokens of known kinds."""
    # Logs are long, and most of their lines have none of these.
    if "://" in text and "@" in text:
        text = _AUTHORITY.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text and ("?" in text or "&" in text):
        text = _QUERY.sub(rf"\g<key>{HIDDEN}", text)
    if any(beginning in text for beginning in _BEGINNINGS):
        text = _TOKEN.sub(HIDDEN, text)
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

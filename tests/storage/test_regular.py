"""Texts that others wrote are measured before anything is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arm_ray.storage import regular
from arm_ray.storage.regular import check_values, parse_json

_TEXTS = st.text(st.sampled_from('ab"\\\\,:[{}]\n é'), max_size=12)
_VALUES = st.recursive(
    st.none() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)


def marks(text: str) -> int:
    """Commas, colons and opening brackets outside of strings, one character after another."""
    total, is_in_string, is_escaped = 0, False, False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif character == '"':
            is_in_string = not is_in_string
        elif not is_in_string and character in ",:[{":
            total += 1
    return total


@given(_VALUES, st.integers(1, 9))
def test_what_is_in_strings_does_not_count(value: Any, at_once: int) -> None:
    text = json.dumps(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regular, "_AT_ONCE", at_once)
        found = regular._marks_outside_strings(text.encode(), 1 << 30)
    assert found == marks(text)


def test_as_many_values_as_may_be_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular, "MOST_VALUES", 10)
    said = json.dumps(["a, b: [c], {d}, " * 100])
    assert parse_json(said) == json.loads(said)
    check_values(said.encode(), 1)
    with pytest.raises(ValueError, match="more than 10 values"):
        check_values(json.dumps(list(range(12))).encode(), 10)


def test_a_run_of_backslashes_takes_no_time() -> None:
    text = b'["' + b"\\" * (1 << 24) + b'", ' + b"[]," * 2000 + b"[]]"
    with pytest.raises(ValueError, match="more than 1000 values"):
        check_values(text, 1000)

"""YAML that costs no more than what it says."""

from __future__ import annotations

import pytest
import yaml

from arm_ray.storage.yaml_text import LARGEST_YAML, front_matter, load_yaml


@pytest.mark.parametrize("loader", [None, yaml.SafeLoader])
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("- x\n" * 70_000, "more than 65536 entries"),
        ("a: &a [x, x]\n" + "b: [" + "*a, " * 30_000 + "]", "come to more than 65536 entries"),
        # Written out once more, with a run, each would stand there whole.
        ("a: &a " + "x" * 10_000 + "\nb: [" + "*a, " * 1000 + "]", f"than {LARGEST_YAML} char"),
        ("a: &a [*a]", "part of itself"),
        ("a: [b", "line 1"),
    ],
)
def test_what_grows_is_refused(text: str, error: str, loader: type[yaml.SafeLoader] | None) -> None:
    with pytest.raises(ValueError, match=error):
        load_yaml(text, loader)


def test_references_are_followed_within_reason() -> None:
    assert load_yaml("a: &a [x]\nb: [*a, *a]") == {"a": ["x"], "b": [["x"], ["x"]]}
    assert load_yaml("") is None


@pytest.mark.parametrize(
    ("text", "front", "rest"),
    [
        ("---\na: 1\n---\nText\n", {"a": 1}, "Text\n"),
        ("---\n---\nText", {}, "Text"),
        ("---\na: b --- c\n---\n", {"a": "b --- c"}, ""),
        ("Text\n---\n", {}, "Text\n---\n"),
        ("---\na: 1\n", {}, "---\na: 1\n"),
    ],
)
def test_what_stands_before_a_text(text: str, front: object, rest: str) -> None:
    assert front_matter(text) == (front, rest)


def test_front_matter_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no keys and values"):
        front_matter("---\n- a\n---\n")

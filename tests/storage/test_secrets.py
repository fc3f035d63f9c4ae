"""Secrets are hidden wherever a text goes that others may see."""

from __future__ import annotations

import pytest

from arm_ray.storage.secrets import all_hidden, hidden

TOKEN = "hf_" + "a1B2c3D4" * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cret@host:5000/x", "http://…@host:5000/x"),
        ("at s3://key:s3cret@bucket/x, twice", "at s3://…@bucket/x, twice"),
        (
            "https://host/x?a=1&X-Amz-Signature=s3cret&b=2",
            "https://host/x?a=1&X-Amz-Signature=…&b=2",
        ),
        ("https://host/?access_token=s3cret", "https://host/?access_token=…"),
        (f"token {TOKEN}.", "token …."),
        ("AKIA" + "ABCDEFGH" * 2, "…"),
        ("https://host/path?page=2", "https://host/path?page=2"),
        ("mail me@host.org", "mail me@host.org"),
        ("a sketch of hf_models", "a sketch of hf_models"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert hidden(text) == shown


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    monkeypatch.setenv("HF_TOKEN", "ab")  # too short to be one, and part of many words
    assert hidden("key of-the-environment, about") == "key …, about"


def test_values_of_keys_that_are_named_like_secrets() -> None:
    content = {
        "api_key": "s3cret",
        "hf_token": "s3cret",
        "max_tokens": 10,
        "tokenizer": "auto",
        "password": "",
        "uris": ["http://me:s3cret@host"],
        "deep": {"aws_secret": "s3cret"},
    }
    assert all_hidden(content) == {
        "api_key": "…",
        "hf_token": "…",
        "max_tokens": 10,
        "tokenizer": "auto",
        "password": "",
        "uris": ["http://…@host"],
        "deep": {"aws_secret": "…"},
    }

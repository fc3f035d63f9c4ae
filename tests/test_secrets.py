"""Secrets are hidden wherever a text goes that others may see."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from arm_ray.errors import ArmRayError
from arm_ray.secrets import all_hidden, hidden, secret_in, shortened

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
        ("https://host/#access_token=s3cret", "https://host/#access_token=…"),
        ("https://host/?token=${NAME}&a=1", "https://host/?token=${NAME}&a=1"),
        ("https://host/?token=${NAME}x", "https://host/?token=…"),
        ("Authorization: Bearer abcDEF123456.xyz, then", "Authorization: Bearer …, then"),
        ("the basic idea is a bearer of news", "the basic idea is a bearer of news"),
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


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        *("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "MY_API_TOKEN"),
        *("OPENAI_APIKEY", "DB_PASSWD", "client_secret", "GITHUB_TOKEN", "TLS_PRIVATE_KEY"),
    ],
)
def test_variables_that_are_named_like_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'of & "this" / machine+0123'
    monkeypatch.setenv(name, secret)
    assert secret_in(f"x {secret} y") == name
    in_json, in_url = json.dumps(secret)[1:-1], quote(secret, safe="")
    in_base64 = base64.b64encode(secret.encode()).decode()
    told = hidden(f"{secret}, {in_json}, {in_url}, {in_base64.rstrip('=')}")
    assert told == "…, …, …, …"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "enabled"),
        ("MAX_TOKENS", "1048576"),
        ("HF_TOKEN_PATH", "/home/me/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
        ("KEYBOARD", "of the machine"),
    ],
)
def test_variables_that_are_none(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert hidden(f"with {value} here") == f"with {value} here"
    assert secret_in(value) is None


def test_a_key_that_begins_with_a_slash_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/wJalrX/Xk2bPx+RfiCYEXAMPLEKEY\n")
    for form in ("/wJalrX/Xk2bPx+RfiCYEXAMPLEKEY", "/wJalrX/Xk2bPx%2BRfiCYEXAMPLEKEY"):
        assert hidden(f"key {form}, about") == "key …, about"


def test_a_plain_word_refuses_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    assert secret_in("/data/postgres-run/x") is None
    assert hidden("signed in with postgres") == "signed in with …"


def test_what_is_shortened_keeps_no_half_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "0123456789abcdef" * 4
    monkeypatch.setenv("MY_TOKEN", secret)
    for place in range(0, 200, 7):
        text = "x" * place + secret + "y" * (600 - place)
        told = shortened(text, 100)
        assert len(told) <= 104
        assert secret[:6] not in told
        assert secret[-6:] not in told
    assert shortened("a word", 100) == "a word"


def test_an_error_keeps_no_half_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "0123456789abcdef")
    text = "x" * 1992 + "0123456789abcdef" + "y" * 5000
    assert "01234" not in str(ArmRayError("failed", got=text))


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

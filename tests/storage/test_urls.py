"""What counts as a URL, and what a configuration makes of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_ray.config import parse_merge_config
from arm_ray.errors import ConfigError, StorageError
from arm_ray.storage.mirror import mirror_path, origin
from arm_ray.storage.urls import checked, is_url, parse_url, plain_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/a/b", True),
        ("hf://owner/name", True),
        ("http://host/x", True),
        ("file:///a/b", False),
        ("/a/b", False),
        ("owner/name", False),
        ("zero:/runs/x", False),
        ("./s3://odd", False),
    ],
)
def test_a_url_is_told_from_a_path(given: str, expected: bool) -> None:
    assert is_url(given) is expected


def test_file_urls_are_paths() -> None:
    assert plain_path("file:///data/a%20b") == "/data/a b"
    assert plain_path("file://localhost/data") == "/data"
    assert plain_path("zero:file:///runs/x") == "zero:/runs/x"
    assert plain_path("runs/x") == "runs/x"
    with pytest.raises(StorageError, match="another machine"):
        plain_path("file://host/data")
    with pytest.raises(StorageError, match="another machine"):
        plain_path("file://relative")


@pytest.mark.parametrize(
    "given", ["s3://", "s3://bucket//x", "gs://bucket/../x", "ftp://host/x", "azure://x/y"]
)
def test_what_is_no_place_is_refused(given: str) -> None:
    with pytest.raises(StorageError):
        parse_url(given)


@pytest.mark.parametrize(
    "given",
    ["s3://key:s3cret@bucket/x", "s3://bucket/x?secret_key=s3cret", "http://me:s3cret@host/x"],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(StorageError) as caught:
        parse_url(given)
    assert "s3cret" not in str(caught.value)


def test_a_revision_of_the_hub_is_no_credential() -> None:
    assert str(parse_url("hf://owner/name@main/x.jsonl")) == "hf://owner/name@main/x.jsonl"
    assert str(parse_url("hf://datasets/owner/name/")) == "hf://datasets/owner/name"


def test_a_configuration_has_paths_for_file_urls_and_no_credentials() -> None:
    content = {
        "base": "file:///models/base",
        "candidates": ["peft:file:///runs/checkpoint-1", "s3://bucket/checkpoint-2/"],
        "output": "out",
        "method": {"operator": "average"},
    }
    config = parse_merge_config(content, ["output=file:///runs/merged"])
    assert config.base == "/models/base"
    assert config.candidates == ["peft:/runs/checkpoint-1", "s3://bucket/checkpoint-2/"]
    assert config.output == "/runs/merged"
    with pytest.raises(ConfigError) as caught:
        parse_merge_config({**content, "output": "s3://me:s3cret@bucket/x"})
    assert "output" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_local_copy_says_where_it_is_from() -> None:
    url = parse_url("s3://bucket/models/base")
    assert origin(mirror_path(url, Path("/scratch"))) == url
    bucket = parse_url("s3://bucket")
    assert origin(mirror_path(bucket, Path("/scratch"))) == bucket
    assert origin(Path("/models/base")) is None
    assert origin(Path("/urls/s3/base")) is None


@pytest.mark.parametrize("given", ["https://me:pass@host/x", "http://token@host:5000"])
def test_a_password_in_a_configuration_is_refused_and_not_repeated(given: str) -> None:
    """It would be written down with every run, and in the model card."""
    with pytest.raises(StorageError, match="carries credentials") as caught:
        checked(given)
    assert "pass" not in str(caught.value.where)
    assert "token" not in str(caught.value.where)
    assert checked("https://host/a@b") == "https://host/a@b"

"""The file systems that URLs are on, with endpoints and credentials from the environment."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from arm_ray.errors import StorageError
from arm_ray.storage.urls import Url

_PACKAGES = {"s3": "pyarrow", "gs": "pyarrow", "hf": "huggingface_hub"}
# By itself the client tries for a quarter of an hour, also where there are no credentials.
_GCS_RETRIES = timedelta(seconds=30)
# What settles the file system of a URL beside the URL: a process may change it.
_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "STORAGE_EMULATOR_HOST",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_ENDPOINT",
    "HF_TOKEN",
)


def open_filesystem(url: Url) -> Any:
    """The `pyarrow.fs.FileSystem` of a URL, one for each process, scheme and bucket.

    Raises:
        StorageError: The package that reads the scheme is missing.
    """
    settled = tuple(os.environ.get(name, "") for name in _VARIABLES)
    bucket = url.bucket if url.scheme == "s3" else ""
    return _opened(url.scheme, bucket, settled)


@lru_cache(maxsize=32)
def _opened(scheme: str, bucket: str, _settled: tuple[str, ...]) -> Any:
    try:
        fs = importlib.import_module("pyarrow.fs")
        if scheme == "s3":
            return _s3(fs, bucket)
        if scheme == "gs":
            return _gcs(fs)
        hub = importlib.import_module("huggingface_hub")
        files = hub.HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))
        return fs.PyFileSystem(fs.FSSpecHandler(files))
    except (ImportError, AttributeError) as error:
        raise StorageError(
            f"{scheme}:// needs a package that is missing here",
            got=error,
            expected=f"{_PACKAGES[scheme]}, built with support for it",
            hint=f"pip install --upgrade {_PACKAGES[scheme]}",
        ) from None


def _s3(fs: Any, bucket: str) -> Any:
    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        # Older versions of pyarrow do not look at the variable themselves.
        options |= _endpoint(endpoint)
    elif not region:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError:
            region = None  # the first access says what is wrong
    if region:
        options["region"] = region
    return fs.S3FileSystem(**options)


def _gcs(fs: Any) -> Any:
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
    if not endpoint:
        return fs.GcsFileSystem(retry_time_limit=_GCS_RETRIES)
    return fs.GcsFileSystem(anonymous=True, retry_time_limit=_GCS_RETRIES, **_endpoint(endpoint))


def _endpoint(given: str) -> dict[str, Any]:
    text = given if "://" in given else f"http://{given}"
    parts = urlsplit(text)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    # Without what may stand before the host: credentials.
    return {"scheme": parts.scheme, "endpoint_override": f"{host}{port}{parts.path.rstrip('/')}"}


def has_credentials(scheme: str) -> bool:
    """Whether credentials are to be seen here; a machine's own role is not."""
    names = {
        "s3": (
            "AWS_ACCESS_KEY_ID",
            "AWS_PROFILE",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ),
        "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
        "hf": ("HF_TOKEN", "HF_TOKEN_PATH"),
    }[scheme]
    files = {
        "s3": os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        "gs": "~/.config/gcloud/application_default_credentials.json",
        "hf": os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "token"),
    }
    file = os.path.expanduser(files[scheme])
    return any(os.environ.get(name) for name in names) or os.path.isfile(file)

"""What file systems raise, in words of our own and without secrets."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from arm_ray.errors import NoSuchObjectError, StorageAccessError, StorageError
from arm_ray.secrets import environment_hidden
from arm_ray.storage.filesystem import has_credentials, open_filesystem
from arm_ray.storage.urls import Url

_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT"
    r"|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION|EXPIRED_TOKEN|INVALID_TOKEN|TOKEN_REFRESH"
    r"|PermissionDenied|PERMISSION_DENIED|Unauthenticated|UNAUTHENTICATED"
    r"|HTTP status 40[13]|\b40[13] (Client Error|Forbidden|Unauthorized)|Gated|credentials"
    # What Google's client says on a machine without any.
    r"|OAuth2 access token",
    re.I,
)
_HOW = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws, or a role of the "
    "machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or a service "
    "account of the machine",
    "hf": "HF_TOKEN, or hf auth login",
}


@contextlib.contextmanager
def translated(url: Url, verb: str) -> Iterator[None]:
    """Turn what a file system raises into a `StorageError`.

    Args:
        url: What is read or written.
        verb: `read`, `written`, `listed` or `removed`.
    """
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise _missing(url, verb, error) from None
    except Exception as error:  # of pyarrow, fsspec and the hub's client: dozens of types
        raise _failure(url, verb, error) from None


def _missing(url: Url, verb: str, error: Exception) -> StorageError:
    with contextlib.suppress(Exception):
        if url.scheme != "hf" and not _bucket_exists(url):
            return _no_bucket(url, verb)
    return NoSuchObjectError(
        f"there is nothing that can be {verb}",
        where=url,
        got=_clean(error) if url.scheme == "hf" else "no such object",
        expected="an object of that name, or objects below it",
        hint="check the URL",
    )


def _bucket_exists(url: Url) -> bool:
    return bool(open_filesystem(url).get_file_info(url.bucket).type.value > 1)


def _no_bucket(url: Url, verb: str) -> NoSuchObjectError:
    return NoSuchObjectError(
        f"a URL cannot be {verb}: there is no such bucket",
        where=url,
        got=f"no bucket {url.bucket!r} at {_endpoint(url)}",
        hint="check its name and the endpoint; buckets are not made here",
    )


def _failure(url: Url, verb: str, error: Exception) -> StorageError:
    text = _clean(error)
    if "NO_SUCH_BUCKET" in text:
        return _no_bucket(url, verb)
    if isinstance(error, PermissionError) or _DENIED.search(f"{type(error).__name__} {text}"):
        known = has_credentials(url.scheme)
        return StorageAccessError(
            f"a URL cannot be {verb}: access was denied"
            + ("" if known else ", and no credentials were found"),
            where=url,
            got=text,
            expected=f"credentials that may: {_HOW[url.scheme]}",
            hint=("check whose they are, and what they may" if known else "set them")
            + "; on a cluster every node needs them in its environment",
        )
    return StorageError(
        f"a URL cannot be {verb}",
        where=url,
        got=f"{type(error).__name__}: {text}",
        hint=f"check that {_endpoint(url)} can be reached from here, then run again",
    )


def _endpoint(url: Url) -> str:
    names = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "gs": ("STORAGE_EMULATOR_HOST",),
        "hf": ("HF_ENDPOINT",),
    }[url.scheme]
    given = next((os.environ[name] for name in names if os.environ.get(name)), None)
    default = {"s3": "Amazon S3", "gs": "Google Cloud Storage", "hf": "the Hugging Face hub"}
    return default[url.scheme] if given is None else given.rpartition("@")[2]


def _clean(error: BaseException) -> str:
    return environment_hidden(" ".join(str(error).split()))[:400]

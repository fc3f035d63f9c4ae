"""What is a URL, and its parts. Imports nothing heavy: configurations are checked with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from arm_ray.errors import StorageError
from arm_ray.secrets import hidden, patterns_hidden, secret_in

SCHEMES = ("s3", "gs", "hf")
_URL = re.compile(r"(?P<format>[a-z]+:)?(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.S)


@dataclass(frozen=True)
class Url:
    """A place in a store. Its text has no secrets: those are refused.

    Attributes:
        scheme: One of `SCHEMES`.
        path: `bucket/key`, without slashes at its ends; of the hub `[datasets/]owner/name/file`.
    """

    scheme: str
    path: str

    @property
    def bucket(self) -> str:
        """The bucket; of the hub the owner, or `datasets`."""
        return self.path.partition("/")[0]

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The directory that it is in.

        Raises:
            StorageError: It is a bucket.
        """
        above = self.path.rpartition("/")[0]
        if not above:
            raise StorageError(
                "the URL names a bucket, and no file in it", where=self, expected=f"{self}/FILE"
            )
        return Url(self.scheme, above)

    def __truediv__(self, name: str) -> Url:
        return Url(self.scheme, f"{self.path}/{name}" if name else self.path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def is_url(given: str) -> bool:
    """Whether something is named by a URL of any scheme but `file`, and not by a path."""
    match = _URL.fullmatch(given)
    return match is not None and match["scheme"].lower() != "file" and match["format"] is None


def parse_url(given: str) -> Url:
    """Take a URL apart.

    Raises:
        StorageError: It has an unknown scheme or no bucket, or carries credentials or options,
            which the message does not repeat.
    """
    match = _URL.fullmatch(given)
    scheme = match["scheme"].lower() if match else ""
    if match is None or scheme not in SCHEMES:
        raise StorageError(
            "the URL is of a scheme that is not read",
            where=_without_secrets(given),
            got=f"{scheme}://" if scheme else "no scheme",
            expected=", ".join(f"{known}://" for known in SCHEMES) + ", or a path",
            hint="for another store, mount it or copy the files; S3-compatible ones are s3:// with "
            "AWS_ENDPOINT_URL",
        )
    path = match["rest"].rstrip("/")
    authority = path.partition("/")[0]
    if "?" in path or "#" in path or ("@" in authority and scheme != "hf") or ":" in authority:
        raise StorageError(
            "the URL carries credentials or options",
            where=_without_secrets(given),
            expected=f"{scheme}://BUCKET/PATH alone",
            hint="give credentials and endpoints in the environment: see docs/storage.md",
        )
    parts = path.split("/")
    # Clients would try for long to find the machine of such a bucket.
    is_name = path.isprintable() and " " not in parts[0]
    if not path or not is_name or any(part in ("", ".", "..") for part in parts):
        raise StorageError(
            "the URL has no bucket, or an empty part",
            where=given if given.isprintable() else ascii(given),
            expected=f"{scheme}://BUCKET/PATH",
        )
    return Url(scheme, path)


def plain_path(given: str) -> str:
    """The path that a `file://` URL stands for, perhaps with `FORMAT:` before it.

    What is no such URL is returned as it is.

    Raises:
        StorageError: It names another machine, or a relative path.
    """
    match = _URL.fullmatch(given)
    if match is None or match["scheme"].lower() != "file":
        return given
    parts = urlsplit(given[len(match["format"] or "") :])
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StorageError(
            "the URL names a file on another machine",
            where=given,
            got=parts.netloc or parts.path,
            expected="file:///ABSOLUTE/PATH",
        )
    return (match["format"] or "") + unquote(parts.path)


def checked(given: str) -> str:
    """What a configuration keeps of a text that may be a URL: see `plain_path`.

    Raises:
        StorageError: It is a URL that carries credentials: a configuration is written down with
            every run.
    """
    match = _URL.fullmatch(given)
    authority = given.partition("://")[2].partition("/")[0]
    is_web = match is not None and match["scheme"].lower() in ("http", "https")
    if is_web and ("@" in authority or patterns_hidden(given) != given):
        raise StorageError(
            "the URL carries credentials",
            where=_without_secrets(given),
            expected="a URL without a user, password or token",
            hint="give them in the environment: for MLflow MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; of a hook write ${NAME} where the variable's value goes",
        )
    name = secret_in(given)
    if name is not None:
        raise StorageError(
            "a text holds a secret, and configurations are written down with every run",
            where=hidden(given),
            got=f"the value of {name}",
            expected="a text without it",
            hint=f"what needs it reads {name} from the environment; of a hook write ${{{name}}}",
        )
    if match is not None and match["scheme"].lower() in SCHEMES:
        parse_url(given[len(match["format"] or "") :])
        return given
    return plain_path(given)


def _without_secrets(given: str) -> str:
    """A URL up to where credentials may begin."""
    scheme, _, rest = given.partition("://")
    rest = re.split(r"[?#]", rest)[0]
    return f"{scheme}://{rest.rpartition('@')[2]}"

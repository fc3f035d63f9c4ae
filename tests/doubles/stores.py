"""A local S3 server for the tests: where it listens is settled before Ray is started."""

from __future__ import annotations

import http.server
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arm_ray.storage.store import Store


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


PORT = _free_port()
SECRET = "a-secret-of-the-tests"
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[None]:
    """The server, until the context ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=PORT, verbose=False)
    server.start()
    try:
        yield
    finally:
        server.stop()


def deny(handler: http.server.BaseHTTPRequestHandler, message: str) -> None:
    """Answer a request as S3 does one that is not allowed, with a message in XML's own writing."""
    error = f"<Error><Code>AccessDenied</Code><Message>{message}</Message></Error>"
    body = f'<?xml version="1.0"?>{error}'.encode()
    handler.send_response(403)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def make_bucket(name: str) -> None:
    """Make a bucket on the server."""
    from pyarrow.fs import S3FileSystem

    S3FileSystem(
        access_key="key-of-the-tests",
        secret_key=SECRET,
        endpoint_override=f"http://127.0.0.1:{PORT}",
        region="us-east-1",
        allow_bucket_creation=True,
    ).create_dir(name)


def put(directory: Path, url: str) -> str:
    """Copy all files of a directory to a URL, which is returned."""
    store = Store(url)
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            store.upload(file, file.relative_to(directory).as_posix())
    return url


def names(url: str) -> set[str]:
    """The files below a URL."""
    return set(Store(url).files(recursive=True))

"""Shows the report of a run to a browser of this machine, refreshed as events come."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from arm_ray.errors import ConfigError
from arm_ray.report.page.write import page_of
from arm_ray.report.run_record import CONFIG_NAME, EVENTS_NAME
from arm_ray.report.status import status_of

_LOOPBACK = "127.0.0.1"
# Names of this machine that a browser may have come here by.
_NAMES = ("localhost", "127.0.0.1", "[::1]")


class PageServer(ThreadingHTTPServer):
    """Serves one run's page on the loopback interface.

    Args:
        run: The run's directory.
        port: Where; 0: a port that is free.

    Raises:
        ConfigError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int = 0) -> None:
        self.run = run
        self._made: tuple[str, bytes] = ("", b"")
        self._lock = threading.Lock()
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "the page cannot be served",
                where=f"--port {port}",
                got=error,
                expected="a port that is free, 0 to 65535",
                hint="leave --port out to have one chosen",
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self.server_port}/"

    def version(self) -> str:
        """Changes with what the page is made of."""
        digest = hashlib.sha256()
        for file in _sources(self.run):
            try:
                found = file.stat()
            except OSError:
                continue
            digest.update(f"{file} {found.st_mtime_ns} {found.st_size}\n".encode())
        return digest.hexdigest()[:16]

    def page(self) -> bytes:
        """The page, made anew where something has changed."""
        with self._lock:
            version = self.version()
            if self._made[0] != version:
                self._made = (version, page_of([self.run], is_live=True).encode())
            return self._made[1]


def _sources(run: Path) -> Iterator[Path]:
    """The files that a page is made of."""
    for directory in (run, run / "work"):
        for name in (EVENTS_NAME, CONFIG_NAME, "attach.json", "selection.json", "results.jsonl"):
            yield directory / name
        for pattern in (
            "*/events.jsonl",
            "merges/*/events.jsonl",
            "evaluation/*/*.json",
            "scores/*/*.json",
            "*/*.json",
        ):
            yield from sorted(directory.glob(pattern))


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a browser."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer without the page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # A page of somebody else's whose name was made to lead here must not read this one.
        allowed = {f"{name}:{self.server.server_port}" for name in _NAMES}
        if self.headers.get("Host") not in allowed:
            self._send(403, "text/plain; charset=utf-8", b"not served under this name\n", with_body)
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page(), with_body)
        elif path == "/version":
            status = status_of(self.server.run)
            content = {
                "version": self.server.version(),
                "status": f"{status.state}, {status.stage}",
            }
            self._send(200, "application/json", json.dumps(content).encode(), with_body)
        else:
            self._send(404, "text/plain; charset=utf-8", b"there is only /\n", with_body)

    def _send(self, code: int, kind: str, body: bytes, with_body: bool) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing: the terminal is for people."""

"""A Hugging Face hub on loopback that knows what a push needs, and keeps what it is sent."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class FakeHub:
    """What it holds.

    Attributes:
        url: Where it answers.
        repos: Name -> path -> content.
        private: Name -> whether it is.
        commits: Name -> messages.
        fails: Whether commits are refused.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: dict[str, list[str]] = field(default_factory=dict)
    fails: bool = False


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve one until the context ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: Any) -> None:
            pass

        def _answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        def _allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self._answer(401, {"error": "Invalid credentials"})
            return False

        def do_GET(self) -> None:
            if not self._allowed():
                return
            if self.path.startswith("/api/whoami"):
                self._answer(200, {"name": "someone", "type": "user", "orgs": []})
                return
            found = re.match(r"/api/models/([^/?]+/[^/?]+)", self.path)
            if found and found[1] in hub.repos:
                self._answer(200, {"id": found[1], "sha": "0" * 40, "siblings": [], "tags": []})
            else:
                self._answer(404, {"error": "Repository not found"})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if not self._allowed():
                return
            if self.path == "/api/repos/create":
                content = json.loads(body)
                owner = content.get("organization") or "someone"
                name = f"{owner}/{content['name']}"
                if name in hub.repos:
                    self._answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                    return
                hub.repos[name] = {}
                hub.private[name] = content.get("private") or content.get("visibility") == "private"
                self._answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": "1"})
                return
            if self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
                return
            found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
            assert found is not None, self.path
            if found[2] == "preupload":
                files = json.loads(body)["files"]
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                modes = [{"path": f["path"], **kept} for f in files]
                self._answer(200, {"files": modes})
                return
            if hub.fails:
                self._answer(503, {"error": "out of order"})
                return
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "header":
                    hub.commits.setdefault(found[1], []).append(row["value"]["summary"])
                else:
                    content = base64.b64decode(row["value"]["content"])
                    hub.repos[found[1]][row["value"]["path"]] = content
            self._answer(
                200, {"commitUrl": f"{hub.url}/{found[1]}/commit/1", "commitOid": "1" * 40}
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

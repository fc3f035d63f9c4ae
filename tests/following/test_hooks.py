"""Who is told about a published model, and what happens where that goes wrong."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arm_ray.following.hooks import HookSettings, run_hook
from tests.waiting import has_ended, is_met

PAYLOAD = {"event": "arrival_published", "step": 120, "path": "/published/step-000120"}


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes what is posted; answers with the statuses that it was given, the last one for good."""

    statuses: list[int]
    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.received.append(json.loads(self.rfile.read(length)))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        body = b"no room here"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[type[Receiver], str]]:
    handler = type("Handler", (Receiver,), {"statuses": [200], "received": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_port}/published"
        server.shutdown()
        thread.join()


def test_nobody_is_told_where_nobody_is_named() -> None:
    assert run_hook(HookSettings(), PAYLOAD).attempts == 0


def test_a_command_gets_the_json_on_its_input_and_in_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    program = (
        "import json, os, sys\n"
        "given = [json.load(sys.stdin), json.load(open(os.environ['ARM_RAY_PUBLISHED']))]\n"
        f"json.dump([*given, sys.argv[1:]], open({str(out)!r}, 'w'))\n"
    )
    command = (sys.executable, "-c", program, "$HOME;", "a b")
    result = run_hook(HookSettings(command=command), PAYLOAD)
    assert (result.problems, result.attempts) == ((), 1)
    # No shell has looked at the arguments.
    assert json.loads(out.read_text()) == [PAYLOAD, PAYLOAD, ["$HOME;", "a b"]]


def test_an_address_gets_the_json(receiver: tuple[type[Receiver], str]) -> None:
    handler, url = receiver
    assert run_hook(HookSettings(url=url), PAYLOAD).problems == ()
    assert handler.received == [PAYLOAD]


def test_what_fails_is_tried_again_and_later_told(receiver: tuple[type[Receiver], str]) -> None:
    handler, url = receiver
    pauses: list[float] = []
    handler.statuses = [503, 503, 200]
    result = run_hook(HookSettings(url=url), PAYLOAD, pauses.append)
    assert (result.problems, result.attempts, pauses) == ((), 3, [1.0, 2.0])
    handler.statuses = [500]
    result = run_hook(HookSettings(url=url, retries=1), PAYLOAD, pauses.append)
    assert result.attempts == 2
    assert "HTTP 500" in result.problems[0]
    assert "no room here" in result.problems[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"command": (sys.executable, "-c", "raise SystemExit('not today')")}, "not today"),
        ({"command": ("/no/such/program",)}, "No such file"),
        ({"url": "file:///etc/passwd"}, "not an http address"),
        ({"url": "http://127.0.0.1:1/"}, "refused"),
    ],
)
def test_what_goes_wrong_is_told_and_raises_nothing(settings: dict[str, Any], said: str) -> None:
    result = run_hook(HookSettings(**settings, retries=0), PAYLOAD)
    assert len(result.problems) == 1
    assert said in result.problems[0]


def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(written)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    settings = HookSettings(command=(sys.executable, "-c", program), timeout_s=1.0, retries=0)
    result = run_hook(settings, PAYLOAD)
    assert "no end within 1 s" in result.problems[0]
    child = int(written.read_text())
    assert is_met(lambda: has_ended(child))

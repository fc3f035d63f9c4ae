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

from arm_ray.following import posting
from arm_ray.following.hooks import HookSettings, problems_of, run_hook
from tests.waiting import has_ended, is_met

PAYLOAD = {"event": "arrival_published", "step": 120, "path": "/published/step-000120"}


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes what is posted; answers with the statuses that it was given, the last one for good."""

    statuses: list[int]
    received: list[dict[str, Any]]
    paths: list[str]
    location = ""
    said = "no room here"

    def do_POST(self) -> None:
        self.paths.append(self.path)
        length = int(self.headers["Content-Length"])
        self.received.append(json.loads(self.rfile.read(length)))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        body = self.said.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.location:
            self.send_header("Location", self.location)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.received.append({"a redirect was followed": self.path})
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[type[Receiver], str]]:
    handler = type("Handler", (Receiver,), {"statuses": [200], "received": [], "paths": []})
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


def test_no_shell_looks_at_a_command(tmp_path: Path) -> None:
    evil = ("; touch made", "$(touch made)", "`touch made`", "| touch made", "> made", "a b", "*")
    out = tmp_path / "out.json"
    program = f"import json, sys; json.dump(sys.argv[1:], open({str(out)!r}, 'w'))"
    command = (sys.executable, "-c", program, *evil)
    assert run_hook(HookSettings(command=command), PAYLOAD).problems == ()
    assert json.loads(out.read_text()) == [*evil]
    # A program's name is no command line either.
    result = run_hook(HookSettings(command=(f"touch {tmp_path}/made",), retries=0), PAYLOAD)
    assert "No such file" in result.problems[0]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["/elsewhere", "http://localhost:{port}/x", "file:///etc/passwd"]
)
def test_a_redirect_is_told_and_not_followed(
    receiver: tuple[type[Receiver], str], status: int, target: str
) -> None:
    handler, url = receiver
    place = target.format(port=url.rpartition(":")[2].partition("/")[0])
    handler.statuses = [status]
    handler.location = place
    result = run_hook(HookSettings(url=url, retries=0), PAYLOAD)
    assert f"a redirect to {place}, which is not followed" in result.problems[0]
    # It was sent once, to where it was to go.
    assert handler.received == [PAYLOAD]


METADATA = [
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://0xa9fea9fe/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fd00:ec2::254]/",
    "http://[fd00:ec2::23]/",
    "http://[fd20:ce::254]/",
    "http://[64:ff9b::169.254.169.254]/",
    "http://[2002:a9fe:a9fe::]/",
    "http://[::169.254.169.254]/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://metadata.google.internal/",
    "http://metadata.goog/",
    "http://METADATA.google.internal./",
]


@pytest.mark.parametrize("url", METADATA)
def test_where_clouds_have_credentials_nothing_is_sent(url: str) -> None:
    [problem] = problems_of(HookSettings(url=url))
    assert problem.startswith("url: a link-local address")
    result = run_hook(HookSettings(url=url, retries=0), PAYLOAD)
    assert "link-local" in result.problems[0]


def test_a_name_that_leads_to_a_link_local_address_gets_nothing(
    receiver: tuple[type[Receiver], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a name was when the configuration was read, the connection's own end counts."""
    handler, url = receiver
    monkeypatch.setattr(posting, "_is_refused", lambda address: address == "127.0.0.1")
    named = url.replace("127.0.0.1", "localhost")
    result = run_hook(HookSettings(url=named, retries=0), PAYLOAD)
    assert "the name leads to a link-local address" in result.problems[0]
    assert handler.received == []


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/reload",
        "http://127.0.0.1:8000/reload",
        "http://[::1]:8000/",
        "http://10.0.0.7/x",
        "https://192.168.1.5:8443/x?model=a",
        "http://engine.cluster.local/x",
        "https://host/x?token=${MY_TOKEN}",
    ],
)
def test_what_a_configuration_may_name(url: str) -> None:
    assert problems_of(HookSettings(url=url)) == []


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file:///etc/passwd", "gopher://host", "http://", "/x", "http://a b/"]
)
def test_other_schemes_are_refused(url: str) -> None:
    [problem] = problems_of(HookSettings(url=url))
    assert problem == "url: not an http address"


def test_variables_are_filled_in_when_it_runs(
    receiver: tuple[type[Receiver], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = receiver
    monkeypatch.setenv("HOOK_TOKEN", "s3cret-of-the-hook")
    handler.statuses = [500]
    result = run_hook(HookSettings(url=f"{url}?token=${{HOOK_TOKEN}}", retries=0), PAYLOAD)
    assert handler.paths == ["/published?token=s3cret-of-the-hook"]
    assert "s3cret" not in result.problems[0]
    assert "${HOOK_TOKEN}" in result.problems[0]
    program = "import sys; sys.exit(sys.argv[1] + ' was said')"
    command = (sys.executable, "-c", program, "${HOOK_TOKEN}")
    result = run_hook(HookSettings(command=command, retries=0), PAYLOAD)
    assert "was said" in result.problems[0]
    assert "s3cret" not in result.problems[0]
    result = run_hook(HookSettings(url="http://localhost/${NOT_THERE}", retries=0), PAYLOAD)
    assert "the environment has no NOT_THERE" in result.problems[0]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "Cannot POST /services/T0000/XyZsecretXyZ here"),
        # Half of it would be left where this is cut.
        (404, "x" * 170 + "XyZsecretXyZ" + "y" * 180 + "XyZsecretXyZ"),
        (302, "/login?next=%2FT0000%2FXyZsecretXyZ"),
    ],
)
def test_no_value_of_a_variable_is_told_again(
    receiver: tuple[type[Receiver], str], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the variable is called: a path may be all that an address needs to be secret."""
    handler, url = receiver
    monkeypatch.setenv("SLACK_PATH", "T0000/XyZsecretXyZ")
    monkeypatch.setenv("SLACK_END", "XyZsecretXyZ")
    handler.statuses, handler.said = [status], said
    handler.location = said if status == 302 else ""
    settings = HookSettings(url=f"{url}/${{SLACK_PATH}}?a=${{SLACK_END}}", retries=0)
    [problem] = run_hook(settings, PAYLOAD).problems
    assert "XyZ" not in problem
    assert "${SLACK" in problem.replace(str(settings.url), "")


def test_no_value_of_a_variable_is_told_by_the_check_of_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHERE", "s3cretport")
    [problem] = run_hook(HookSettings(url="http://host:${WHERE}/", retries=0), PAYLOAD).problems
    assert "not an http address" in problem
    assert "s3cret" not in problem


def test_a_shell_asked_for_has_variables_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"for f in a b; do echo $${{f}}; done > {out}; cat ${{ARM_RAY_PUBLISHED}} >> {out}"
    assert run_hook(HookSettings(command=("sh", "-c", script), retries=0), PAYLOAD).problems == ()
    assert out.read_text() == "a\nb\n" + json.dumps(PAYLOAD)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"command": ()}, "command: names no program"),
        ({"command": ("", "x")}, "command: names no program"),
        ({"command": ("curl", "-H", "Authorization: Bearer abcdefgh12345")}, "holds a secret"),
        ({"url": "https://host/x?token=s3cret"}, "holds a secret"),
        ({"url": "https://me:s3cret@host/x"}, "it carries a user and password"),
    ],
)
def test_what_a_configuration_may_not_say(settings: dict[str, Any], said: str) -> None:
    assert said in "\n".join(problems_of(HookSettings(**settings)))

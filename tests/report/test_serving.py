"""The page of a run on the loopback interface, refreshed as events come."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from arm_ray.errors import ConfigError
from arm_ray.report.page import library
from arm_ray.report.serving import PageServer
from tests.builders.browser import NAMES, find_browser, open_page
from tests.builders.paths import ROOT
from tests.builders.runs import merge_run


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PageServer]:
    if request.node.get_closest_marker("processes") is None:
        request.getfixturevalue("monkeypatch").setattr(library, "_known", "0;")
    with PageServer(merge_run(tmp_path)) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def get(
    server: PageServer, path: str = "/", host: str | None = None, method: str = "GET"
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {} if host is None else {"Host": host}
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_it_serves_the_page_on_loopback_alone(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    code, headers, text = get(server)
    assert code == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert "state-0002 and checkpoint-10" in text
    assert "connect-src 'self'" in text.replace("&#39;", "'")
    code, _, text = get(server, method="HEAD")
    assert (code, text) == (200, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", ""])
def test_other_names_are_refused(server: PageServer, host: str) -> None:
    """A page of somebody else's whose name leads here (DNS rebinding) reads nothing."""
    for path in ("/", "/version"):
        code, _, text = get(server, path, host.format(port=server.server_port))
        assert (code, text) == (403, "not served under this name\n")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
def test_names_of_this_machine_are_served(server: PageServer, name: str) -> None:
    assert get(server, host=f"{name}:{server.server_port}")[0] == 200


@pytest.mark.parametrize("path", ["/config.yaml", "/../events.jsonl", "/report.html", "//etc"])
def test_there_is_nothing_but_the_page(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_a_new_event_is_a_new_version_and_a_new_page(server: PageServer) -> None:
    first = json.loads(get(server, "/version")[2])
    assert first["status"] == "finished, ended: max iterations"
    assert json.loads(get(server, "/version")[2]) == first
    page = server.page()
    assert server.page() is page
    with (server.run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "warning", "message": "something new"}) + "\n")
    assert json.loads(get(server, "/version")[2])["version"] != first["version"]
    assert "something new" in get(server)[2]


def test_a_port_that_is_taken_is_told(server: PageServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the page cannot be served"):
        PageServer(server.run, server.server_port)


@pytest.mark.processes
@pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)}")
def test_the_page_asks_for_news_in_the_browser(server: PageServer, tmp_path: Path) -> None:
    opened = open_page(server.url, tmp_path / "profile")
    assert opened.data("failed") == "0"
    assert "Live: finished, ended: max iterations" in opened.dom
    assert opened.console == []


@pytest.mark.processes
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_when_interrupted(tmp_path: Path, by: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "arm_ray.cli", "serve", str(merge_run(tmp_path))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs these tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        process.send_signal(by)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert errors == "ended\n"

"""Secrets that were planted are in nothing that commands write, print, or send to others."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from huggingface_hub import HfApi

from arm_ray.errors import StorageError
from arm_ray.events import EventLog, RunFailed, Warned
from arm_ray.exports import hub as hub_module
from arm_ray.exports.hub import push
from arm_ray.following.hooks import HookSettings, run_hook
from tests.builders import studies
from tests.builders.figures import guarantee
from tests.builders.forked import CommandServer, Ended
from tests.builders.hub import TOKEN, fake_hub
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.paths import ROOT
from tests.chaos.jobs import attach_job
from tests.doubles import stores
from tests.refusals.place import Place, make_good

pytestmark = pytest.mark.processes

# Of the environment: what each variable holds. Some have characters that URLs write otherwise.
SECRETS = {
    "HF_TOKEN": TOKEN,
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000001",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret=0123456789abcdef",
    "WANDB_API_KEY": "planted0wandb0123456789abcdef",
    "RAY_AUTH_TOKEN": "planted-ray-0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "planted mlflow & password",
    "MY_API_TOKEN": "planted-custom-0123456789",
    "DATABASE_PASSWORD": 'planted "quoted" password',
}
# What somebody has written into a URL or a header by hand, and no variable holds.
IN_URLS = "plantedInUrl0123456789"


def forms(secret: str) -> list[bytes]:
    """How a secret may stand in bytes."""
    plain = secret.encode()
    encoded = base64.b64encode(plain).rstrip(b"=")
    told = [plain, json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode(), encoded]
    return [*dict.fromkeys(told)]


def look_through(root: Path, said: dict[str, str], what: str) -> set[str]:
    """Assert that no secret is in any file below a directory, or in texts; returns files' names.

    Args:
        root: The directory.
        said: What it is called -> a text.
        what: Who has written it.
    """
    files = {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    looked_at = {**files, **{name: text.encode() for name, text in said.items()}}
    found = [
        f"{variable} in {name}"
        for variable, secret in {**SECRETS, "by hand": IN_URLS}.items()
        for form in forms(secret)
        for name, content in looked_at.items()
        if form in content
    ]
    total = sum(map(len, looked_at.values()))
    guarantee(
        f"secrets found ({what}): {len(found)} in {len(looked_at)} files and outputs, {total} bytes"
    )
    assert found == []
    return {Path(name).name for name in files}


class Echo(http.server.BaseHTTPRequestHandler):
    """Refuses everything, and repeats in its message what it was sent and could know."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = " ".join([self.path, str(self.headers), *SECRETS.values()])
        said = said.replace("&", "&amp;").replace("<", "&lt;")
        stores.deny(self, said)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def echo() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _commands(place: Place, root: Path) -> Iterator[tuple[list[str], int]]:
    """Command lines, with the exit codes that they have; each is run before the next is made."""
    run, model = str(root / "run"), str(root / "run" / "model")

    def merge(name: str, **changes: object) -> list[str]:
        content = place.merge_content(**{"output": str(root / name), **changes})
        path = place.file(f"{name}.yaml", yaml.safe_dump(content))
        return ["merge", str(path)]

    hook = {"url": "http://127.0.0.1:9/hook?token=${MY_API_TOKEN}"}
    section = {"dir": str(root / "published"), "hook": hook}
    secret_hook = {**section, "hook": {"url": f"http://127.0.0.1:9/hook?token={IN_URLS}"}}
    secret_command = {**section, "hook": {"command": ["curl", f"Bearer {IN_URLS}"]}}
    by_hand = {"mlflow": f"http://me:{IN_URLS}@host:5000"}
    held = {"mlflow": f"http://host/{SECRETS['MY_API_TOKEN']}"}
    yield merge("run"), 0
    yield ["status", run, "--json"], 0
    yield ["report", run, "--output", str(root / "page.html")], 0
    yield ["report", run, run, "--output", str(root / "compared.html")], 0
    yield ["verify", run], 0
    yield ["verify", model, "--json"], 0
    yield ["inspect", model, "--json"], 0
    yield ["plan", *place.merge()[1:]], 0
    yield merge("of-a-store", base="s3://bucket/model"), 1
    yield [*merge("of-a-store", base="s3://bucket/model"), "--debug"], 1
    yield merge("to-a-store", output="s3://bucket/run"), 1
    yield merge("damaged", candidates=[str(place.file("none/config.json", "{").parent)]), 1
    yield merge("tracked", tracking=by_hand), 1
    yield merge("held", tracking=held), 1
    yield merge("named", base=f"/models/{SECRETS['MY_API_TOKEN']}"), 1
    yield ["inspect", f"s3://me:{IN_URLS}@bucket/model"], 1
    yield ["report", f"s3://me:{IN_URLS}@bucket/run"], 1
    yield place.attach(publish=secret_hook), 1
    yield place.attach(publish=secret_command), 1
    # It is about to start Ray, and has written its configuration.
    yield place.attach(publish=section), 71


def _push(model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a model on a hub, and fail to do so; what was sent, and what was said."""
    with fake_hub() as hub:
        api = HfApi(endpoint=hub.url, token=TOKEN)
        monkeypatch.setattr(hub_module, "_client", lambda given: given or api)
        push(model, "someone/model")
        hub.fails = True
        with pytest.raises(StorageError) as caught:
            push(model, "someone/model", update=True)
        sent = b"".join(hub.repos["someone/model"].values()).decode("latin-1")
    return sent + str(caught.value)


def test_no_secret_gets_out(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path
    inputs = tmp_path_factory.mktemp("inputs")
    place = Place(inputs, make_good(tmp_path_factory.mktemp("good")))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said: dict[str, str] = {}
    with echo() as url, CommandServer() as server:
        env = {**SECRETS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
        for number, (arguments, code) in enumerate(_commands(place, root)):
            ended: Ended = server.run(arguments, root, env)
            assert ended.code == code, ended.err[-2000:]
            said[f"{number} {arguments[0]}"] = ended.out + ended.err
        # The store's words were repeated, without what was secret in them.
        assert any("AWS4-HMAC-SHA256" in text and "…" in text for text in said.values())
        hook = HookSettings(url=f"{url}/hook?token=${{MY_API_TOKEN}}", retries=0)
        command = ("/bin/sh", "-c", "echo $MY_API_TOKEN $HF_TOKEN >&2; exit 3", "${MY_API_TOKEN}")
        failing = HookSettings(command=command, retries=0)
        for given in (hook, failing):
            result = run_hook(given, {"event": "x"})
            assert len(result.problems) == 1
            said[f"hook {given}"] = result.problems[0]
    log = EventLog(root / "run" / "events.jsonl")
    told: list[object] = []
    log.subscribe(told.append)
    log.write(Warned(f"a library said {SECRETS['DATABASE_PASSWORD']} and {SECRETS['HF_TOKEN']}"))
    log.write(RunFailed("OSError", f"https://me:{IN_URLS}@host/?sig={IN_URLS}"))
    said["observers"] = str(told)
    said["hub"] = _push(root / "run" / "model", monkeypatch)
    names = look_through(root, said, "commands")
    # What was looked through is what commands write.
    assert {"config.yaml", "events.jsonl", "report.html", "README.md", "arm_ray.json"} <= names


def _serving(root: Path, url: str) -> Iterator[tuple[list[str], dict[str, str], int]]:
    """Command lines that start engines or Ray, what their environment has, and their exit codes."""
    case = MergeCase(root / "inputs").make("smollm2", sizes=SERVED)

    def written(command: str, content: object) -> list[str]:
        path = root / f"{command}.yaml"
        path.write_text(yaml.safe_dump(content))
        return [command, str(path)]

    rows = [{"question": f"{i} red apples and", "answer": str(i)} for i in range(8)]
    asked = root / "inputs" / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "asked", "type": "questions", "path": str(asked), "max_tokens": 4}
    engine = {"max_model_len": 128, "dtype": "float32"}
    scoring = {"tasks": [{**task, "repeats": 1}], "engine": engine, "resamples": 100}
    models = {"base": str(root / "inputs" / "base")}
    told = {"models": models, "output": str(root / "told"), "evaluation": scoring}
    yield written("evaluate", told), {"TELLING_ENGINE": ",".join(SECRETS)}, 1
    axes = {"candidates": [[10, 20]], "operator": {"arm": {"method.operator": "arm"}}}
    study = studies.content(case, output=str(root / "study"), axes=axes, evaluation=scoring)
    yield written("study", study), {}, 0
    job = attach_job(root / "followed", count=2)
    followed = yaml.safe_load((job.root / "job.yaml").read_text())
    followed["merge"]["runtime"]["layer_shards"] = 1
    followed["publish"]["dir"] = str(root / "followed" / "out")
    followed["publish"]["hook"] = {"url": f"{url}/hook?token=${{MY_API_TOKEN}}", "retries": 0}
    yield written("attach", followed), {}, 0


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """A place for Ray's files; its path is short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        yield Path(place)


def test_no_secret_gets_out_of_engines_studies_and_attach(tmp_path: Path, ray_files: Path) -> None:
    """Of commands that start Ray, whose own logs are looked through as well."""
    said: dict[str, str] = {}
    with echo() as url:
        for number, (arguments, others, code) in enumerate(_serving(tmp_path, url)):
            # What an engine has said of its own accord is in Ray's logs by Ray's own doing.
            place = ray_files / "told" if others else ray_files / "searched"
            ended = subprocess.run(
                [sys.executable, "-m", "tests.chaos.driver", *arguments],
                cwd=ROOT,
                env={**os.environ, **SECRETS, **others, "RAY_TMPDIR": str(place)},
                capture_output=True,
                text=True,
            )
            said[f"{number} {arguments[0]}"] = ended.stdout + ended.stderr
            assert ended.returncode == code, ended.stderr[-3000:]
    # The engine's words were repeated, without what was secret in them.
    assert "MY_API_TOKEN=…" in said["0 evaluate"]
    # The hook was answered with everything that can be known.
    assert "HTTP 403" in said["2 attach"]
    searched = (ray_files / "searched").rglob("*")
    logs = {str(path): path.read_bytes() for path in searched if path.is_file()}
    assert any(name.endswith("raylet.out") for name in logs)
    texts = {name: content.decode("latin-1") for name, content in logs.items()}
    names = look_through(tmp_path, {**said, **texts}, "engines, a study, attach")
    assert {"asked.parquet", "results.parquet", "arm_ray.json", "report.html"} <= names

"""The program as a user starts it: a local Ray that goes away again, and a job on a cluster."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, MergeCase
from tests.training.common import content, make_rows

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def environment(temporary: str, **extra: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **env,
        "PATH": f"{BIN}:{env['PATH']}",
        "RAY_TMPDIR": temporary,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **extra,
    }


def processes_with(text: str) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture
def short_directory() -> Iterator[str]:
    # Ray puts sockets there, whose paths have a length limit that pytest's directories exceed.
    with tempfile.TemporaryDirectory(prefix="ray") as path:
        yield path


def write_config(case: MergeCase, output: str) -> Path:
    file = case.root / f"{output}.yaml"
    file.write_text(yaml.safe_dump(case.content(output)))
    return file


def test_a_local_ray_starts_by_itself_and_is_gone_afterwards(
    case: MergeCase, short_directory: str
) -> None:
    case.make()
    command = [str(BIN / "arm-ray"), "merge", str(write_config(case, "run")), "keep_states=last"]
    done = subprocess.run(
        command,
        env=environment(short_directory),
        cwd=case.root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "iteration 4/4" in done.stderr
    assert "cos of task vectors" in done.stderr
    assert (case.root / "run" / "model" / "model.safetensors").exists()
    assert processes_with(short_directory) == []


def test_a_submitted_job_gives_the_same_bits(case: MergeCase, short_directory: str) -> None:
    case.make("qwen3")
    dashboard = free_port()
    env = environment(short_directory)
    address = f"http://127.0.0.1:{dashboard}"
    head = subprocess.Popen(
        [
            "ray",
            "start",
            "--head",
            "--block",
            f"--port={free_port()}",
            "--num-cpus=4",
            f"--dashboard-port={dashboard}",
            # The default port is taken where another Ray runs on this machine, as in this suite.
            f"--dashboard-agent-listen-port={free_port()}",
            "--disable-usage-stats",
            f"--temp-dir={short_directory}",
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def submit(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
        for _ in range(20):
            done = subprocess.run(
                [*command, "python", "-m", f"jobs.{job}", *arguments],
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
            )
            # The dashboard listens a little before the agent that starts jobs is ready.
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done

    try:
        wait_for_port(dashboard)
        two = submit("merge", str(write_config(case, "two")), "runtime.layer_shards=2")
        assert two.returncode == 0, two.stdout + two.stderr
        assert "iteration 4/4" in two.stdout
        wrong = submit("merge", str(write_config(case, "two")), "schedule.max_iteration=3")
        assert wrong.returncode != 0
        assert "did you mean 'max_iterations'?" in wrong.stdout
        relative = submit("merge", str(write_config(case, "two")), "output=somewhere")
        assert "an absolute path" in relative.stdout
        training = case.root / "training.yaml"
        data = make_rows(case.root / "rows.jsonl")
        training.write_text(
            yaml.safe_dump(content(case.root / "base", data, case.root / "trained"))
        )
        trained = submit("sft", str(training), "runtime.workers=2")
        assert trained.returncode == 0, trained.stdout + trained.stderr
        assert "step 6/6" in trained.stdout
        one = subprocess.run(
            ["arm-ray", "merge", str(write_config(case, "one"))],
            env=environment(short_directory),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert one.returncode == 0, one.stderr
    finally:
        head.terminate()
        head.wait(60)
    left, right = [
        load_file(case.root / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    assert (case.root / "trained" / "checkpoint-6" / "model.safetensors").exists()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def wait_for_port(port: int) -> None:
    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nothing listens on {port}")

"""The program as a user starts it: a local Ray that goes away again, and a job on a cluster."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster.common import (
    BIN,
    clean_environment,
    local_cluster,
    processes_with,
    submit,
)
from tests.conftest import MergeCase
from tests.training.common import content, make_rows

pytestmark = pytest.mark.slow


def environment(temporary: str) -> dict[str, str]:
    """For a local Ray, which keeps its files there and finds no cluster."""
    return clean_environment(
        RAY_TMPDIR=temporary, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
    )


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
    with local_cluster(Path(short_directory) / "c", ARM_RAY_LOCAL_CPUS="2") as env:

        def run_job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            return submit(env, "python", "-m", f"jobs.{name}", *arguments)

        two = run_job("merge", str(write_config(case, "two")), "runtime.layer_shards=2")
        assert two.returncode == 0, two.stdout + two.stderr
        assert "iteration 4/4" in two.stdout
        wrong = run_job("merge", str(write_config(case, "two")), "schedule.max_iteration=3")
        assert wrong.returncode != 0
        assert "did you mean 'max_iterations'?" in wrong.stdout
        relative = run_job("merge", str(write_config(case, "two")), "output=somewhere")
        assert "an absolute path" in relative.stdout
        training = case.root / "training.yaml"
        data = make_rows(case.root / "rows.jsonl")
        training.write_text(
            yaml.safe_dump(content(case.root / "base", data, case.root / "trained"))
        )
        trained = run_job("sft", str(training), "runtime.workers=2")
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
    assert processes_with(short_directory) == []
    left, right = [
        load_file(case.root / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    assert (case.root / "trained" / "checkpoint-6" / "model.safetensors").exists()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)

"""The program as a user starts it: a local Ray that goes away again, and a job on a cluster."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray import __version__ as ray_version
from safetensors.torch import load_file

from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.paths import ROOT
from tests.builders.pipelines import content as pipeline_content
from tests.cluster.common import (
    BIN,
    clean_environment,
    local_cluster,
    processes_with,
    submit,
)


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


@pytest.mark.processes
def test_a_local_ray_starts_by_itself_and_is_gone_afterwards(
    case: MergeCase, short_directory: str
) -> None:
    case.make()
    command = [str(BIN / "arm-ray"), "merge", str(write_config(case, "run")), "keep_states=last"]
    # One alone would be no actor.
    command.append("runtime.layer_shards=2")
    done = subprocess.run(
        command,
        env=environment(short_directory),
        cwd=case.root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 layer shard(s) on cpu" in done.stderr
    assert "iteration 4/4" in done.stderr
    assert "cos of task vectors" in done.stderr
    assert (case.root / "run" / "model" / "model.safetensors").exists()
    assert processes_with(short_directory) == []


def wheel_as_working_directory(directory: Path) -> Path:
    """The package's wheel, which is a zip file, under a name that Ray takes for a directory."""
    source = directory / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "arm_ray", source / "arm_ray", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, *build, "--wheel-dir", str(directory), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [wheel] = directory.glob("*.whl")
    return wheel.rename(directory / "arm_ray.zip")


def ask(env: dict[str, str], path: str) -> Any:
    """What the dashboard answers."""
    token = Path(env["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    url = f"{env['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as got:
        return json.load(got)


def jobs_of(env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The dashboard's list: id of a submission, or of a driver -> what it knows of it."""
    return {job["submission_id"] or job["job_id"]: job for job in ask(env, "")}


@pytest.mark.minutes
def test_a_submitted_job_gives_the_same_bits(case: MergeCase, short_directory: str) -> None:
    case.make("smollm2", sizes=SERVED)
    with local_cluster(Path(short_directory) / "c", ARM_RAY_LOCAL_CPUS="2") as env:

        def run_job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            return submit(env, "python", "-m", f"jobs.{name}", *arguments)

        about = json.dumps({"arm_ray": "merge", "output": str(case.root / "two")})
        options = ("--submission-id", "merge-two", "--metadata-json", about)
        # Of a wheel, and the other jobs of this checkout.
        wheel = wheel_as_working_directory(case.root / "wheel")
        merge = f"python -m arm_ray.jobs.merge {write_config(case, 'two')} runtime.layer_shards=2"
        where = "python -c 'import arm_ray; print(arm_ray.__file__)'"
        two = submit(env, "sh", "-c", f"{where} && {merge}", options=options, working_dir=wheel)
        assert two.returncode == 0, two.stdout + two.stderr
        assert "iteration 4/4" in two.stdout
        assert re.search(
            r"/runtime_resources/working_dir_files/\S+/arm_ray/__init__.py", two.stdout
        )
        # Lines, and no cursor movements that a log would show as they are.
        logs = ask(env, "merge-two/logs")["logs"]
        assert "iteration 4/4" in logs
        assert "\x1b" not in logs
        listed = jobs_of(env)["merge-two"]
        assert listed["status"] == "SUCCEEDED"
        assert listed["metadata"] == json.loads(about)
        wrong = run_job("merge", str(write_config(case, "two")), "schedule.max_iteration=3")
        assert wrong.returncode != 0
        assert "did you mean 'max_iterations'?" in wrong.stdout
        relative = run_job("merge", str(write_config(case, "two")), "output=somewhere")
        assert "an absolute path" in relative.stdout
        pipeline = case.root / "pipeline.yaml"
        given = pipeline_content(case, train_on=False)
        del given["merges"]["mean of two"]
        pipeline.write_text(yaml.safe_dump(given))
        whole = run_job("pipeline", str(pipeline))
        assert whole.returncode == 0, whole.stdout + whole.stderr
        assert "step 6/6" in whole.stdout
        assert (case.root / "out" / "merges").is_dir()
        evaluation = case.root / "evaluate.yaml"
        models = {"base": str(case.root / "base"), "two": str(case.root / "two" / "model")}
        evaluation.write_text(
            yaml.safe_dump(
                {
                    "models": models,
                    "output": str(case.root / "scores"),
                    "evaluation": given["evaluation"],
                }
            )
        )
        scored = run_job("evaluate", str(evaluation))
        assert scored.returncode == 0, scored.stdout + scored.stderr
        assert all(name in scored.stdout for name in models)
        # A driver that joins the cluster says by itself what it is.
        one = subprocess.run(
            [str(BIN / "arm-ray"), "merge", str(write_config(case, "one"))],
            env=env,
            cwd=case.root,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert one.returncode == 0, one.stderr
        told = [job["metadata"] or {} for job in jobs_of(env).values()]
        assert str(case.root / "one") in [metadata.get("output") for metadata in told]
        other = subprocess.run(
            [
                str(BIN / "python"),
                "-c",
                "import sys, ray; ray.__version__ = '2.0.1'; from arm_ray.cli import main; "
                f"sys.exit(main(['merge', {str(write_config(case, 'other'))!r}]))",
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert other.returncode != 0
        assert "another version of Ray or Python" in other.stderr
        assert "2.0.1" in other.stderr
        assert ray_version in other.stderr
    assert processes_with(short_directory) == []
    left, right = [
        load_file(case.root / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)

"""cluster/local.sh: two real nodes, a submitted merge over both, and nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.builders.merge_case import MergeCase
from tests.cluster.common import (
    clean_environment,
    local_cluster,
    local_sh,
    processes_with,
    submit,
)

# Of the actors that have ended as well.
SHARDS = """
import json
from ray.util.state import list_actors, list_nodes
shards = list_actors(filters=[("class_name", "=", "LayerShard")])
evaluators = [n.node_id for n in list_nodes() if "evaluator" in n.resources_total]
print(json.dumps({"shards": [s.node_id for s in shards], "evaluators": evaluators}))
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    # Short, for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ray") as path:
        yield Path(path) / "c"


@pytest.mark.processes
def test_a_merge_on_both_nodes(case: MergeCase, directory: Path) -> None:
    case.make("smollm2")
    (case.root / "merge.yaml").write_text(yaml.safe_dump(case.content("run")))
    resources = json.dumps({"evaluator": 1})
    # Looks like one of the cluster's, but was not started by it.
    other = subprocess.Popen(
        ["sleep", "300"], env=clean_environment(ARM_RAY_LOCAL_MARK="another cluster's")
    )
    try:
        with local_cluster(directory, ARM_RAY_LOCAL_RESOURCES=resources) as env:
            token = directory / "token"
            assert token.stat().st_mode & 0o777 == 0o600
            assert directory.stat().st_mode & 0o777 == 0o700
            assert "already up" in local_sh("up", env).stdout
            merged = submit(
                env,
                *("python", "-m", "arm_ray.jobs.merge", str(case.root / "merge.yaml")),
                "runtime.layer_shards=2",
            )
            assert merged.returncode == 0, merged.stdout + merged.stderr
            assert "iteration 4/4" in merged.stdout
            assert "2 layer shard(s)" in merged.stdout
            seen = json.loads(run_python(env, SHARDS).stdout.splitlines()[-1])
            assert len(seen["shards"]) == 2
            assert len(set(seen["shards"])) == 2
            assert len(seen["evaluators"]) == 1
            nobody = {k: v for k, v in env.items() if not k.startswith("RAY_AUTH")}
            refused = run_python({**nobody, "RAY_AUTH_MODE": "disabled"}, SHARDS)
            assert refused.returncode != 0
            assert "Missing authentication token" in refused.stderr
            assert token.read_text() not in merged.stdout + merged.stderr + refused.stderr
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert processes_with(str(directory)) == []
    assert not directory.exists()
    assert (case.root / "run" / "model" / "model.safetensors").exists()


def run_python(env: dict[str, str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )


def test_without_a_cluster(directory: Path) -> None:
    env = clean_environment(ARM_RAY_LOCAL_DIR=str(directory))
    for command in ("status", "address", "env"):
        done = local_sh(command, env)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"there is no cluster in {directory}" in done.stderr
    assert local_sh("down", env).stdout == "nothing to end\n"
    assert local_sh("sideways", env).returncode == 2


def test_a_directory_that_it_does_not_take(directory: Path, tmp_path: Path) -> None:
    for wrong, problem in (
        ("relative", "must be an absolute path"),
        (f"/tmp/{'long' * 10}", "too long for sockets"),
    ):
        done = local_sh("up", clean_environment(ARM_RAY_LOCAL_DIR=wrong))
        assert done.returncode == 1
        assert problem in done.stderr
    # In a directory that all may write to, someone else's link would decide where the token goes.
    directory.symlink_to(tmp_path)
    done = local_sh("up", clean_environment(ARM_RAY_LOCAL_DIR=str(directory)))
    assert "not this user's own directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay(directory: Path) -> None:
    directory.mkdir()
    (directory / "mine").touch()
    assert local_sh("down", clean_environment(ARM_RAY_LOCAL_DIR=str(directory))).returncode == 0
    assert [path.name for path in directory.iterdir()] == ["mine"]

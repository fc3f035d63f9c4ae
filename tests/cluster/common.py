"""Two Ray nodes on this machine by cluster/local.sh, and jobs on them."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.builders.paths import ROOT
from tests.builders.processes import processes

LOCAL = ROOT / "cluster" / "local.sh"
BIN = Path(sys.executable).parent


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without any Ray's, and with these programs first."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ARM_RAY_"))}
    return {**env, "PATH": f"{BIN}:{env['PATH']}", **extra}


def local_sh(command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `cluster/local.sh COMMAND`."""
    return subprocess.run([LOCAL, command], env=env, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def local_cluster(directory: Path, **settings: str) -> Iterator[dict[str, str]]:
    """Have the cluster up; gives an environment in which `ray` and drivers find it."""
    env = clean_environment(ARM_RAY_LOCAL_DIR=str(directory), **settings)
    try:
        up = local_sh("up", env)
        assert up.returncode == 0, up.stdout + up.stderr
        lines = local_sh("env", env).stdout.splitlines()
        exports = [shlex.split(line)[1] for line in lines if line.startswith("export ")]
        yield {**env, **dict(text.split("=", 1) for text in exports)}
    finally:
        down = local_sh("down", env)
        assert down.returncode == 0, down.stdout + down.stderr


def submit(
    env: dict[str, str],
    *entrypoint: str,
    options: tuple[str, ...] = (),
    working_dir: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Submit a job to the cluster of this environment and wait for its end."""
    for _ in range(20):
        done = subprocess.run(
            [
                "ray",
                "job",
                "submit",
                *options,
                "--working-dir",
                str(working_dir),
                "--",
                *entrypoint,
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        # The dashboard listens a little before it knows the agent that starts jobs.
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


def processes_with(text: str) -> list[str]:
    """Command lines of this machine's processes with a text in them, or in their environment."""
    return [
        process.command
        for process in processes()
        if text in process.command or any(text.encode() in entry for entry in process.environment)
    ]

"""cluster/slurm.sh, with stand-ins for Slurm, Ray and the merge, which say what they saw.

They are on PATH before the real ones. `srun` starts its command once for each task; `ray` stays
until it gets SIGTERM; `python -m …` is the merge, and other Python runs as it is, beside a module
`ray` that counts the nodes which have started.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.builders.paths import ROOT
from tests.builders.processes import started_with

SCRIPT = ROOT / "cluster" / "slurm.sh"

SAY = """
import json, os, pathlib, signal, subprocess, sys, time
seen = pathlib.Path(os.environ["SEEN"])
def say(**what):
    with (seen / "log").open("a") as file:
        file.write(json.dumps(what) + "\\n")
"""
SCONTROL = """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(f"node-{i}" for i in range(int(os.environ["NODES"]))))
else:
    say(what="scontrol", arguments=sys.argv[1:])
"""
SRUN = """
command = list(sys.argv[1:])
options = {}
while command[0].startswith("--"):
    name, _, value = command.pop(0)[2:].partition("=")
    options[name] = value
if command[0] == "hostname":
    print("fd00::17 10.0.0.7 127.0.0.1")
    sys.exit()
say(what="srun", options=options, command=command)
tasks = [subprocess.Popen(command) for _ in range(int(options["ntasks"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
RAY = """
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
say(
    what="ray",
    arguments=sys.argv[1:],
    mode=os.environ["RAY_AUTH_MODE"],
    token=token.read_text(),
    bits=[oct(path.stat().st_mode & 0o777) for path in (token, token.parent)],
    open="RAY_AUTH_TOKEN" in os.environ,
)
def end(*_):
    say(what="ray ended", head="--head" in sys.argv)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if os.environ.get("BROKEN") == "head" and "--head" in sys.argv:
    sys.exit(1)
if os.environ.get("BROKEN") != "join":
    (seen / f"joined-{os.getpid()}").touch()
while True:
    time.sleep(0.05)
"""
MERGE = """
say(what="merge", arguments=sys.argv[1:], address=os.environ["RAY_ADDRESS"],
    nodes=len(list(seen.glob("joined-*"))))
def end(*_):
    # As a merge that still writes: it is waited for.
    time.sleep(0.5)
    say(what="merge halted")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
(seen / "merging").touch()
for _ in range(2 if os.environ["CODE"] != "wait" else 1000):
    time.sleep(0.05)
sys.exit(int(os.environ["CODE"]))
"""
COUNTING_RAY = """
import os, pathlib
initialised = False
def is_initialized():
    return initialised
def init(address, **_):
    global initialised
    assert address.startswith("10.0.0.7:"), address
    initialised = True
def nodes():
    return [{"Alive": True} for _ in pathlib.Path(os.environ["SEEN"]).glob("joined-*")]
def shutdown():
    pass
"""


class Allocation:
    """A directory with the stand-ins, and what they saw."""

    def __init__(self, root: Path) -> None:
        self.bin, self.seen, self.submitted = root / "bin", root / "seen", root / "submitted"
        for directory in (self.bin, self.seen, self.submitted, root / "modules"):
            directory.mkdir()
        (root / "modules" / "ray.py").write_text(COUNTING_RAY)
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "ray": RAY, "merge": MERGE}.items():
            self.program(name, f"#!{sys.executable}\n{SAY}{text}")
        self.program(
            "python",
            f'#!/bin/sh\nif [ "$1" = -m ]; then exec {self.bin}/merge "$@"; fi\n'
            f'PYTHONPATH={root / "modules"} exec {sys.executable} "$@"\n',
        )

    def program(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *arguments: str, nodes: int = 3, **extra: str) -> subprocess.Popen[str]:
        kept = {"HOME": os.environ["HOME"], "PATH": f"{self.bin}:{os.environ['PATH']}"}
        slurm = {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node-[0-2]",
            "SLURM_SUBMIT_DIR": str(self.submitted),
            "SLURM_CPUS_PER_TASK": "6",
            "SLURM_GPUS_ON_NODE": "4",
        }
        own = {"SEEN": str(self.seen), "NODES": str(nodes), "CODE": "0", "RAY_AUTH_TOKEN": "x"}
        return subprocess.Popen(
            [str(SCRIPT), *arguments],
            env={**kept, **slurm, **own, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def log(self, what: str | None = None) -> list[dict[str, Any]]:
        lines = (self.seen / "log").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [entry for entry in found if what in (None, entry["what"])]

    def steps(self) -> list[dict[str, Any]]:
        """What srun was asked for, in the order of the nodes."""
        return sorted(self.log("srun"), key=lambda step: str(step["options"]["nodelist"]))

    def all_gone(self) -> bool:
        """Nothing runs any more that had the stand-ins' directory in its environment."""
        left = started_with(f"SEEN={self.seen}")
        return left == [] and list(self.submitted.iterdir()) == []


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def wait_for(path: Path) -> None:
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def test_a_merge_runs_once_all_nodes_have_joined_and_everything_ends(
    allocation: Allocation,
) -> None:
    running = allocation.start("/shared/merge.yaml", "runtime.layer_shards=8", CODE="3")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 3, output
    head, workers = allocation.steps()
    assert head["options"]["nodelist"] == "node-0"
    assert workers["options"]["nodelist"] == "node-1,node-2"
    assert workers["options"]["ntasks"] == "2"
    assert head["options"]["cpus-per-task"] == "6"
    # The first address of version 4, with a port that was free.
    (port,) = [text for text in head["command"] if text.startswith("--port=")]
    address = f"10.0.0.7:{port.removeprefix('--port=')}"
    assert {"--head", "--block", "--num-cpus=6", "--temp-dir=/tmp/ray-17"} <= set(head["command"])
    assert f"--address={address}" in workers["command"]
    (merge,) = allocation.log("merge")
    expected = ["-m", "arm_ray.jobs.merge", "/shared/merge.yaml", "runtime.layer_shards=8"]
    assert merge["arguments"] == expected
    assert (merge["address"], merge["nodes"]) == (address, 3)
    assert len(allocation.log("ray ended")) == 3
    assert [entry["what"] for entry in allocation.log()].index("merge") == 5
    assert allocation.all_gone()


def test_the_token_is_in_a_file_of_the_user_alone(allocation: Allocation) -> None:
    running = allocation.start("/shared/merge.yaml")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    nodes = allocation.log("ray")
    (token,) = {node["token"] for node in nodes}
    assert len(token) == 64
    assert {tuple(node["bits"]) for node in nodes} == {("0o600", "0o700")}
    assert {node["mode"] for node in nodes} == {"token"}
    # Nor is it in what others can read.
    assert not any(node["open"] for node in nodes)
    assert token not in output
    assert all(token not in json.dumps(entry) for entry in allocation.log("srun"))


def test_evaluators_are_the_last_nodes(allocation: Allocation) -> None:
    running = allocation.start("/shared/merge.yaml", ARM_RAY_EVALUATOR_NODES="1")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    _, workers, evaluators = allocation.steps()
    assert workers["options"]["nodelist"] == "node-1"
    assert evaluators["options"]["nodelist"] == "node-2"
    assert "--resources={}" in workers["command"]
    assert '--resources={"evaluator": 4}' in evaluators["command"]


@pytest.mark.parametrize("requeue", [False, True])
def test_sigterm_reaches_the_merge_before_the_cluster_ends(
    allocation: Allocation, requeue: bool
) -> None:
    running = allocation.start("/shared/merge.yaml", CODE="wait", ARM_RAY_REQUEUE=str(int(requeue)))
    wait_for(allocation.seen / "merging")
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    after = [entry["what"] for entry in allocation.log()][5:]
    queued = ["scontrol"] if requeue else []
    assert after == ["merge", "merge halted", *queued, *["ray ended"] * 3]
    assert not requeue or allocation.log("scontrol")[0]["arguments"] == ["requeue", "17"]
    assert allocation.all_gone()


def test_sigterm_before_the_cluster_is_complete(allocation: Allocation) -> None:
    running = allocation.start("/shared/merge.yaml", BROKEN="join")
    wait_for(allocation.seen / "log")
    while len(allocation.log("ray")) < 3:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 143, output
    assert allocation.log("merge") == []
    assert allocation.all_gone()


@pytest.mark.parametrize("broken", ["join", "head"])
def test_a_cluster_that_does_not_start(allocation: Allocation, broken: str) -> None:
    running = allocation.start("/shared/merge.yaml", BROKEN=broken, ARM_RAY_JOIN_TIMEOUT_S="2")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "the cluster did not start" in output
    if broken == "join":
        assert "not complete within 2 s: 0 of 3 nodes have joined" in output
    assert allocation.log("merge") == []
    assert allocation.all_gone()


def test_what_it_refuses(allocation: Allocation) -> None:
    assert "usage: sbatch" in allocation.start().communicate(timeout=30)[0]
    outside = allocation.start("/shared/merge.yaml", SLURM_JOB_ID="")
    assert "start it with sbatch" in outside.communicate(timeout=30)[0]
    one = allocation.start("/shared/merge.yaml", nodes=1, ARM_RAY_EVALUATOR_NODES="1")
    assert "the first is the head" in one.communicate(timeout=30)[0]
    assert allocation.all_gone()


def test_it_can_be_started() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR

"""Three hosts on this machine: network namespaces with addresses and directories of their own.

Each is a Ray node of one CPU, the last of three and of a resource `engine`. `Hosts.own` is another
directory on each of them, under one path, and so is `/tmp/ray`; everything else they share, as
containers of one machine do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.builders.paths import ROOT
from tests.builders.processes import started_with
from tests.cluster.common import clean_environment, processes_with

COUNT = 3
PORT = 6379
SESSIONS = Path("/tmp/ray")
# Ray finds a node that is cut off after a few seconds, instead of half a minute.
SOON = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=check)
    return done.stdout


def why_not() -> str | None:
    """Why there can be no such hosts on this machine; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "there is no `ip` (iproute2) or `unshare` (util-linux)"
    name = f"arm{os.getpid()}try"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1")
        ip("link", "delete", f"{name}0")
        mounts = "mount --make-rprivate / && mount --bind /tmp /tmp"
        enter = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", mounts]
        subprocess.run(enter, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        return f"this machine lets no namespaces be made: {str(told).strip()}"
    finally:
        ip("netns", "delete", name, check=False)
    return None


class Hosts:
    """The hosts, and what runs on them.

    Attributes:
        own: A directory that is another one on each host.
        roots: Of each host, that directory as this process sees it.
    """

    def __init__(self, root: Path) -> None:
        self.own = root / "own"
        self.own.mkdir()
        self.roots = [root / f"host{i}" for i in range(COUNT)]
        self._sessions = [root / f"ray{i}" for i in range(COUNT)]
        for directory in (*self.roots, *self._sessions):
            directory.mkdir()
        SESSIONS.mkdir(exist_ok=True)
        tag = secrets.token_hex(2)
        self._switch = f"arm{tag}s"
        self._names = [f"arm{tag}h{i}" for i in range(COUNT)]
        self._mark = f"ARM_RAY_HOSTS={tag}{secrets.token_hex(8)}"
        token = root / "token"
        token.write_text(secrets.token_hex(32))
        self._env = clean_environment(
            **SOON,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            SPT_NOENV="1",
            # Gloo looks at what the machine's name stands for, which the hosts have in common.
            GLOO_SOCKET_IFNAME="eth0",
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            PYTHONPATH=str(ROOT),
            **dict([self._mark.split("=")]),
        )
        self._nodes: list[subprocess.Popen[str]] = []

    def address(self, host: int) -> str:
        return f"10.213.57.{host + 1}"

    @property
    def ray_address(self) -> str:
        """Where the cluster is joined."""
        return f"{self.address(0)}:{PORT}"

    def up(self) -> None:
        """Connect the hosts by a switch, and start Ray on each."""
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self._names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            wire, peer = f"port{host}", ("peer", "name", "eth0", "netns", name)
            ip("-n", self._switch, "link", "add", wire, "type", "veth", *peer)
            ip("-n", self._switch, "link", "set", wire, "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        for host in range(COUNT):
            where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
            where += ["--disable-usage-stats"]
            if host:
                where = [f"--address={self.ray_address}"]
            is_last = host == COUNT - 1
            options = [f"--node-ip-address={self.address(host)}", "--block"]
            options += (
                ["--num-cpus=3", '--resources={"engine": 3}'] if is_last else ["--num-cpus=1"]
            )
            options += ["--object-store-memory=200000000"]
            with self.log(host).open("w") as log:
                self._nodes.append(self.start(host, ["ray", "start", *where, *options], log))
            self._wait_for_node(host)

    def log(self, host: int) -> Path:
        """What `ray start` of a host said."""
        return self.own.parent / f"ray-start-{host}.log"

    def _wait_for_node(self, host: int) -> None:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in self.log(host).read_text():
            said = self.log(host).read_text()
            assert self._nodes[host].poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def start(
        self, host: int, command: Sequence[str], log: IO[str] | int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Run something on a host."""
        binds = f"mount --make-rprivate / && mount --bind {self.roots[host]} {self.own}"
        binds += f" && mount --bind {self._sessions[host]} {SESSIONS}"
        script = f'{binds} && exec "$@"'
        inside = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *inside],
            cwd=ROOT,
            env=self._env,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def merge(self, config: Path, *overrides: str) -> subprocess.Popen[str]:
        """Start `arm-ray merge` on the first host."""
        command = ["python", "-m", "arm_ray.cli", "merge", str(config), *overrides]
        return self.start(0, [*command, "--address", self.ray_address])

    def crossed(self) -> int:
        """Bytes that have come into the switch from all hosts so far."""
        total = 0
        for host in range(COUNT):
            path = f"/sys/class/net/port{host}/statistics/rx_bytes"
            read = ["netns", "exec", self._switch, "cat", path]
            total += int(ip(*read))
        return total

    def cut_off(self, host: int) -> None:
        """Pull a host's wire."""
        ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def down(self) -> None:
        """End what was started, and nothing else."""
        for signal in ("-TERM", "-KILL"):
            pids = self._processes()
            if pids:
                subprocess.run(["kill", signal, *pids], check=False, timeout=30)
            deadline = time.monotonic() + 5
            while self._processes() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        for name in (*self._names, self._switch):
            ip("netns", "delete", name, check=False)
        assert processes_with(self._mark) == []

    def _processes(self) -> list[str]:
        return [str(process.pid) for process in started_with(self._mark)]


@contextlib.contextmanager
def three_hosts(root: Path) -> Iterator[Hosts]:
    """Have the hosts up."""
    hosts = Hosts(root)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()

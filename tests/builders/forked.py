"""Runs command lines of arm-ray, each in a process of its own that has imported everything.

A server imports what commands need, and forks for each command line. So a command costs what it
does, its peak memory is told by the kernel, and what hangs is ended without harm to the others::

    with CommandServer() as server:
        ended = server.run(["merge", "merge.yaml"], cwd=tmp_path)
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builders.paths import ROOT

# Nothing that is refused takes so much time of a processor, and what waits would wait for ever.
PROCESSOR_S, LIMIT_S = 10, 60.0
# Exit codes of the child that no command has.
RAISED, WENT_ON = 70, 71
_IMPORTED = (
    "arm_ray.cli.parser",
    "arm_ray.exports.hub",
    "arm_ray.report.page.write",
    "arm_ray.runtime.attach.run",
    "arm_ray.runtime.merge.run",
    "arm_ray.runtime.pipeline",
    "arm_ray.runtime.scoring.evaluate",
    "arm_ray.runtime.study.run",
    "arm_ray.runtime.verify",
    "datasets",
    "pyarrow.parquet",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code, below zero where a signal has ended it, as it does what computes for
            long; `RAISED`: it let an exception through, whose traceback is in `err`; `WENT_ON`: it
            was not refused, and was about to start Ray; None: it did not end in time.
        out: What it printed.
        err: The same on standard error.
        peak_bytes: Most memory that it held, with all that is imported.
        grown_bytes: How much that is above what was imported.
    """

    code: int | None
    out: str
    err: str
    peak_bytes: int
    grown_bytes: int


class CommandServer:
    """The server, and the way to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.builders.forked"],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], cwd: Path, env: dict[str, str] | None = None) -> Ended:
        """Run a command line to its end, or until it has taken too long.

        Args:
            arguments: Without the program's name.
            cwd: Its working directory.
            env: Variables beside those of this process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "cwd": str(cwd), "env": env or {}}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The end of its input is the end of it.
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def _serve() -> None:
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    # Whatever a library prints while it is imported is no answer.
    os.dup2(2, 1)
    for name in _IMPORTED:
        importlib.import_module(name)
    # A child that only reads these objects does not copy them.
    import gc

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(_ended(json.loads(line))) + "\n")
        answers.flush()


def _ended(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = _resident_bytes()
        pid = os.fork()
        if pid == 0:
            _child(request, out.fileno(), err.fileno())
        code = _waited(pid)
        _, status, used = os.wait4(pid, 0)
        peak = used.ru_maxrss * 1024
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {
        "code": os.waitstatus_to_exitcode(status) if code else None,
        "out": texts[0],
        "err": texts[1],
        "peak_bytes": peak,
        "grown_bytes": max(0, peak - before),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _waited(pid: int) -> bool:
    """Whether a child ends in time; it is ended, with all that it started, where it does not."""
    descriptor = os.pidfd_open(pid)
    try:
        ended = bool(select.select([descriptor], [], [], LIMIT_S)[0])
    finally:
        os.close(descriptor)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    return ended


def _child(request: dict[str, Any], out: int, err: int) -> None:
    code = RAISED
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S + 5))
        nowhere = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nowhere, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        code = _run(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    import ray

    import arm_ray.runtime.merge.run
    from arm_ray import cli

    def refuse(*_: object, **__: object) -> None:
        print("Ray is about to start", file=sys.stderr, flush=True)
        os._exit(WENT_ON)

    vars(ray)["init"] = refuse
    vars(arm_ray.runtime.merge.run)["is_up_or_named"] = lambda _address: False
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


if __name__ == "__main__":
    _serve()

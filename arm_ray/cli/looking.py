"""Commands that look at runs, and change nothing of them: report, status, serve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from arm_ray.cli.options import Commands, add_command, count
from arm_ray.errors import ConfigError
from arm_ray.storage.urls import is_url, plain_path

_REPORT = (
    "arm-ray report runs/merge",
    "arm-ray report runs/arm runs/ties --output compared.html",
)
_STATUS = (
    "arm-ray status runs/merge",
    "arm-ray status runs/merge --watch",
    "arm-ray status --address http://10.0.0.1:8265 --json",
)
_SERVE = ("arm-ray serve runs/merge", "arm-ray serve runs/merge --port 8080")


def add_to(commands: Commands) -> None:
    """Add the commands."""
    report = add_command(commands, "report", _report, "a run as one HTML page", _REPORT)
    report.add_argument("runs", nargs="+", metavar="RUN_DIR", help="several are compared")
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the first directory"
    )
    status = add_command(commands, "status", _status, "how a run stands", _STATUS)
    status.add_argument("path", nargs="?", metavar="RUN_DIR")
    status.add_argument(
        "--address", help="Ray cluster (HOST:6379) or its dashboard (http://HOST:8265)"
    )
    status.add_argument("--watch", action="store_true", help="say it again every 2 s, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print JSON")
    serve = add_command(commands, "serve", _serve, "a run's report in the browser, live", _SERVE)
    serve.add_argument("path", metavar="RUN_DIR")
    serve.add_argument("--port", type=count, default=0, metavar="N", help="default: a free one")


def _report(options: argparse.Namespace) -> int:
    """Write what runs have come to as one HTML page, which needs no network; several are compared.

    A run that is not finished, or lacks files, is shown as far as it goes.
    """
    from arm_ray.report.page.write import write_report

    output = None if options.output is None else Path(options.output)
    print(write_report([_run_directory(run) for run in options.runs], output))
    return 0


def _status(options: argparse.Namespace) -> int:
    """Say how a run stands, from its directory, or what of ours runs in a Ray cluster.

    The exit code is 1 where the run has failed, or the directory holds none.
    """
    if (options.path is None) == (options.address is None):
        raise ConfigError(
            "there is not one thing to tell the status of",
            where="command line",
            got="both" if options.path else "neither RUN_DIR nor --address",
            expected="RUN_DIR or --address",
        )
    import time

    while True:
        told, code = _status_text(options)
        # From the top left, and what is below goes.
        print(f"\033[H\033[J{told}" if options.watch and sys.stdout.isatty() else told, flush=True)
        if not options.watch:
            return code
        time.sleep(2.0)


def _run_directory(given: str) -> Path:
    """The directory of a run that is looked at."""
    if is_url(given):
        from arm_ray.secrets import hidden

        raise ConfigError(
            "a run at a URL is not looked at from here",
            where=hidden(given),
            expected="a directory",
            hint="its report.html is there; or copy events.jsonl, config.yaml and evaluation/",
        )
    return Path(plain_path(given))


def _status_text(options: argparse.Namespace) -> tuple[str, int]:
    import json

    from arm_ray.report.status import lines_of, status_of

    if options.path is not None:
        status = status_of(_run_directory(options.path))
        code = 1 if status.state in ("failed", "foreign") else 0
        if options.json:
            return json.dumps(status.to_dict(), indent=None if options.watch else 2), code
        return "\n".join(lines_of(status)), code
    import dataclasses

    from arm_ray.runtime.cluster.jobs import jobs_of

    found, lines = [], []
    for job in jobs_of(options.address):
        entry: dict[str, Any] = dataclasses.asdict(job)
        lines.append(f"{job.job} {job.output}: {job.state} ({job.id}, arm_ray {job.version})")
        if job.output and Path(job.output).is_dir():
            status = status_of(Path(job.output), is_running=job.state == "RUNNING")
            entry["run"] = status.to_dict()
            lines += [f"  {line}" for line in lines_of(status)]
        elif job.output:
            lines.append("  its directory cannot be seen from here")
        found.append(entry)
    if options.json:
        return json.dumps(found, indent=None if options.watch else 2), 0
    return "\n".join(lines) or "no job of arm_ray is known there", 0


def _serve(options: argparse.Namespace) -> int:
    """Show a run's report in the browser of this machine, refreshed as events come."""
    from arm_ray.report.run_record import open_record
    from arm_ray.report.serving import PageServer

    run = open_record(_run_directory(options.path)).path
    with PageServer(run, options.port) as server:
        try:
            print(f"{server.url} shows {run}; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
    return 0

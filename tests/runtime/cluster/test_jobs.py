"""What of ours runs in a cluster, as Ray's list of jobs tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arm_ray import cli
from arm_ray.errors import WorkerError
from arm_ray.runtime.cluster.jobs import ClusterJob, jobs_of
from tests.builders.paths import ROOT
from tests.builders.runs import keep_events, merge_run


@dataclass
class Details:
    """What Ray's client says of a job."""

    metadata: dict[str, str] | None
    status: str = "RUNNING"
    submission_id: str | None = None
    job_id: str | None = "01000000"
    start_time: int | None = 5000


class Client:
    """Stands for Ray's client of the dashboard."""

    jobs: list[Details] = []  # noqa: RUF012

    def __init__(self, address: str) -> None:
        assert address == "http://head:8265"

    def list_jobs(self) -> list[Details]:
        return self.jobs


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Details]:
    import ray.job_submission

    found: list[Details] = []
    monkeypatch.setattr(Client, "jobs", found)
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
    return found


def test_jobs_of_ours_are_known_by_their_metadata(jobs: list[Details]) -> None:
    ours = {"arm_ray": "0.1.0", "job": "merge", "output": "/out"}
    jobs += [
        Details(ours, submission_id="raysubmit_1", start_time=9000),
        Details({"owner": "somebody"}),
        Details(None),
        Details({**ours, "job": "attach"}, status="SUCCEEDED", start_time=None),
    ]
    assert jobs_of("http://head:8265") == [
        ClusterJob("01000000", "attach", "/out", "SUCCEEDED", None, "0.1.0"),
        ClusterJob("raysubmit_1", "merge", "/out", "RUNNING", 9.0, "0.1.0"),
    ]


def test_the_command_tells_of_the_run_where_it_can_be_seen(
    jobs: list[Details], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["status", "--address", "http://head:8265"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "no job of arm_ray is known there\n"
    run = merge_run(tmp_path)
    for output in (str(run), "/elsewhere/run"):
        jobs.append(Details({"arm_ray": "0.1.0", "job": "merge", "output": output}))
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"merge {run}: RUNNING (01000000, arm_ray 0.1.0)"
    assert "    finished" in lines
    assert lines[-2:] == [
        "merge /elsewhere/run: RUNNING (01000000, arm_ray 0.1.0)",
        "  its directory cannot be seen from here",
    ]
    assert cli.main([*arguments, "--json"]) == 0
    told: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [entry.get("run", {}).get("state") for entry in told] == ["finished", None]


def test_a_run_of_another_machine_runs_if_the_cluster_says_so(
    jobs: list[Details], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = merge_run(tmp_path)
    ended = ("run_finished", "model_written")
    keep_events(run, lambda e: None if e["event"] in ended else e)
    details = Details({"arm_ray": "0.1.0", "job": "merge", "output": str(run)})
    jobs.append(details)
    for state, told in (("RUNNING", "running, as its cluster says"), ("FAILED", "not finished")):
        details.status = state
        assert cli.main(["status", "--address", "http://head:8265"]) == 0
        assert capsys.readouterr().out.splitlines()[2].strip().startswith(told)


@pytest.mark.processes
@pytest.mark.minutes
def test_a_job_of_a_real_cluster_is_found_by_both_addresses(tmp_path: Path) -> None:
    program = """
import sys, ray
from arm_ray.runtime.cluster.jobs import jobs_of
from ray.job_config import JobConfig
about = {"arm_ray": "0.1.0", "job": "merge", "output": "/out"}
here = ray.init(address="local", include_dashboard=True, num_cpus=1, log_to_driver=False,
                job_config=JobConfig(metadata=about))
for address in ("http://" + here.address_info["webui_url"], here.address_info["gcs_address"]):
    print("found", *[(job.job, job.output, job.state) for job in jobs_of(address)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert found == ["found ('merge', '/out', 'RUNNING')"] * 2, done.stderr


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with pytest.raises(WorkerError, match="cannot be listed"):
        jobs_of("http://127.0.0.1:1")

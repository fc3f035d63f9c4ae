"""What of ours runs in a Ray cluster, as Ray's list of jobs tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arm_ray.errors import WorkerError


@dataclass(frozen=True)
class ClusterJob:
    """A job of arm_ray in a cluster.

    Attributes:
        id: Of the job, as Ray names it.
        job: `merge`, `evaluate`, `pipeline`, `study` or `attach`.
        output: Its output directory, on the machine where it runs.
        state: `RUNNING`, `SUCCEEDED`, `FAILED`, `STOPPED` or `PENDING`, as Ray says.
        started: Seconds since 1970; None: not yet.
        version: Of arm_ray.
    """

    id: str
    job: str
    output: str
    state: str
    started: float | None
    version: str


def jobs_of(address: str) -> list[ClusterJob]:
    """The jobs of arm_ray that a cluster knows, the newest last.

    Jobs say with `JobConfig.metadata` that they are ours (`ray_session`).

    Args:
        address: Of Ray (`HOST:6379`), or of its dashboard (`http://HOST:8265`).

    Raises:
        WorkerError: The cluster's list of jobs cannot be read.
    """
    try:
        from ray.job_submission import JobSubmissionClient

        listed = JobSubmissionClient(address).list_jobs()
    except Exception as error:  # of Ray's client and of HTTP: many types
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise WorkerError(
            "the jobs of the cluster cannot be listed",
            where=address,
            got=text,
            expected="a Ray cluster with its dashboard, which has the list",
            hint="check the address; of the dashboard it begins with http:// and is at port 8265 "
            "mostly; or run arm-ray status RUN_DIR where the directory can be seen",
        ) from None
    jobs = [found for details in listed if (found := _ours(details)) is not None]
    return sorted(jobs, key=lambda job: job.started or 0.0)


def _ours(details: Any) -> ClusterJob | None:
    metadata: Mapping[str, str] = details.metadata or {}
    if "arm_ray" not in metadata:
        return None
    state = getattr(details.status, "value", details.status)
    return ClusterJob(
        str(details.submission_id or details.job_id),
        metadata.get("job", "unknown"),
        metadata.get("output", ""),
        str(state),
        None if not details.start_time else details.start_time / 1000.0,
        metadata["arm_ray"],
    )

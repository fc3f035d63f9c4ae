"""Joining Ray, or starting one that ends with us."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arm_ray
from arm_ray.errors import ConfigError, WorkerError
from arm_ray.lazy import ray_is_joined
from arm_ray.noise import is_verbose
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.lazy_ray import ray

NAMESPACE = "arm_ray"


@dataclass(frozen=True)
class _KeptRay:
    """See `ray_kept`."""

    stack: contextlib.ExitStack
    slots: int
    about: Mapping[str, str]


_kept: _KeptRay | None = None


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def outliving(path: str | Path, key: str = "output") -> Path:
    """A path that is there when a submitted job is over, whose working directory is a copy.

    Args:
        path: As it is configured.
        key: Under which key.

    Raises:
        ConfigError: It is relative, and this is such a job.
    """
    expanded = Path(path).expanduser()
    if in_submitted_job() and not expanded.is_absolute():
        raise ConfigError(
            f"the {key} of a submitted job is a relative path",
            where=key,
            got=path,
            expected="an absolute path, on storage that outlives the job",
            hint="the job runs in a temporary copy of its working directory",
        )
    return expanded


def is_up_or_named(address: str | None) -> bool:
    """Whether Ray runs already, or a cluster is named that is to be joined."""
    is_named = bool(address or os.environ.get("RAY_ADDRESS")) or in_submitted_job()
    return is_named or _kept is not None or ray_is_joined()


@contextlib.contextmanager
def ray_session(
    address: str | None, cpu_slots: int, about: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Have Ray available: as it is, by joining a cluster, or by starting one that ends with us.

    Args:
        address: Address of a cluster; None takes RAY_ADDRESS, and without that starts a local Ray.
        cpu_slots: CPU slots of a Ray that is started here.
        about: What runs, for the dashboard's list of jobs: `job`, `output`.

    Raises:
        WorkerError: The cluster cannot be joined.
    """
    if ray_is_joined():
        yield
        return
    if _kept is not None:
        # Stays up for whoever comes next.
        slots = max(cpu_slots, _kept.slots)
        _kept.stack.enter_context(_joined_or_started(address, slots, _kept.about))
        yield
        return
    with _joined_or_started(address, cpu_slots, about):
        yield


@contextlib.contextmanager
def ray_kept(cpu_slots: int, about: Mapping[str, str]) -> Iterator[None]:
    """Have the Ray of the first `ray_session` within the context stay up until the context ends.

    So a job of several stages starts Ray once, and not at all where nothing is left to do.

    Args:
        cpu_slots: CPU slots that a Ray that is started here has at least.
        about: What runs, as for `ray_session`; it takes the place of what the stages say.
    """
    global _kept
    with contextlib.ExitStack() as stack:
        _kept = _KeptRay(stack, cpu_slots, about)
        try:
            yield
        finally:
            _kept = None


@contextlib.contextmanager
def _joined_or_started(
    address: str | None, cpu_slots: int, about: Mapping[str, str] | None
) -> Iterator[None]:
    address = address or os.environ.get("RAY_ADDRESS")
    metadata = {"arm_ray": arm_ray.__version__, **(about or {})}
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": is_verbose(),
        "job_config": ray.job_config.JobConfig(metadata=metadata),
    }
    if address:
        # Inside a submitted job the workers have the job's working directory; elsewhere they are
        # given the package, so that a cluster needs only our dependencies.
        if not in_submitted_job():
            options["runtime_env"] = {"py_modules": [str(Path(arm_ray.__file__).parent)]}
        options["address"] = address
    else:
        # "local", because a bare init would join whatever an old address file names.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpu_slots}
    try:
        with activity("joining Ray" if address else "starting Ray"), _own_sigterm():
            level = logging.INFO if is_verbose() else logging.ERROR
            ray.init(logging_level=level, **options)
    except Exception as error:  # connection, version and authentication errors of many types
        raise _not_joined(address, error) from None
    try:
        yield
    finally:
        with activity("leaving Ray" if address else "ending Ray"):
            ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what SIGTERM does in this process, where it does something: Ray sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    is_ours = callable(before) and threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:
        # Of Ray's handler, while it starts.
        if not is_ours:
            raise
        raise KeyboardInterrupt from None
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, before)


def _not_joined(address: str | None, error: Exception) -> WorkerError:
    got = f"{type(error).__name__}: {error}"
    ours = f"Ray {ray.__version__}, Python {platform.python_version()}"
    if address is None:
        return WorkerError("a local Ray cannot be started", where="this machine", got=got)
    if "ersion mismatch" in got:
        # Ray's own text says what the cluster has.
        return WorkerError(
            "the cluster runs another version of Ray or Python",
            where=address,
            got=" ".join(got.split()),
            expected=f"what this process runs: {ours}",
            hint="install the cluster's versions here, or submit a job, which runs with its own",
        )
    return WorkerError(
        "Ray cannot be joined",
        where=address,
        got=got,
        expected=f"a running cluster with {ours}",
        hint="check the address (of Ray, port 6379 mostly, not of the dashboard), that the cluster "
        "runs, that this machine reaches it, and its token (RAY_AUTH_TOKEN)",
    )

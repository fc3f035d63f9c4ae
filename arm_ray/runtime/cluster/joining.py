"""Joining Ray, or starting one that ends with us."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arm_ray
from arm_ray.errors import ConfigError, WorkerError
from arm_ray.lazy import ray_is_joined
from arm_ray.noise import is_verbose
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.session.lazy_ray import ray

if TYPE_CHECKING:
    from arm_ray.config import RuntimeConfig

NAMESPACE = "arm_ray"


@dataclass(frozen=True)
class _KeptRay:
    """See `ray_kept`."""

    stack: contextlib.ExitStack
    slots: int
    about: Mapping[str, str]


_kept: _KeptRay | None = None


class _EarlyRay:
    """A local Ray that starts in a thread of its own.

    The thread goes on until Ray has ended: Linux ends Ray's processes with the thread that has
    started them.
    """

    def __init__(self, cpu_slots: int, about: Mapping[str, str]) -> None:
        self.slots = cpu_slots
        self._error: Exception | None = None
        self._is_up, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(cpu_slots, about), name="early Ray", daemon=True
        )
        self._thread.start()

    def _run(self, cpu_slots: int, about: Mapping[str, str]) -> None:
        try:
            _start_ray(None, cpu_slots, about)
        except Exception as error:
            self._error = error
        finally:
            self._is_up.set()
        self._is_over.wait()

    def wait(self) -> None:
        """Wait until it is up.

        Raises:
            Exception: Ray's own, where it did not start.
        """
        self._is_up.wait()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """End it, once it has started or failed to."""
        self._is_up.wait()
        ray.shutdown()
        self._is_over.set()
        self._thread.join()


_early: _EarlyRay | None = None


def start_ray_early(cpu_slots: int, about: Mapping[str, str]) -> None:
    """Start the local Ray of the first `ray_session` now, without waiting for it.

    It takes some seconds, in which inputs can be checked. Only in a process of our own, where
    `end_unused_ray` is called at its end.

    Args:
        cpu_slots: As for `ray_session`.
        about: As for `ray_session`.
    """
    global _early
    if _early is None and not ray_is_joined():
        _early = _EarlyRay(cpu_slots, about)


def end_unused_ray() -> None:
    """End a Ray that was started early and that no `ray_session` has taken."""
    global _early
    if _early is not None:
        _early.end()
        _early = None


def local_slots(runtime: RuntimeConfig, num_groups: int) -> int:
    """CPU slots that a local Ray needs for the layer shards: at least one for each core."""
    shards = 1 if runtime.layer_shards == "auto" else min(runtime.layer_shards, num_groups)
    return max(os.cpu_count() or 1, shards * runtime.threads)


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
    if _early is None and ray_is_joined():
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
    global _early
    address = address or os.environ.get("RAY_ADDRESS")
    early, _early = _early, None
    if early is not None and (address or early.slots < cpu_slots):
        early.end()
        early = None
    with contextlib.ExitStack() as stack:
        try:
            with activity("joining Ray" if address else "starting Ray"):
                if early is None:
                    _start_ray(address, cpu_slots, about)
                    stack.callback(_end, address, ray.shutdown)
                else:
                    # Also where the wait is interrupted.
                    stack.callback(_end, address, early.end)
                    early.wait()
        except Exception as error:  # connection, version and authentication errors of many types
            raise _not_joined(address, error) from None
        yield


def _end(address: str | None, end: Callable[[], None]) -> None:
    with activity("leaving Ray" if address else "ending Ray"):
        end()


def _start_ray(address: str | None, cpu_slots: int, about: Mapping[str, str] | None) -> None:
    """Join a cluster, or start a local Ray."""
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
    with _own_sigterm():
        level = logging.INFO if is_verbose() else logging.ERROR
        ray.init(logging_level=level, **options)


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

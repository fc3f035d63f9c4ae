"""Joining or starting Ray, and placing the layer shards on it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import arm_ray
from arm_ray.config import RuntimeConfig
from arm_ray.errors import ConfigError, PlacementError, WorkerError
from arm_ray.runtime.layer_shard import LayerShard, ShardSpec

NAMESPACE = "arm_ray"


@dataclass(frozen=True)
class Placement:
    """How many shards there are, and on what."""

    num_shards: int
    device: str


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextlib.contextmanager
def ray_session(runtime: RuntimeConfig, address: str | None, num_groups: int) -> Iterator[None]:
    """Have Ray available: as it is, by joining a cluster, or by starting one that ends with us.

    Args:
        runtime: For the number of CPU slots of a Ray that is started here.
        address: Address of a cluster; None takes RAY_ADDRESS, and without that starts a local Ray.
        num_groups: Most shards that there can be.

    Raises:
        WorkerError: The cluster cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False}
    if address:
        # Inside a submitted job the workers have the job's working directory; elsewhere they are
        # given the package, so that a cluster needs only our dependencies.
        if not in_submitted_job():
            options["runtime_env"] = {"py_modules": [str(Path(arm_ray.__file__).parent)]}
        options["address"] = address
    else:
        cores = os.cpu_count() or 1
        shards = 1 if runtime.layer_shards == "auto" else min(runtime.layer_shards, num_groups)
        # "local", because a bare init would join whatever an old address file names.
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = max(cores, shards * runtime.threads)
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except Exception as error:  # connection, version and authentication errors of many types
        raise WorkerError(
            "Ray cannot be joined" if address else "a local Ray cannot be started",
            where=address or "this machine",
            got=f"{type(error).__name__}: {error}",
            hint="check the address, that the cluster runs, and that its Ray and Python versions "
            "are ours",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def plan_placement(runtime: RuntimeConfig, num_groups: int) -> Placement:
    """Decide on the device and the number of shards from what the cluster has.

    Raises:
        ConfigError: More shards were asked for than there are layer groups.
        PlacementError: The cluster has no GPU, but one was asked for.
    """
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0)
    device = runtime.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < runtime.gpus_per_shard:
        raise PlacementError(
            "the cluster has no GPU for a layer shard",
            got=_format(resources),
            expected=f"{runtime.gpus_per_shard:g} GPU for each shard",
            hint="set runtime.device to cpu, or join a cluster with GPUs",
        )
    if runtime.layer_shards != "auto":
        if runtime.layer_shards > num_groups:
            raise ConfigError(
                "there are more layer shards than layer groups",
                where="runtime.layer_shards",
                got=runtime.layer_shards,
                expected=f"at most {num_groups}",
                hint="use fewer shards, or a smaller runtime.layers_per_group",
            )
        return Placement(runtime.layer_shards, device)
    if device == "cuda":
        slots = int(gpus / runtime.gpus_per_shard)
    else:
        slots = int(resources.get("CPU", 1) / runtime.threads)
    return Placement(max(1, min(slots, num_groups)), device)


def place_shards(specs: Sequence[ShardSpec], runtime: RuntimeConfig) -> list[Any]:
    """Make one actor for each shard, spread over the nodes, and wait until all run.

    Returns:
        The actor handles, in the order of the layers.

    Raises:
        PlacementError: The cluster does not give the resources in time; says what was asked and
            what there is.
    """
    resources: dict[str, float] = {"num_cpus": runtime.threads}
    if specs[0].device == "cuda":
        resources["num_gpus"] = runtime.gpus_per_shard
    # cuBLAS is deterministic only with a workspace of fixed size.
    env = {"OMP_NUM_THREADS": str(runtime.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    actor_class = ray.remote(LayerShard).options(
        **resources, scheduling_strategy="SPREAD", runtime_env={"env_vars": env}
    )
    # The handles have methods that Ray makes at run time, which no type describes.
    actors: list[Any] = [actor_class.remote(spec) for spec in specs]
    try:
        pending = [actor.ready.remote() for actor in actors]
        done, waiting = ray.wait(
            pending, num_returns=len(pending), timeout=runtime.placement_timeout_s
        )
        if waiting:
            raise PlacementError(
                f"{len(waiting)} of {len(specs)} layer shards were not placed within "
                f"{runtime.placement_timeout_s:g} s",
                got=f"free: {_format(ray.available_resources())}; "
                f"in all: {_format(ray.cluster_resources())}",
                expected=f"{len(specs)} times {_format(resources)}",
                hint="use fewer runtime.layer_shards, wait for other jobs, or add nodes",
            )
        ray.get(done)
    except BaseException:
        end_actors(actors)
        raise
    return actors


def end_actors(actors: Sequence[Any]) -> None:
    """End actors at once; those that are gone already are passed over."""
    for actor in actors:
        with contextlib.suppress(RayError):
            ray.kill(actor)


def _format(resources: dict[str, float]) -> str:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    shown = [
        f"{value:g} {names.get(key, key)}"
        for key, value in sorted(resources.items())
        if names.get(key, key) in ("CPU", "GPU")
    ]
    return ", ".join(shown) or "nothing"

"""The workers of a training on Ray Train: how many, and what runs in them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.errors import ArmRayError, ConfigError, PlacementError, WorkerError
from arm_ray.noise import quiet_environment, verbose_environment
from arm_ray.report.scalars import Record
from arm_ray.runtime.cluster.calls import put
from arm_ray.runtime.cluster.nodes import view_of_cluster
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.train.log import LogFollower
from arm_ray.runtime.train.prepare import Prepared
from arm_ray.training import memory
from arm_ray.training.config import TrainingConfig, batch_problems
from arm_ray.training.records import read_error

_SCRATCH = ".ray_train"
_ERROR_NAME = "error.json"


@dataclass(frozen=True)
class Workers:
    """How many workers there are, where, and with how many threads."""

    count: int
    device: str
    cpus: int


def local_slots(config: TrainingConfig) -> int:
    """CPU slots that a Ray that is started for the training has: at least one for each core."""
    runtime, cores = config.runtime, os.cpu_count() or 1
    workers = 1 if runtime.workers == "auto" else runtime.workers
    each = 1 if runtime.cpus_per_worker == "auto" else runtime.cpus_per_worker
    return max(cores, workers * each)


def plan_workers(config: TrainingConfig) -> Workers:
    """Decide on device and workers from what the cluster has.

    Raises:
        PlacementError: The cluster lacks GPUs or CPU slots.
        ConfigError: The batch cannot be shared by so many workers.
    """
    runtime, resources = config.runtime, ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    device = runtime.device if runtime.device != "auto" else ("cuda" if gpus else "cpu")
    on_gpu = device == "cuda"
    count = runtime.workers if runtime.workers != "auto" else (max(gpus, 1) if on_gpu else 1)
    problems = batch_problems(config, count)
    if problems:
        raise ConfigError(
            "\n".join(["the batch cannot be shared", *(f"  - {text}" for text in problems)]),
            where="batch_size, micro_batch_size, runtime.workers",
        )
    if runtime.zero_stage == 3 and not on_gpu and config.precision == "bfloat16":
        raise ConfigError(
            "ZeRO-3 on CPUs trains in float32 only",
            where="precision",
            got=config.precision,
            expected="float32, or GPUs, or runtime.zero_stage: 0",
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = 1
    if runtime.cpus_per_worker != "auto":
        cpus = runtime.cpus_per_worker
    elif not on_gpu:
        most = max(int(node.get("CPU", 0)) for node in nodes)
        # Slots may be more than cores, which is all that threads can use.
        cores = min(most, os.cpu_count() or 1) if len(nodes) == 1 else most
        cpus = max(1, cores // -(-count // len(nodes)))
    need = {"CPU": count * cpus, "GPU": count if on_gpu else 0}
    if any(resources.get(name, 0.0) < value for name, value in need.items()):
        raise PlacementError(
            "the cluster cannot hold the workers",
            got=str(view_of_cluster()),
            expected=f"{count} workers of {cpus} CPU" + (" and 1 GPU" if on_gpu else ""),
            hint="use fewer runtime.workers or cpus_per_worker, or add nodes",
        )
    return Workers(count, device, cpus)


def check_host(config: TrainingConfig, model: Path, workers: Workers, prepared: Prepared) -> None:
    """Refuse at once what each worker would refuse after its start."""
    share = config.batch_size // workers.count
    micro = share if config.micro_batch_size == "auto" else config.micro_batch_size
    if getattr(config, "packing", False):
        micro = 1
    needed = memory.estimate(
        model, config, workers=workers.count, micro_batch=micro, length=prepared.length
    )
    memory.check(needed, config, free=memory.free_host_bytes(), sharing=workers.count)


def fit(
    config: TrainingConfig,
    kind: str,
    model: Path,
    prepared: Prepared,
    saves: list[int],
    workers: Workers,
    reporter: Reporter,
    took_step: Callable[[Record], None],
) -> None:
    """Run the workers until the last step of the session.

    Raises:
        ArmRayError: What a worker raised.
        WorkerError: Workers were lost more often than `runtime.max_failures`.
    """
    from arm_ray.training.trainer import TrainingJob

    with _scratch(config.output) as scratch:
        job = TrainingJob(
            config, model, config.output, scratch, workers.device, prepared.steps, tuple(saves),
            prepared.length, workers.cpus,
        )  # fmt: skip
        settings = {"kind": kind, "job": job, "payload": [put(prepared.payload)]}
        work = on_ray_train(settings, workers, config.runtime.max_failures)
        follower = LogFollower(config, saves, scratch, reporter, took_step)
        error = follower.wait_for(work)
        if error is not None:
            raise read_error(scratch / _ERROR_NAME) or _lost(error, config)


def on_ray_train(
    settings: Mapping[str, Any], workers: Workers, max_failures: int
) -> Callable[[], Any]:
    """What runs `run_worker` in all workers, and again from the last checkpoint after a loss.

    Args:
        settings: What `run_worker` is called with.
        workers: How many there are, and where.
        max_failures: How often lost workers are replaced.
    """
    # Older releases have both versions of Ray Train.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # The types that mypy sees are those of the first version.
    make_run: Any = RunConfig
    on_gpu = workers.device == "cuda"
    resources: dict[str, float] = {"CPU": float(workers.cpus)}
    if on_gpu:
        resources["GPU"] = 1.0
    trainer: Any = TorchTrainer(
        run_worker,
        train_loop_config=dict(settings),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=on_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=make_run(
            name="run",
            storage_path=str(settings["job"].scratch),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": str(workers.cpus),
                    "MKL_NUM_THREADS": str(workers.cpus),
                    "TOKENIZERS_PARALLELISM": "false",
                    "RAY_TRAIN_V2_ENABLED": "1",
                    **quiet_environment(),
                    **verbose_environment(),
                }
            },
        ),
    )
    return lambda: trainer.fit()


def run_worker(settings: Mapping[str, Any]) -> None:
    """The training function of a Ray Train worker."""
    from arm_ray.training.records import write_error

    job = settings["job"]
    error_file = job.scratch / _ERROR_NAME
    earlier = read_error(error_file)
    if earlier is not None:
        # Ray Train tries again whatever the error was; what is the input's fault stays wrong.
        raise earlier
    payload = ray.get(settings["payload"][0])
    try:
        if settings["kind"] == "sft":
            from arm_ray.training.sft_worker import train_sft

            train_sft(job, payload)
        else:
            from arm_ray.training.grpo_worker import train_grpo

            train_grpo(job, payload)
    except ArmRayError as error:
        write_error(error_file, error)
        raise


def _lost(error: BaseException, config: TrainingConfig) -> WorkerError:
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, first = min(failures.items())
    lines = [line for line in str(first).strip().splitlines() if line.strip()]
    return WorkerError(
        "the training workers failed",
        where=f"worker {rank}",
        got=lines[-1].strip() if lines else type(first).__name__,
        expected=f"at most {config.runtime.max_failures} failures (runtime.max_failures)",
        hint="run the same command again to go on from the last complete checkpoint; out of "
        "memory shows as a killed worker: lower micro_batch_size",
    )


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A directory of this session for what Ray Train and the workers leave; removed afterwards."""
    parent = output / _SCRATCH
    parent.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        # Another session's may be there.
        if not any(parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)

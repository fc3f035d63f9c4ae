"""Training on Ray Train: checks the inputs, starts the workers, shows what they do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

import arm_ray
from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.checkpoints.huggingface import open_checkpoint, resolve_path
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.config import read_yaml
from arm_ray.errors import (
    ArmRayError,
    ConfigError,
    PlacementError,
    RunDirectoryError,
    WorkerError,
)
from arm_ray.events import EventLog, RunFailed
from arm_ray.report.scalars import TRAINING_STEP, Record
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.joining import outliving, ray_session
from arm_ray.runtime.cluster.nodes import view_of_cluster
from arm_ray.runtime.output.claim import CONFIG_NAME, claimed, holds_earlier, write_config
from arm_ray.runtime.output.precision import recorded, settle, units_of
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.progress import LINE_INTERVAL_S, duration, print_summary
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.training import memory
from arm_ray.training.config import (
    GrpoConfig,
    SftConfig,
    TrainingConfig,
    batch_problems,
    parse_training_config,
)
from arm_ray.training.data import encode_rows, layout_of, make_stream, question_of, read_data
from arm_ray.training.records import (
    LOG_NAME,
    TrainingFinished,
    TrainingStarted,
    is_complete,
    missing_saves,
    read_error,
    read_log,
    resume_point,
)
from arm_ray.training.split import keep_apart

EVENTS_NAME = "events.jsonl"
DATA_NAME = "data.json"
_SCRATCH = ".ray_train"
_POLL_S = 0.5
_ERROR_NAME = "error.json"


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is started: see `run_sft`."""

    payload: Any
    digest: str
    rows: int
    kept: int
    steps: int
    length: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Workers:
    """How many workers there are, where, and with how many threads."""

    count: int
    device: str
    cpus: int


def run_sft(
    config: SftConfig, *, address: str | None = None, console: Console | None = None
) -> list[Path]:
    """Fine-tune a model as configured, or go on with the run in its output directory.

    Args:
        config: The configuration.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error.

    Returns:
        The checkpoint directories that there are at the end, by step.

    Raises:
        ArmRayError: Any of its kinds. Checkpoints that are complete stay and are used again.
    """
    return _run(config, "sft", _prepare_sft, address, console)


def run_grpo(
    config: GrpoConfig, *, address: str | None = None, console: Console | None = None
) -> list[Path]:
    """Train a model by GRPO as configured, or go on; as `run_sft`."""
    return _run(config, "grpo", _prepare_grpo, address, console)


def _prepare_sft(config: SftConfig, model: Path) -> _Prepared:
    tokenizer = load_tokenizer(str(model))
    rows, columns = read_data(config.data)
    layout = layout_of(config.data, columns)
    questions = [question_of(row, layout) for _, row in rows]
    rows, notes = keep_apart(rows, questions, config.apart_from, config.on_overlap)
    encoded, report = encode_rows(
        tokenizer,
        rows,
        layout,
        max_length=config.max_length,
        too_long=config.too_long,
        where=config.data.path,
    )
    if report.too_long:
        what = "cut" if config.too_long == "cut" else "dropped"
        notes.append(
            f"{report.too_long} of {report.rows} rows have more than {config.max_length} tokens: "
            f"{what}"
        )
    if report.without_labels:
        notes.append(
            f"{report.without_labels} of {report.rows} rows dropped: nothing in them carries loss "
            f"within {config.max_length} tokens"
        )
    stream = make_stream(
        encoded,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        epochs=config.epochs,
        pack_to=config.max_length if config.packing else None,
    )
    digest = hashlib.sha256()
    for part in (encoded.ids, encoded.is_label, encoded.starts):
        digest.update(np.ascontiguousarray(part).tobytes())
    return _Prepared(
        stream,
        digest.hexdigest(),
        report.rows,
        report.kept,
        len(stream) // config.batch_size,
        int(config.max_length if config.packing else encoded.lengths.max()),
        tuple(notes),
    )


def _prepare_grpo(config: GrpoConfig, model: Path) -> _Prepared:
    from arm_ray.training.grpo_data import prepare_prompts

    tokenizer = load_tokenizer(str(model))
    prompts = prepare_prompts(config, tokenizer)
    count = len(prompts.rows)
    steps = config.steps
    if steps is None:
        per_step = config.batch_size // config.num_generations
        steps = max(1, int(np.ceil(count * (config.epochs or 1.0) / per_step - 1e-9)))
    return _Prepared(
        prompts.rows,
        hashlib.sha256(json.dumps(prompts.rows, default=str).encode()).hexdigest(),
        prompts.read,
        count,
        steps,
        prompts.longest + config.max_completion_length,
        prompts.notes,
    )


def _run(
    config: Any,
    kind: str,
    prepare: Callable[[Any, Path], _Prepared],
    address: str | None,
    console: Console | None,
) -> list[Path]:
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    config = _absolute(config)
    asked, began = config.precision, _began_with(config.output)
    config = _as_begun(config)
    check_installed(config.tracking)

    with heartbeat(reporter.console), activity("reading the training data"):
        model = open_checkpoint(resolve_path(config.model)).path
        prepared = prepare(config, model)
    output: Path = config.output
    # Before anything is written.
    saves = config.session_saves(prepared.steps)
    _claim(output, config, kind, prepared)
    reporter = reporter.with_events(EventLog(output / EVENTS_NAME))
    for line in prepared.notes:
        reporter.note(line)
    missing = missing_saves(output, saves, config.save_total_limit)
    if not missing:
        reporter.say(f"nothing to do: {len(saves)} checkpoints in {output}")
        return _checkpoints(output, saves)
    try:
        about = {"job": kind, "output": str(output)}
        with (
            claimed(output, "training"),
            heartbeat(reporter.console),
            ray_session(address, _local_slots(config), about),
        ):
            workers = _plan_workers(config)
            config = _with_precision(config, asked, began, workers, reporter)
            if address is None and "RAY_ADDRESS" not in os.environ and workers.device == "cpu":
                _check_host(config, model, workers, prepared)
            point = resume_point(output, missing) if config.save_optimizer else None
            reporter.say(
                f"{kind}: {model} on {prepared.kept} of {prepared.rows} rows, steps "
                f"{1 + (point[0] if point else 0)} to {saves[-1]} of {prepared.steps}, batches of "
                f"{config.batch_size} on {workers.count} worker(s), {workers.device}"
            )
            reporter.write(
                TrainingStarted(
                    arm_ray.__version__, kind, prepared.rows, prepared.kept, prepared.steps,
                    tuple(saves), workers.count, workers.device,
                )
            )  # fmt: skip
            with telemetry(
                reporter,
                config.tracking,
                output,
                config.tracking.run or output.name,
                identity=[config.identity(), prepared.digest],
                parameters=config.model_dump(mode="json", exclude={"tracking"}),
                history=[_record(entry) for entry in read_log(output / LOG_NAME)],
            ) as listening:
                _fit(config, kind, model, prepared, saves, workers, reporter, listening.take)
    except ArmRayError as error:
        reporter.write(RunFailed(type(error).__name__, str(error)))
        raise
    _close(output, config, saves, started, reporter)
    return _checkpoints(output, saves)


def _as_begun(config: Any) -> Any:
    """The configuration with the precision that a run in its output began with, if it is auto."""
    found = _began_with(config.output)
    if found is None or config.precision != "auto":
        return config
    return config.model_copy(update={"precision": found})


def _began_with(output: Path) -> str | None:
    """The precision of the run in a directory; None where there is none, or it is not settled."""
    found = recorded(output)
    if found is not None or not (output / CONFIG_NAME).is_file():
        return found
    # Before there was `auto`, what a run was asked for was what it took.
    asked = read_yaml(output / CONFIG_NAME).get("precision")
    return asked if asked in ("float32", "bfloat16") else None


def _with_precision(
    config: Any,
    asked: str,
    began: str | None,
    workers: _Workers,
    reporter: Reporter,
) -> Any:
    """The configuration with its precision settled.

    Args:
        config: As the run will take it but for this.
        asked: What the user wrote.
        began: What the run in the directory took, if there is one.
        workers: Where they are.
        reporter: Told what it is.
    """
    on_cpu = workers.device == "cpu"
    # DeepSpeed has no bfloat16 there.
    only_float32 = on_cpu and config.runtime.zero_stage == 3
    chosen = settle(
        config.output,
        asked,
        ["float32"] if only_float32 else ["bfloat16"],
        lambda: units_of(workers.device),
        reporter,
        began,
    )
    return config.model_copy(update={"precision": chosen})


def _absolute(config: Any) -> Any:
    """The configuration with paths that hold in every process.

    Raises:
        ConfigError: The output of a submitted job is relative.
    """
    changes: dict[str, Any] = {"output": outliving(config.output).absolute()}
    path, colon, function = getattr(config, "reward", "").rpartition(":")
    if colon:
        changes["reward"] = f"{Path(path).expanduser().absolute()}:{function}"
    return config.model_copy(update=changes)


def _claim(output: Path, config: TrainingConfig, kind: str, prepared: _Prepared) -> None:
    """Make the output directory this run's own.

    Raises:
        RunDirectoryError: It holds another run, other data or something else.
    """
    record = output / CONFIG_NAME
    try:
        if holds_earlier(output, "training"):
            _refuse_other(record, config, kind)
        output.mkdir(parents=True, exist_ok=True)
        known = output / DATA_NAME
        content = {"kind": kind, "sha256": prepared.digest, "rows": prepared.kept}
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != content:
            raise RunDirectoryError(
                "the training data are not those that the run began with",
                where=config.data.path,
                got=f"{prepared.kept} rows, other tokens",
                expected="the same rows and tokenizer",
                hint="restore them, or choose another output",
            )
        write_config(output, config.to_yaml())
        write_json(known, content)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            "the output directory cannot be used", where=output, got=error
        ) from None


def _refuse_other(record: Path, config: TrainingConfig, kind: str) -> None:
    try:
        given = parse_training_config(type(config), read_yaml(record), source=str(record))
        old = _as_begun(given.model_copy(update={"output": config.output})).identity()
    except ConfigError:
        old = {}
    new = config.identity()
    if "auto" in (old.get("precision"), new["precision"]):
        # A run that was ended before it was settled.
        old["precision"] = new["precision"]
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new[key]}" for key in new if old.get(key) != new[key]
    ]
    if changed:
        raise RunDirectoryError(
            "the output directory holds a run with another configuration",
            where=record,
            got="; ".join(changed[:5]) if old else f"no configuration of {kind}",
            expected="the configuration that the run began with",
            hint="remove the directory or choose another output",
        )


def _local_slots(config: TrainingConfig) -> int:
    runtime, cores = config.runtime, os.cpu_count() or 1
    workers = 1 if runtime.workers == "auto" else runtime.workers
    each = 1 if runtime.cpus_per_worker == "auto" else runtime.cpus_per_worker
    return max(cores, workers * each)


def _plan_workers(config: TrainingConfig) -> _Workers:
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
    return _Workers(count, device, cpus)


def _check_host(
    config: TrainingConfig, model: Path, workers: _Workers, prepared: _Prepared
) -> None:
    """Refuse at once what each worker would refuse after its start."""
    share = config.batch_size // workers.count
    micro = share if config.micro_batch_size == "auto" else config.micro_batch_size
    if getattr(config, "packing", False):
        micro = 1
    needed = memory.estimate(
        model, config, workers=workers.count, micro_batch=micro, length=prepared.length
    )
    memory.check(needed, config, free=memory.free_host_bytes(), sharing=workers.count)


def _fit(
    config: TrainingConfig,
    kind: str,
    model: Path,
    prepared: _Prepared,
    saves: list[int],
    workers: _Workers,
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
        settings = {"kind": kind, "job": job, "payload": [ray.put(prepared.payload)]}
        work = _on_ray_train(settings, workers, config.runtime.max_failures)
        follower = _Follower(config, saves, scratch, reporter, took_step)
        error = follower.wait_for(work)
        if error is not None:
            raise read_error(scratch / _ERROR_NAME) or _lost(error, config)


def _on_ray_train(
    settings: Mapping[str, Any], workers: _Workers, max_failures: int
) -> Callable[[], Any]:
    """What runs `_worker` in all workers, and again from the last checkpoint where some are lost.

    Args:
        settings: What `_worker` is called with.
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
        _worker,
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
                }
            },
        ),
    )
    return lambda: trainer.fit()


def _worker(settings: Mapping[str, Any]) -> None:
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


def _record(entry: Mapping[str, Any]) -> Record:
    """An entry of the log as an event."""
    return {"event": TRAINING_STEP, **entry}


class _Follower:
    """Prints what the workers write while they run, and passes their steps on."""

    def __init__(
        self,
        config: TrainingConfig,
        saves: list[int],
        scratch: Path,
        reporter: Reporter,
        took_step: Callable[[Record], None],
    ) -> None:
        self._config, self._last, self._reporter = config, saves[-1], reporter
        self._took_step = took_step
        self._log = config.output / LOG_NAME
        self._notes = scratch / "notes.txt"
        self._notes_told = 0
        self._shown = 0
        self._seen: tuple[int, int] | None = None
        self._last_line = time.monotonic()

    def wait_for(self, work: Callable[[], Any]) -> BaseException | None:
        """Do blocking work in a thread, and print meanwhile; returns what it raised."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        # What an earlier session wrote is not news.
        self._shown = max((entry["step"] for entry in read_log(self._log)), default=0)
        # In a thread, because the main one is for Ctrl-C.
        thread = threading.Thread(target=run, name="ray-train", daemon=True)
        thread.start()
        with activity("starting the training workers") as doing:
            while thread.is_alive():
                thread.join(_POLL_S)
                before = self._shown
                self._print()
                if self._shown != before:
                    doing.becomes(f"step {self._shown + 1} of {self._last}")
        self._print()
        return raised[0] if raised else None

    def _print(self) -> None:
        if self._notes.is_file():
            notes = self._notes.read_text(encoding="utf-8").splitlines()
            for line in notes[self._notes_told :]:
                self._reporter.say(line)
            self._notes_told = len(notes)
        try:
            stat = self._log.stat()
        except OSError:
            return
        if self._seen == (stat.st_mtime_ns, stat.st_size):
            return
        self._seen = (stat.st_mtime_ns, stat.st_size)
        entries = read_log(self._log)
        # A run that goes on writes its last steps again.
        self._shown = min(self._shown, max((e["step"] for e in entries), default=0))
        for i, entry in enumerate(entries):
            step = entry["step"]
            if step > self._shown:
                self._took_step(_record(entry))
            if step > self._shown and self._is_told(step):
                self._reporter.say(self._line(entries, i))
                self._last_line = time.monotonic()
        self._shown = max((e["step"] for e in entries), default=0)

    def _is_told(self, step: int) -> bool:
        # The first one says how long the others will take.
        is_chosen = step % self._config.log_every == 0 or step in (1, self._last)
        return is_chosen or time.monotonic() - self._last_line > LINE_INTERVAL_S

    def _line(self, entries: list[dict[str, Any]], i: int) -> str:
        entry, first = entries[i], entries[max(0, i - 10)]
        step = entry["step"]
        # Of the last ten steps; the very first one began at 0.
        passed = entry["seconds"] - (first["seconds"] if i else 0.0)
        each = passed / max(1, step - first["step"]) if i else passed
        reward = f"  reward {entry['reward']:.3f}" if entry.get("reward") is not None else ""
        return (
            f"step {step}/{self._last}  loss {entry['loss']:.4f}{reward}  "
            f"lr {entry['learning_rate']:.2e}  {each:.2f} s/step  "
            f"ETA {duration(each * (self._last - step))}"
        )


def _checkpoints(output: Path, saves: list[int]) -> list[Path]:
    found = [output / f"checkpoint-{step}" for step in saves]
    return [path for path in found if is_complete(path)]


def _close(
    output: Path,
    config: TrainingConfig,
    saves: list[int],
    started: float,
    reporter: Reporter,
) -> None:
    seconds = time.monotonic() - started
    log = read_log(output / LOG_NAME)
    loss = float(log[-1]["loss"]) if log else None
    checkpoints = _checkpoints(output, saves)
    names = tuple(path.name for path in checkpoints)
    reporter.write(TrainingFinished(saves[-1], loss, round(seconds, 3), names))
    rows = [
        ("output", str(output)),
        ("checkpoints", ", ".join(names)),
        ("steps", f"{saves[-1]}" + (" (stop_after)" if config.stop_after == saves[-1] else "")),
        ("loss", "-" if loss is None else f"{log[0]['loss']:.4f} -> {loss:.4f}"),
        ("time", duration(seconds)),
    ]
    print_summary(reporter.console, "trained", rows)

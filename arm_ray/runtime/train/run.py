"""Training on Ray Train: checks the inputs, starts the workers, shows what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import arm_ray
from arm_ray.checkpoints.huggingface import open_checkpoint, resolve_path
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.config import read_yaml
from arm_ray.errors import ArmRayError, ConfigError, RunDirectoryError
from arm_ray.events import EventLog, RunFailed
from arm_ray.identity import differences
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.joining import outliving, ray_session
from arm_ray.runtime.output.claim import (
    CONFIG_NAME,
    claimed,
    holds_earlier,
    refuse_other,
    unusable,
    write_config,
)
from arm_ray.runtime.output.precision import recorded, settle, units_of
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.progress import duration, print_summary
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.runtime.train.log import step_record
from arm_ray.runtime.train.prepare import Prepared, prepare_grpo, prepare_sft
from arm_ray.runtime.train.workers import Workers, check_host, fit, local_slots, plan_workers
from arm_ray.storage.regular import json_in
from arm_ray.training.config import GrpoConfig, SftConfig, TrainingConfig, parse_training_config
from arm_ray.training.records import (
    LOG_NAME,
    OPTIMIZER_NAME,
    TrainingFinished,
    TrainingStarted,
    is_complete,
    missing_saves,
    read_log,
    resume_point,
)

EVENTS_NAME = "events.jsonl"
DATA_NAME = "data.json"


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
    return _run(config, "sft", prepare_sft, address, console)


def run_grpo(
    config: GrpoConfig, *, address: str | None = None, console: Console | None = None
) -> list[Path]:
    """Train a model by GRPO as configured, or go on; as `run_sft`."""
    return _run(config, "grpo", prepare_grpo, address, console)


def _run(
    config: Any,
    kind: str,
    prepare: Callable[[Any, Path], Prepared],
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
            ray_session(address, local_slots(config), about),
        ):
            workers = plan_workers(config)
            config = _with_precision(config, asked, began, workers, reporter)
            if address is None and "RAY_ADDRESS" not in os.environ and workers.device == "cpu":
                check_host(config, model, workers, prepared)
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
                history=[step_record(entry) for entry in read_log(output / LOG_NAME)],
            ) as listening:
                fit(config, kind, model, prepared, saves, workers, reporter, listening.take)
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
    workers: Workers,
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
        ConfigError: The output of a submitted job is relative, or there is no optimizer to take.
    """
    changes: dict[str, Any] = {"output": outliving(config.output).absolute()}
    if config.optimizer_from is not None:
        source = config.optimizer_from.expanduser().absolute()
        begins = not any(map(is_complete, changes["output"].glob("checkpoint-*")))
        if begins and not (source / OPTIMIZER_NAME).is_file():
            raise ConfigError(
                "there are no moments of an optimizer to begin with",
                where="optimizer_from",
                got=f"no {OPTIMIZER_NAME} in {source}",
                expected="a checkpoint that was saved with save_optimizer: true",
                hint="name such a checkpoint, or remove the key",
            )
        changes["optimizer_from"] = source
    path, colon, function = getattr(config, "reward", "").rpartition(":")
    if colon:
        changes["reward"] = f"{Path(path).expanduser().absolute()}:{function}"
    return config.model_copy(update=changes)


def _claim(output: Path, config: TrainingConfig, kind: str, prepared: Prepared) -> None:
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
        if known.is_file() and json_in(known) != content:
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
    if not old:
        raise unusable(record.parent, "training", f"no configuration of {kind}")
    refuse_other(record, differences(old, new))


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

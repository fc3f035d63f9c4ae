"""A whole merge, from a configuration to a published model."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import arm_ray
from arm_ray.calibration.stream import CalibrationStream, open_stream
from arm_ray.checkpoints import states
from arm_ray.checkpoints.adapter_export import adapter_bytes
from arm_ray.checkpoints.peft import WEIGHTS_NAME
from arm_ray.config import MergeConfig, RuntimeConfig, state_settings
from arm_ray.errors import (
    ArmRayError,
    CalibrationError,
    ConfigError,
    PlacementError,
    is_disk_full,
)
from arm_ray.evaluation.tasks import Task
from arm_ray.events import (
    ModelWritten,
    RunFailed,
    RunFinished,
    RunStarted,
    Warned,
    read_events,
)
from arm_ray.merging.method import Method, open_method
from arm_ray.model.partition import choose_balance, partition_layers
from arm_ray.planning.memory import actor_memory
from arm_ray.planning.sources import open_workload
from arm_ray.report.model_card import write_model_card
from arm_ray.report.scores import Scores
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.joining import outliving, ray_session
from arm_ray.runtime.cluster.nodes import alive_nodes
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge.adapter import write_adapter
from arm_ray.runtime.merge.driver import StreamingDriver
from arm_ray.runtime.merge.elasticity import Gangs
from arm_ray.runtime.merge.state_storage import storage_of
from arm_ray.runtime.output.opening import open_output
from arm_ray.runtime.output.precision import settle, units_of
from arm_ray.runtime.output.run_directory import Room, RunDirectory
from arm_ray.runtime.scoring.state_scoring import (
    StateScoring,
    local_evaluator_slots,
    open_evaluation,
    reserved_resources,
    state_scoring,
)
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.progress import cosine_text, duration, print_summary
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.runtime.shards.placement import (
    Placement,
    check_object_store,
    local_slots,
    placed_shards,
)
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.schedule import iterations_needed_after, merge_sizes
from arm_ray.storage.urls import is_url


@dataclass(frozen=True)
class MergeOutcome:
    """How a merge ended.

    Attributes:
        run: The run directory.
        model: The final model; None where the merge was halted before its end.
        iterations: Complete iterations.
        reason: `max_iterations`, `converged`, `patience` or `stop_after`.
    """

    run: Path
    model: Path | None
    iterations: int
    reason: str


def merge(
    config: MergeConfig,
    *,
    address: str | None = None,
    stop_after: int | None = None,
    console: Console | None = None,
    reserved: Mapping[str, float] | None = None,
    part_of: str | None = None,
) -> MergeOutcome:
    """Merge checkpoints as configured, or go on with the run in `config.output`.

    Args:
        config: The configuration.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        stop_after: Halt after this iteration; the same call without it goes on.
        console: Where progress and the summary go; None: standard error.
        reserved: Resources of the cluster that others have taken, besides its own evaluators.
        part_of: Name of the run whose trackers tell of this merge; None: it has its own.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays and can be gone on with.
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    if not is_url(config.output):
        outliving(config.output)
    check_installed(config.tracking)
    method = open_method(
        config.method,
        *merge_sizes(config.schedule, len(config.candidates)),
        has_window=config.schedule.has_window,
    )

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    with heartbeat(console), activity("checking the checkpoints"):
        inputs = open_inputs(config)
        tasks = open_evaluation(config, inputs)
    with open_output(config, say) as run:
        run.record_inputs(inputs.fingerprints)
        if run.is_complete:
            say(f"This run is complete: {run.model_name}")
            return MergeOutcome(run.path, run.model, run.last_iteration, "complete")
        room = _room_of(config, inputs)
        run.check_disk_space(room)
        with (
            heartbeat(console),
            activity("merging"),
            _failures_recorded(run, room),
            ray_session(
                address,
                local_slots(config.runtime, len(inputs.layout.groups))
                + local_evaluator_slots(config.evaluation),
                {"job": "merge", "output": config.output},
            ),
            telemetry(
                run.events,
                config.tracking if part_of is None else None,
                run.path,
                part_of or config.tracking.run or run.path.name,
                lambda line: console.print(line, style="yellow", markup=False, soft_wrap=True),
                identity=[state_settings(config), inputs.fingerprints],
                parameters=config.model_dump(mode="json", exclude={"tracking"}),
            ),
        ):
            taken = _sum_of(reserved or {}, reserved_resources(config))
            return _merge_on_ray(
                config, method, inputs, run, tasks, stop_after, console, started, taken
            )


def _merge_on_ray(
    config: MergeConfig,
    method: Method,
    inputs: MergeInputs,
    run: RunDirectory,
    tasks: list[Task],
    stop_after: int | None,
    console: Console,
    started: float,
    reserved: Mapping[str, float],
) -> MergeOutcome:
    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    def warn(message: str) -> None:
        run.events.write(Warned(message))
        console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    groups = len(inputs.layout.groups)
    gangs = Gangs(run, config.runtime, groups, reserved, warn, say)
    first = gangs.plan()
    if method.needs_forward:
        config, inputs = _with_compute_dtype(config, inputs, run, first.device, say, warn)
    _check_memory(config, method, inputs, first)
    # Before the actors: they may take every CPU slot, and Ray Data would wait for one for ever.
    stream = _open_calibration(config, method, inputs, run, warn)

    def attempt(
        placement: Placement, runtime: RuntimeConfig, scoring: StateScoring | None
    ) -> _Ending | None:
        specs = shard_specs(config, method, inputs, run.path, placement)
        with (
            placed_shards(specs, runtime, placement, warn, gangs.has_shrunk) as gang,
            storage_of(config, run, inputs, gang, specs, gangs.nodes) as storage,
        ):
            gangs.nodes |= set(gang.nodes)
            gangs.settle(storage, len(config.candidates))
            driver = StreamingDriver(
                config,
                inputs,
                run,
                gang,
                specs,
                method,
                stream,
                console,
                scoring,
                storage,
                gangs.merged,
                gangs.has_grown,
            )
            if method.needs_forward:
                check_object_store(gang, _message_bytes(config, inputs))
                # A linear merge reads every byte once, and looks at it then.
                with activity("checking the weights for NaN and infinity"):
                    driver.check_weights()
            _announce(config, inputs, run, placement, stream, console)
            reason = driver.iterate(stop_after)
            selected = run.last_iteration
            if reason == "regroup":
                return None
            if reason == "stop_after":
                needed = iterations_needed_after(config.schedule, len(config.candidates), selected)
                driver.bring_home(sorted(needed))
                return _Ending(reason, None, selected, driver.peak_bytes())
            if scoring is not None:
                selected = scoring.select(selected)
            scores = scoring.scores() if scoring is not None else None
            if config.keep_states == "last" or config.output_format == "adapter":
                driver.bring_home([selected])
            with activity("writing the model"):
                model = _publish_model(config, inputs, run, driver, selected, scores)
            if scoring is not None:
                scoring.report(console, selected)
                run.prune(len(config.candidates), run.last_iteration, {selected})
            return _Ending(reason, model, selected, driver.peak_bytes())

    scored = state_scoring(config, inputs, run, tasks, say) if tasks else nullcontext()
    with scored as scoring:
        ending = gangs.run_until_over(first, lambda p, runtime: attempt(p, runtime, scoring))
    seconds = time.monotonic() - started
    finished = RunFinished(ending.reason, run.last_iteration, round(seconds, 3), ending.peaks)
    run.events.write(finished)
    _summarise(run, ending, seconds, console)
    return MergeOutcome(run.path, ending.model, run.last_iteration, ending.reason)


def _with_compute_dtype(
    config: MergeConfig,
    inputs: MergeInputs,
    run: RunDirectory,
    device: str,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> tuple[MergeConfig, MergeInputs]:
    """The same with the number format of the forward pass settled."""
    chosen = settle(
        run.path,
        config.precision.compute_dtype,
        [str(inputs.compute_dtype).removeprefix("torch.")],
        lambda: units_of(device),
        say,
        warn,
        _began_with(run),
    )
    settled = replace(inputs, compute_dtype=getattr(torch, chosen))
    return config.with_compute_dtype(chosen), settled


def _began_with(run: RunDirectory) -> str | None:
    """The number format of the states that are there, for runs of older versions."""
    if not run.finished or not run.events.path.is_file():
        return None
    started = [e for e in read_events(run.events.path) if e["event"] == "run_started"]
    return str(started[-1]["compute_dtype"]) if started else None


def _message_bytes(config: MergeConfig, inputs: MergeInputs) -> int:
    """Hidden states of the largest micro-batch; bytes."""
    longest = config.calibration.max_length if config.calibration is not None else 0
    tokens = max(config.runtime.micro_batch_tokens, longest)
    return tokens * int(inputs.layout.config.hidden_size) * inputs.compute_dtype.itemsize


def _sum_of(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {*left, *right}}


def _room_of(config: MergeConfig, inputs: MergeInputs) -> Room:
    layout, dtypes = inputs.layout, inputs.storage_dtypes
    if config.output_format == "adapter":
        model_bytes = adapter_bytes(layout.shapes, layout.rotated, config.adapter_rank)
    else:
        exported = states.plan_export(layout.shapes, dtypes, 2**62)
        model_bytes = sum(file.num_bytes for file in exported)
    return Room(states.total_bytes(layout.shapes, 4), model_bytes, len(config.candidates))


@contextlib.contextmanager
def _failures_recorded(run: RunDirectory, room: Room) -> Iterator[None]:
    """Write down what ends a run early, and say of a full disk how much is missing."""
    try:
        yield
    except (ArmRayError, OSError) as error:
        failure: Exception = error
        if isinstance(error, OSError):
            if not is_disk_full(error):
                raise
            failure = run.disk_full(room, error)
        with contextlib.suppress(OSError):
            run.events.write(RunFailed(type(failure).__name__, str(failure)))
        if failure is error:
            raise
        raise failure from error


def _open_calibration(
    config: MergeConfig,
    method: Method,
    inputs: MergeInputs,
    run: RunDirectory,
    warn: Callable[[str], None],
) -> CalibrationStream | None:
    if not method.needs_forward:
        return None
    if config.calibration is None:
        raise ConfigError(
            f"the operator {config.method.operator!r} needs calibration samples",
            where="calibration",
            hint="name a dataset in calibration.path",
        )
    needed = config.schedule.offset + config.schedule.max_iterations
    stream = open_stream(
        config.calibration,
        inputs.tokenizer,
        needed_batches=needed,
        # Whether nodes share storage is known for certain only once shards are placed.
        here=config.runtime.storage != "shared" and len(alive_nodes()) > 1,
    )
    vocabulary = int(inputs.layout.config.vocab_size)
    if stream.max_token_id >= vocabulary:
        raise CalibrationError(
            "the tokenizer does not belong to the model",
            where=inputs.tokenizer,
            got=f"token id {stream.max_token_id}",
            expected=f"ids below the vocabulary size {vocabulary}",
            hint="copy the training run's tokenizer into the base's directory",
        )
    run.record_inputs({"calibration": stream.digest})
    for message in stream.warnings:
        warn(message)
    return stream


def shard_specs(
    config: MergeConfig, method: Method, inputs: MergeInputs, run: Path, placement: Placement
) -> list[ShardSpec]:
    """What each layer shard of a merge is given, in the order of the layers.

    Args:
        config: The configuration.
        method: How states are merged.
        inputs: The checked checkpoints.
        run: The run directory.
        placement: Number of shards, and their device.
    """
    ranges = partition_layers(
        inputs.layout,
        placement.num_shards,
        choose_balance(config.runtime.balance, on_gpu=placement.device == "cuda"),
        needs_forward=method.needs_forward,
    )
    rate = config.runtime.disk_mb_per_s
    return [
        ShardSpec(
            inputs.layout,
            groups,
            inputs.checkpoints,
            run,
            config.schedule,
            method,
            placement.device,
            inputs.compute_dtype,
            config.runtime.threads,
            config.runtime.residency,
            second_moments=inputs.second_moments,
            disk_bytes_per_s=None if rate is None else rate * 1e6 / len(ranges),
            scratch=config.runtime.scratch,
            niceness=config.runtime.niceness,
        )
        for groups in ranges
    ]


def _check_memory(
    config: MergeConfig, method: Method, inputs: MergeInputs, placement: Placement
) -> None:
    """Refuse a merge that is planned to need more memory than it was given.

    Raises:
        PlacementError: Says how much, and of what.
    """
    limit = config.runtime.memory_gb
    if limit is None:
        return
    workload, _ = open_workload(config)
    for index, spec in enumerate(shard_specs(config, method, inputs, Path(), placement)):
        is_gpu = placement.device == "cuda"
        peak = actor_memory(workload, spec.groups, config.runtime, on_gpu=is_gpu).host
        if peak.total > limit * 1e9:
            largest = sorted(peak.terms.items(), key=lambda term: -term[1])[:3]
            raise PlacementError(
                "a layer shard would need more memory than it is given",
                where=f"runtime.memory_gb, shard {index + 1} of {placement.num_shards}",
                got=f"{peak.total / 1e9:.2f} GB: "
                + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest)
                + ", …",
                expected=f"at most {limit:g} GB",
                hint="use runtime.residency: disk, more runtime.layer_shards, or fewer "
                "runtime.micro_batch_tokens; arm-ray plan shows what fits",
            )


def _announce(
    config: MergeConfig,
    inputs: MergeInputs,
    run: RunDirectory,
    placement: Placement,
    stream: CalibrationStream | None,
    console: Console,
) -> None:
    layout = inputs.layout
    dtype = str(inputs.compute_dtype).removeprefix("torch.")
    run.events.write(
        RunStarted(
            arm_ray.__version__,
            run.last_iteration + 1,
            config.schedule.max_iterations,
            config.method.operator,
            len(layout.shapes),
            len(layout.rotated),
            len(layout.groups),
            placement.num_shards,
            placement.device,
            dtype,
            stream.num_rows if stream else 0,
            stream.digest if stream else "",
        )
    )
    verb = f"going on after iteration {run.last_iteration}" if run.finished else "merging"
    console.print(
        f"{verb}: {config.method.operator}, {len(config.candidates)} candidate(s), "
        f"{len(layout.shapes)} tensors ({len(layout.rotated)} in linear modules of the layers), "
        f"{placement.num_shards} layer shard(s) on {placement.device}, {dtype} forward pass",
        highlight=False,
        soft_wrap=True,
    )


def _publish_model(
    config: MergeConfig,
    inputs: MergeInputs,
    run: RunDirectory,
    driver: StreamingDriver,
    selected: int,
    scores: Scores | None,
) -> Path:
    started = time.monotonic()
    partial = run.partial_model
    rank = None
    if config.output_format == "adapter":
        # The state stays until it is published: with another rank or format, the run goes on here.
        state = states.state_directory(run.path, selected)
        rank = write_adapter(partial, config, inputs, state, selected)
        num_bytes = (partial / WEIGHTS_NAME).stat().st_size
    else:
        num_bytes = driver.export(selected)
    write_model_card(partial, config, run.finished[selected], rank, scores)
    # The rename is the moment of publication: `model/` is whole or absent.
    partial.rename(run.model)
    seconds = round(time.monotonic() - started, 3)
    if config.keep_states == "none":
        shutil.rmtree(run.path / "states", ignore_errors=True)
    name = states.state_directory(run.path, selected).name
    run.events.write(ModelWritten(name, str(run.model), num_bytes, seconds))
    return run.model


@dataclass(frozen=True)
class _Ending:
    """How a merge ended: why, the model and the iteration it is of, and the shards' memory."""

    reason: str
    model: Path | None
    selected: int
    peaks: tuple[int, ...]


def _summarise(run: RunDirectory, ending: _Ending, seconds: float, console: Console) -> None:
    last = run.finished.get(run.last_iteration)
    reasons = {
        "max_iterations": "all iterations done",
        "converged": "the states stopped turning (schedule.tolerance)",
        "patience": "the states stopped getting better (evaluation.select.patience)",
        "stop_after": "halted as asked; the same command without --stop-after goes on",
    }
    rows = [
        ("ended", reasons[ending.reason]),
        ("iterations", str(run.last_iteration)),
        ("cos(W_t, W_t-1)", cosine_text(last.weight_cosine if last else None)),
        ("cos of task vectors", cosine_text(last.task_vector_cosine if last else None)),
        ("time", duration(seconds)),
        ("peak memory of a shard", f"{max(ending.peaks, default=0) / 1e9:.2f} GB"),
        ("model", str(ending.model) if ending.model else "not written yet"),
        *(
            [("of iteration", str(ending.selected))]
            if ending.selected != run.last_iteration
            else []
        ),
    ]
    print_summary(console, f"run {run.path.name}", rows)

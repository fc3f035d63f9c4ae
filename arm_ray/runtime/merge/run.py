"""A whole merge, from a configuration to a published model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.adapter_export import adapter_bytes
from arm_ray.config import MergeConfig, PushConfig, state_settings
from arm_ray.errors import ArmRayError, is_disk_full
from arm_ray.evaluation.tasks import Task
from arm_ray.events import RunFailed, RunFinished, read_events
from arm_ray.exports.hub import check_target, push
from arm_ray.merging.method import Method
from arm_ray.planning.methods import method_of
from arm_ray.planning.state_life import linear_life, state_life
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.joining import (
    is_up_or_named,
    local_slots,
    outliving,
    ray_session,
)
from arm_ray.runtime.cluster.nodes import THIS_PROCESS, view_of_cluster
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge.controller import Ending, MergeController
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.policies import RecoveryPolicy, ScalingPolicy
from arm_ray.runtime.merge.samples import open_calibration, open_compared
from arm_ray.runtime.merge.specs import check_memory, is_short
from arm_ray.runtime.output.opening import open_output
from arm_ray.runtime.output.precision import settle, units_of
from arm_ray.runtime.output.run_directory import RunDirectory, SpaceNeeds
from arm_ray.runtime.scoring.state_scoring import (
    local_evaluator_slots,
    open_evaluation,
    reserved_resources,
    state_scoring,
)
from arm_ray.runtime.session.heartbeat import activity, heartbeat
from arm_ray.runtime.session.page import write_page
from arm_ray.runtime.session.progress import cosine_text, duration, print_summary
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.runtime.shards.placement import Place, Placement
from arm_ray.storage.disk import file_error
from arm_ray.storage.urls import is_url


@dataclass(frozen=True)
class MergeOutcome:
    """How a merge ended.

    Attributes:
        run: The run directory.
        model: The final model; None where the merge was halted before its end.
        iterations: Complete iterations.
        reason: `max_iterations`, `converged`, `no_gain`, `patience` or `stop_after`.
        selected: What the model is: `state-0002`, or `candidate-1` or `base` where no merge was
            better; None where it was made before, or not yet.
    """

    run: Path
    model: Path | None
    iterations: int
    reason: str
    selected: str | None = None


def merge(
    config: MergeConfig,
    *,
    address: str | None = None,
    stop_after: int | None = None,
    console: Console | None = None,
    reserved: Mapping[str, float] | None = None,
    part_of: str | None = None,
    place: Place | None = None,
    writes_report: bool = True,
    keeps_config: bool = False,
) -> MergeOutcome:
    """Merge checkpoints as configured, or go on with the run in `config.output`.

    Args:
        config: The configuration.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray, or
            none where the merge does not need it (`needs_no_ray`).
        stop_after: Halt after this iteration; the same call without it goes on.
        console: Where progress and the summary go; None: standard error.
        reserved: Resources of the cluster that others have taken, besides its own evaluators.
        part_of: Name of the run whose trackers tell of this merge; None: it has its own.
        place: Places the layer shards; None: each merge starts its own.
        writes_report: Whether `report.html` is written at the end.
        keeps_config: Whether the run's `config.yaml` stays as it is, as when a run is repaired.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays and can be gone on with.
    """
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    if not is_url(config.output):
        outliving(config.output)
    check_installed(config.tracking)
    method = method_of(config)
    with heartbeat(reporter.console), activity("checking the checkpoints"):
        inputs = open_inputs(config)
        tasks = open_evaluation(config, inputs)
    with open_output(config, reporter, keeps_config=keeps_config) as run:
        run.record_inputs(inputs.fingerprints)
        if run.is_complete:
            reporter.say(f"This run is complete: {run.model_name}")
            return MergeOutcome(run.path, run.model, run.last_iteration, "complete")
        if config.push_to_hub is not None:
            check_target(config.push_to_hub.repo, update=config.push_to_hub.update)
        reporter = reporter.with_events(run.events)
        for note in inputs.notes:
            reporter.note(note)
        here = place is None and needs_no_ray(config, method, inputs, address)
        needs = _space_needs(config, method, inputs, stop_after)
        run.check_disk_space(needs)
        with (
            heartbeat(reporter.console),
            activity("merging"),
            _failures_recorded(run, needs),
            nullcontext()
            if here
            else ray_session(
                address,
                local_slots(config.runtime, len(inputs.layout.groups))
                + local_evaluator_slots(config.evaluation),
                {"job": "merge", "output": config.output},
            ),
            telemetry(
                reporter,
                config.tracking if part_of is None else None,
                run.path,
                part_of or config.tracking.run or run.path.name,
                identity=[state_settings(config), inputs.fingerprints],
                parameters=config.model_dump(mode="json", exclude={"tracking"}),
            ),
        ):
            taken = _sum_of(reserved or {}, {} if here else reserved_resources(config))
            ending = _merge(
                config, method, inputs, run, tasks, stop_after, reporter, taken, place, is_here=here
            )
            seconds = time.monotonic() - started
            reporter.write(
                RunFinished(ending.reason, run.last_iteration, round(seconds, 3), ending.peak_bytes)
            )
            _summarise(run, ending, seconds, reporter.console)
            if writes_report:
                write_page(run.path, reporter)
            if config.push_to_hub is not None and ending.model is not None:
                _push(config.push_to_hub, ending.model, reporter)
            selected = ending.selection.name if ending.model is not None else None
            return MergeOutcome(run.path, ending.model, run.last_iteration, ending.reason, selected)


def _push(target: PushConfig, model: Path, reporter: Reporter) -> None:
    """Put the model on the hub; what is made stays made where that fails."""
    try:
        with activity("pushing to the hub"):
            url = push(model, target.repo, private=target.private, update=target.update)
    except ArmRayError as error:
        # The repository may have been made before the upload failed.
        flags = " --update" + ("" if target.private else " --public")
        again = f"arm-ray push {model} {target.repo}{flags}"
        reporter.warn(f"the model was not pushed: {error}\n  again:    {again}")
    else:
        reporter.say(f"pushed: {url}")


def needs_no_ray(
    config: MergeConfig, method: Method, inputs: MergeInputs, address: str | None
) -> bool:
    """Whether a merge is made in this process: no cluster is named, and one shard is enough.

    That is one pass over the weights, or forward passes that are planned to take less time than
    Ray and its actors to start, or a single shard that is asked for. The bits are the same.

    Args:
        config: The configuration.
        method: How states are merged.
        inputs: The checked checkpoints.
        address: Of a cluster; None: none is given.
    """
    runtime = config.runtime
    asks_for_actors = config.evaluation is not None or runtime.asks_for_actors
    on_gpu = runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available())
    if asks_for_actors or on_gpu or is_up_or_named(address):
        return False
    return not method.needs_forward or runtime.layer_shards == 1 or is_short(config, inputs)


def _merge(
    config: MergeConfig,
    method: Method,
    inputs: MergeInputs,
    run: RunDirectory,
    tasks: list[Task],
    stop_after: int | None,
    reporter: Reporter,
    reserved: Mapping[str, float],
    place: Place | None,
    *,
    is_here: bool,
) -> Ending:
    scaling = ScalingPolicy(config.runtime, len(inputs.layout.groups), reserved)
    cluster = THIS_PROCESS if is_here else view_of_cluster()
    placement = Placement(1, "cpu", is_here=True) if is_here else scaling.first(cluster)
    if method.needs_forward:
        config, inputs = _with_compute_dtype(config, inputs, run, placement.device, reporter)
    check_memory(config, method, inputs, placement)
    # Before the actors: they may take every CPU slot, and Ray Data would wait for one for ever.
    stream = open_calibration(config, method, inputs, run, reporter)
    compared = open_compared(config, inputs, stream, reporter)
    scored = state_scoring(config, inputs, run, tasks, reporter) if tasks else nullcontext()
    with scored as scoring:
        job = MergeJob(config, method, inputs, run, stream, compared, scoring, reporter, stop_after)
        recovery = RecoveryPolicy(config.runtime.max_recoveries, config.runtime.transport)
        return MergeController(job, cluster, placement, recovery, scaling, place).run()


def _with_compute_dtype(
    config: MergeConfig, inputs: MergeInputs, run: RunDirectory, device: str, reporter: Reporter
) -> tuple[MergeConfig, MergeInputs]:
    """The same with the number format of the forward pass settled."""
    chosen = settle(
        run.path,
        config.precision.compute_dtype,
        [str(inputs.compute_dtype).removeprefix("torch.")],
        lambda: units_of(device),
        reporter,
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


def _sum_of(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {*left, *right}}


def _space_needs(
    config: MergeConfig, method: Method, inputs: MergeInputs, stop_after: int | None
) -> SpaceNeeds:
    layout, dtypes, count = inputs.layout, inputs.storage_dtypes, len(config.candidates)
    life = linear_life(config, stop_after)
    if method.needs_forward:
        # Where there is no room for them, the merge goes on without recovery points.
        life = state_life(config, count, None, stop_after)
    if config.output_format == "adapter":
        model_bytes = adapter_bytes(layout.shapes, layout.matrices, config.adapter_rank)
    else:
        carried = () if inputs.carried is None else inputs.carried.specs
        exported = states.plan_export(layout.shapes, dtypes, 2**62, carried)
        model_bytes = sum(file.num_bytes for file in exported)
    return SpaceNeeds(states.total_bytes(layout.shapes, 4), model_bytes, count, life)


@contextlib.contextmanager
def _failures_recorded(run: RunDirectory, needs: SpaceNeeds) -> Iterator[None]:
    """Write down what ends a run early, and say of a full disk how much is missing."""
    try:
        yield
    except (ArmRayError, OSError) as error:
        failure: Exception = error
        if isinstance(error, OSError):
            full = is_disk_full(error)
            told = run.disk_full(needs, error) if full else file_error(error, run.path)
            if told is None:
                raise
            failure = told
        with contextlib.suppress(OSError):
            run.events.write(RunFailed(type(failure).__name__, str(failure)))
        if failure is error:
            raise
        raise failure from error


def _summarise(run: RunDirectory, ending: Ending, seconds: float, console: Console) -> None:
    last = run.finished.get(run.last_iteration)
    reasons = {
        "max_iterations": "all iterations done",
        "converged": "consecutive states point in nearly the same direction (schedule.tolerance)",
        "no_gain": "no further step makes the loss smaller, beyond its error (schedule.step)",
        "patience": "the states stopped getting better (evaluation.select.patience)",
        "stop_after": "halted as asked; the same command without --stop-after goes on",
    }
    rows = [
        ("ended", reasons[ending.reason]),
        ("iterations", str(run.last_iteration)),
        ("cos(W_t, W_t-1)", cosine_text(last.weight_cosine if last else None)),
        ("cos of task vectors", cosine_text(last.task_vector_cosine if last else None)),
        ("time", duration(seconds)),
        ("peak memory of a shard", f"{max(ending.peak_bytes, default=0) / 1e9:.2f} GB"),
        ("model", str(ending.model) if ending.model else "not written yet"),
        *(
            [("it is", ending.selection.name)]
            if ending.selection.iteration != run.last_iteration
            else []
        ),
    ]
    print_summary(console, f"run {run.path.name}", rows)
    if ending.selection.verdict:
        console.print(ending.selection.verdict, highlight=False)

"""What `auto` comes to where a number format is to be chosen; a run keeps what it began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.hardware import Units, all_of, cpu_units, gpu_units, own_gpu_units
from arm_ray.lazy import ray_is_joined
from arm_ray.runtime.cluster.actors import run_on
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.storage.regular import json_in

RECORD_NAME = "precision.json"
_ACCELERATOR = "accelerator_type:"


def units_of(device: str) -> Units:
    """What the devices multiply by themselves that the work may be placed on.

    Args:
        device: `cpu` or `cuda`. Of a cluster with several nodes, all nodes that have it count.
    """
    if device == "cuda":
        return _gpus()
    if not ray_is_joined():
        return cpu_units()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if len(nodes) < 2:
        return cpu_units()
    found = get_results([run_on(node["NodeID"], cpu_units) for node in nodes])
    return all_of(found, "a CPU of the cluster" if len(set(found)) > 1 else "the cluster's CPUs")


def _gpus() -> Units:
    own = own_gpu_units()
    if own is not None:
        return own
    # The driver's node may have none. Ray knows the cluster's by their names.
    known = ray.cluster_resources() if ray_is_joined() else {}
    names = [name.removeprefix(_ACCELERATOR) for name in known if name.startswith(_ACCELERATOR)]
    found = [gpu_units(None, name) for name in sorted(names)] or [gpu_units(None, "the GPU")]
    return all_of(found, ", ".join(units.where for units in found))


def recorded(directory: Path) -> str | None:
    """The format that a run in a directory began with; None where none is recorded."""
    try:
        content = json_in(directory / RECORD_NAME)
        return str(content["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record(directory: Path, dtype: str) -> None:
    """Write down the format that a run computes in."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD_NAME, {"dtype": dtype})


def settle(
    directory: Path,
    asked: str,
    preferred: Sequence[str],
    units: Callable[[], Units],
    reporter: Reporter,
    began: str | None = None,
) -> str:
    """The format that a run computes in, recorded in its directory.

    Args:
        directory: Of the run.
        asked: `auto`, or a format.
        preferred: What `auto` takes of formats that the device multiplies by itself: the first.
        units: Of the device; called where nothing is recorded.
        reporter: Told what `auto` came to, and warned of a format that the device has no units for.
        began: What a run that recorded nothing is known to have begun with.
    """
    kept = recorded(directory) or began
    if asked == "auto" and kept is not None:
        reporter.say(f"precision: {kept} (auto: as the run began)")
        chosen = kept
    elif asked == "auto":
        chosen, why = units().choose(*preferred)
        reporter.say(f"precision: {chosen} (auto: {why})")
    else:
        chosen, problem = asked, units().warning(asked)
        if problem is not None:
            reporter.warn(problem)
    record(directory, chosen)
    return chosen

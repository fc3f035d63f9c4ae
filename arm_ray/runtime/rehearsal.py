"""One layer of a model, run and merged on this machine, so that a plan knows how long it takes.

Rates of matrix products and of memory say little about a CPU: attention, norms, factorisations and
caches have their own. So a layer shard runs one micro-batch through a layer group of the model's
shape and merges it, with random weights, as many at once as shards will share the machine.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.config import MergeConfig
from arm_ray.errors import ArmRayError
from arm_ray.model.partition import Residency
from arm_ray.planning.cluster import Cluster
from arm_ray.planning.devices import GB, Device
from arm_ray.planning.methods import method_of
from arm_ray.planning.plan import cpu_shards
from arm_ray.planning.sources import open_workload
from arm_ray.planning.state_life import StateLife
from arm_ray.planning.timing import Clock, Placement
from arm_ray.planning.workload import StateUse, Workload, state_uses
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.transport import pack_tensor
from arm_ray.schedule import BASE, state_name
from arm_ray.secrets import shortened

# Of the memory of this machine, what the weights of the layers may take.
_MOST_OF_MEMORY = 0.25
_FORWARD_REPEATS = 3
# Of a machine that others use as well, half a second may tell twice the time of the next.
_LEAST_SECONDS, _MOST_ROUNDS = 5.0, 10
_MOST_ANCHORED = 4


def rehearsed(
    config: MergeConfig, cluster: Cluster, tokens_per_sample: int | None = None
) -> Cluster:
    """The cluster with the times of its device as a layer of this model takes them.

    It stays as it is for a merge without activations, for layers that are too large for this
    machine, and for operators that want to know more of the model than one layer.

    Args:
        config: The configuration.
        cluster: Of this machine's CPU.
        tokens_per_sample: As for `make_plan`.

    Raises:
        ArmRayError: As `make_plan`.
    """
    workload, _ = open_workload(config, tokens_per_sample, cluster.device.units)
    if not workload.samples:
        return cluster
    count = len(workload.layout.groups)
    groups = sorted({0, count // 2})
    shards = min(cpu_shards(config.runtime), count)
    at_once = max(1, -(-shards // cluster.nodes))
    most = max(workload.group_bytes(state_name(1), group) for group in groups)
    needed = at_once * most * (len(workload.dtypes) + 3)
    if needed > _MOST_OF_MEMORY * cluster.device.memory_bytes:
        return _noted(cluster, f"A layer was not tried: it would take {needed / GB:.1f} GB")
    try:
        found = _repeated(config, workload, groups, at_once)
    except (ArmRayError, RuntimeError) as error:
        # It can still be planned by the rates.
        why = shortened(str(error) or repr(error), 200)
        return _noted(cluster, f"A layer could not be tried: {why}")
    together = f", {at_once} at a time" if at_once > 1 else ""
    return _noted(
        replace(cluster, device=_fitted(config, workload, cluster, groups, found)),
        f"A layer of this model was run and merged on this machine{together}, and took "
        f"{1e3 * found[-1].forward:.0f} ms a micro-batch and {1e3 * found[-1].merges[0]:.0f} ms a "
        "merge",
    )


def _noted(cluster: Cluster, note: str) -> Cluster:
    return replace(cluster, notes=(*cluster.notes, note))


@dataclass(frozen=True)
class _Seconds:
    """Of one layer group: a forward call, 0 where none was timed, and each iteration's merge."""

    forward: float
    merges: tuple[float, ...]


def _repeated(
    config: MergeConfig, workload: Workload, groups: Sequence[int], at_once: int
) -> list[_Seconds]:
    """Seconds of each layer group, the mean of as many rounds as there is time for."""
    rounds: list[list[_Seconds]] = []
    started = time.monotonic()
    while not rounds or (
        time.monotonic() - started < _LEAST_SECONDS and len(rounds) < _MOST_ROUNDS
    ):
        # The layers are alike: one forward call tells of all.
        rounds.append(
            [_measured(config, workload, g, at_once, runs=g == groups[-1]) for g in groups]
        )
    return [_mean(found) for found in zip(*rounds, strict=True)]


def _mean(found: Sequence[_Seconds]) -> _Seconds:
    merges = zip(*(one.merges for one in found), strict=True)
    return _Seconds(
        statistics.fmean(one.forward for one in found), tuple(map(statistics.fmean, merges))
    )


@dataclass(frozen=True)
class _Drawn(Checkpoint):
    """A checkpoint of random weights, which are drawn as they are read."""

    label: str = ""
    workload: Workload | None = field(default=None, repr=False)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        assert self.workload is not None
        found = {}
        for name in names:
            shape = self.workload.layout.shapes[name]
            base = torch.Generator().manual_seed(1)
            drawn = torch.randn(shape, generator=base).mul_(0.02)
            if self.label != BASE:
                own = torch.Generator().manual_seed(sum(self.label.encode()))
                drawn += torch.randn(shape, generator=own).mul_(1e-3)
            found[name] = drawn.to(self.workload.dtype(self.label, name))
        return found


def _uses(workload: Workload) -> list[StateUse]:
    """The iterations up to the first of the window, or a few."""
    return state_uses(workload)[: min(workload.schedule.anchor_iterations, _MOST_ANCHORED) + 1]


def _rows(workload: Workload) -> int:
    """Samples of the forward call that is timed."""
    return min(workload.rows, workload.samples)


def _measured(
    config: MergeConfig, workload: Workload, group: int, at_once: int, *, runs: bool
) -> _Seconds:
    """Seconds of one layer group, with so many shards at work at the same time.

    Args:
        config: The configuration.
        workload: The merge.
        group: The layer group.
        at_once: How many shards.
        runs: Whether a forward call is timed.
    """
    method = method_of(config)
    last = len(_uses(workload))
    # On the disk a merge is written as it is made, and the plan counts that by itself.
    residency: Residency = "device" if config.runtime.residency == "device" else "host"
    with tempfile.TemporaryDirectory(prefix="arm-ray-plan-") as run:
        drawn = {label: _Drawn(Path(run), {}, {}, label, workload) for label in workload.dtypes}
        spec = ShardSpec(
            workload.layout,
            (group,),
            drawn,
            Path(run),
            config.schedule,
            method,
            "cpu",
            workload.compute_dtype,
            config.runtime.threads,
            residency,
            life=StateLife(last, frozenset(), frozenset(), (), may_end_early=False),
        )
        before = torch.get_num_threads(), torch.get_float32_matmul_precision()
        together = threading.Barrier(at_once)
        try:
            with ThreadPoolExecutor(at_once) as pool:
                jobs = [pool.submit(_run, spec, workload, together, runs) for _ in range(at_once)]
                found = [job.result() for job in jobs]
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])
    return _mean(found)


def _run(spec: ShardSpec, workload: Workload, together: threading.Barrier, runs: bool) -> _Seconds:
    try:
        shard, group = LayerShard(spec), spec.groups[0]
        merges = _merges(shard, group, workload, together)
        return _Seconds(_forward(shard, group, workload, together) if runs else 0.0, merges)
    except BaseException:
        together.abort()
        raise


def _merges(
    shard: LayerShard, group: int, workload: Workload, together: threading.Barrier
) -> tuple[float, ...]:
    """Seconds of the merge of each iteration."""
    samples, chunk = workload.samples, range(group, group + 1)
    columns = np.arange(samples, dtype=np.int64)
    merges: list[float] = []
    for use in _uses(workload):
        plan = use.plan
        for state in plan.inputs:
            # One token of each sample is all that a merge needs, and makes what is cast ready.
            short = _batch(columns, 1)
            shard.forward(
                plan, chunk, samples, state, 0, short, _hidden(workload, group, short), True
            )
        together.wait()
        started = time.perf_counter()
        shard.merge(plan, group, columns)
        merges.append(time.perf_counter() - started)
    return tuple(merges)


def _forward(
    shard: LayerShard, group: int, workload: Workload, together: threading.Barrier
) -> float:
    """Seconds of one forward call."""
    samples, chunk = workload.samples, range(group, group + 1)
    forwards: list[float] = []
    # Of an iteration that is not merged any more.
    last = _uses(workload)[-1].plan
    plan = replace(last, iteration=last.iteration + 1)
    batch = _batch(np.arange(_rows(workload), dtype=np.int64), workload.tokens)
    hidden = _hidden(workload, group, batch)
    state = plan.inputs[-1]
    for repeat in range(_FORWARD_REPEATS + 1):
        together.wait()
        started = time.perf_counter()
        shard.forward(plan, chunk, samples, state, repeat, batch, hidden, is_end=True)
        forwards.append(time.perf_counter() - started)
    # The first casts what is cast, and fills the caches.
    return statistics.fmean(forwards[1:])


def _batch(positions: NDArray[np.int64], tokens: int) -> MicroBatch:
    """Samples of so many equal tokens."""
    shape = (len(positions), tokens)
    lengths = np.full(len(positions), tokens, dtype=np.int64)
    return MicroBatch(positions, np.zeros(shape, np.int64), np.ones(shape, dtype=np.int64), lengths)


def _hidden(workload: Workload, group: int, batch: MicroBatch) -> NDArray[np.generic] | None:
    """What the layers before would have sent; None for the first, which embeds the tokens."""
    if group == 0:
        return None
    size = int(workload.layout.text_config.hidden_size)
    drawn = torch.randn(*batch.input_ids.shape, size, generator=torch.Generator().manual_seed(2))
    return pack_tensor(drawn.to(workload.compute_dtype))


def _fitted(
    config: MergeConfig,
    workload: Workload,
    cluster: Cluster,
    groups: Sequence[int],
    found: Sequence[_Seconds],
) -> Device:
    """The device whose formulas give the times that were measured."""
    device = cluster.device
    clock = Clock(workload, config.runtime, device, Placement([list(groups)], 1), 1.0)
    parts = [[clock.group(use, group) for use in _uses(workload)] for group in groups]
    told = parts[-1][0].forward_call * _rows(workload) / workload.rows
    merges = np.array([seconds for one in found for seconds in one.merges])
    terms = np.array([[part.rotation, part.elementwise] for row in parts for part in row])
    # Relative errors count, so that a large embedding is not all that counts.
    scales, *_ = np.linalg.lstsq(terms / merges[:, None], np.ones(len(merges)), rcond=None)
    if min(scales) <= 0.0:
        scales = np.full(2, merges.sum() / terms.sum())
    return replace(
        device,
        forward_scale=found[-1].forward / told,
        rotation_scale=float(scales[0]),
        elementwise_scale=float(scales[1]),
    )

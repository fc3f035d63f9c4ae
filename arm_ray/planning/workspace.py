"""The memory that merging one layer group takes beside stored weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from math import ceil

import torch

from arm_ray.planning.workload import FLOAT32, FLOAT64, PIECE, Workload
from arm_ray.schedule import BASE, IterationPlan


@functools.lru_cache(maxsize=10_000)
def largest_piece(workload: Workload, group: int) -> int:
    """Elements of the largest piece that a group's tensors are merged in."""
    return max(max(_pieces(workload, name)) for name in workload.layout.groups[group].tensors)


def _pieces(workload: Workload, name: str) -> list[int]:
    """Elements of the pieces that a tensor is merged in: a rotated one is one piece."""
    elements = workload.elements(name)
    if name in workload.layout.rotated and workload.samples:
        return [elements]
    rows = workload.layout.shapes[name][0]
    width = max(1, elements // max(1, rows))
    piece = max(1, PIECE // width) * width
    whole, rest = divmod(elements, piece)
    return [piece] * whole + [rest] * bool(rest)


@functools.lru_cache(maxsize=100_000)
def merge_workspace(
    workload: Workload, plan: IterationPlan, group: int, residency: str, on_gpu: bool, threads: int
) -> tuple[int, int]:
    """Bytes while a group is merged, at the largest instant.

    Args:
        workload: The merge.
        plan: The iteration.
        group: The layer group.
        residency: `runtime.residency`.
        on_gpu: Whether it is merged on a GPU.
        threads: `runtime.threads`: as many pieces are merged side by side.

    Returns:
        What of the new state is held already, and the workspace.
    """
    keeps = residency != "disk"
    moves = on_gpu and residency != "device"
    names = workload.layout.groups[group].tensors
    sizes: list[int] = []
    works: list[int] = []
    joined = 0
    for name in names:
        pieces = _pieces(workload, name)
        sizes += [FLOAT32 * elements for elements in pieces]
        works += [_piece_bytes(workload, plan, name, elements, moves) for elements in pieces]
        if len(pieces) > 1:
            joined += FLOAT32 * workload.elements(name)
    kept, most = 0, (0, 0)
    for first, size in enumerate(sizes):
        work = sum(works[first : first + threads])
        # Results that wait to be written: the one before, and one more where several run at once.
        waiting = 0 if keeps or first == 0 else sizes[first - 1]
        if threads > 1:
            waiting += max(sizes[max(0, first - 1) : first + 1])
        most = max(most, (kept, work + waiting), key=sum)
        kept += size if keeps else 0
    # At the end, tensors that were merged in pieces are joined while the pieces are still there.
    return max(most, (kept, joined if keeps else 0), key=sum)


def _piece_bytes(
    workload: Workload, plan: IterationPlan, name: str, elements: int, moves: bool
) -> int:
    """Workspace of one piece.

    Float32 inputs; with these their sum, a task vector, the rotated one and its correction; or the
    result and the states that it is compared with.
    """
    size = FLOAT32 * elements
    is_rotated = name in workload.layout.rotated

    def copies(states: Iterable[str]) -> int:
        return size * sum(moves or workload.dtype(s, name) != torch.float32 for s in states)

    inputs = copies(plan.inputs)
    merging = (4 if is_rotated else 2) * size
    merging += _factor_bytes(workload, plan, name) if is_rotated else 0
    comparing = size + copies({plan.previous, BASE} - set(plan.inputs))
    return inputs + max(merging, comparing)


def _factor_bytes(workload: Workload, plan: IterationPlan, name: str) -> int:
    """Activations in float32, and the factors of one rotation in float64."""
    d_out = workload.layout.shapes[name][0]
    columns = workload.samples * (FLOAT32 * len(plan.inputs) + 6 * FLOAT64)
    return ceil(d_out * columns)

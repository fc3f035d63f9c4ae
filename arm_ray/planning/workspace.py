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
        count, d_out, d_in = workload.layout.matrices_in(name)
        return [d_out * d_in] * count
    rows = (*workload.layout.shapes[name], 1)[0]
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
        What of the new state is held already where it is merged, and the workspace.
    """
    # In host memory a GPU's new state has no part of its own.
    keeps = residency == "device" or (residency == "host" and not on_gpu)
    moves = on_gpu and residency != "device"
    names = workload.layout.groups[group].tensors
    works: list[int] = []
    # Before each piece: what is held of the tensors so far.
    held: list[int] = []
    kept = 0
    for name in names:
        pieces = _pieces(workload, name)
        works += [_piece_bytes(workload, plan, name, elements, moves) for elements in pieces]
        # One piece becomes the tensor; more are put into their places in it.
        before, kept = kept, kept + (FLOAT32 * workload.elements(name) if keeps else 0)
        held += [before] if len(pieces) == 1 else [kept] * len(pieces)
    most = (kept, 0)
    for first, before in enumerate(held):
        most = max(most, (before, sum(works[first : first + threads])), key=sum)
    return most


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
    _, d_out, _ = workload.layout.matrices_in(name)
    columns = workload.samples * (FLOAT32 * len(plan.inputs) + 6 * FLOAT64)
    return ceil(d_out * columns)

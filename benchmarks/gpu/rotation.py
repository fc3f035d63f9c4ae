"""The rotation on the device against the CPU in float64: error, signs, bits, seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from arm_ray.merging.rotation import activation_rotation
from benchmarks.common import timed
from benchmarks.gpu.rates import Rates

SAMPLES = 64
# Output and input widths of linear modules of 0.5B, 1.5B, 7B, 14B and 72B models.
SHAPES = [(896, 896), (1536, 1536), (3584, 3584), (5120, 5120), (13824, 5120), (8192, 29568)]
QUICK_SHAPES = [(96, 64), (200, 120)]


def measure(device: torch.device, rates: Rates, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each shape.

    The floor of the factorisation is its `4 d_out N²` operations at the float64 rate; that of the
    product the larger of its operations at the float32 rate and of reading the task vector twice
    and writing it once.
    """
    for shape in QUICK_SHAPES if quick else SHAPES:
        yield _measure(device, rates, *shape)


def _measure(device: torch.device, rates: Rates, d_out: int, d_in: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(d_out)
    shift = torch.randn(d_out, SAMPLES, generator=generator)
    task_vector = torch.randn(d_out, d_in, generator=generator)
    reference = activation_rotation(shift.double())
    assert reference is not None
    expected = reference.apply(task_vector.double())
    here, given = shift.to(device), task_vector.to(device)
    rotations = [activation_rotation(here) for _ in range(2)]
    first, second = rotations
    assert first is not None
    assert second is not None
    results = [first.apply(given), second.apply(given)]
    error = (results[0].cpu().double() - expected).norm() / expected.norm()
    factor_s = timed(lambda: activation_rotation(here), 10, 2, device)
    # Again and again of the same matrix: U is orthogonal, so that nothing grows.
    apply_s = timed(lambda: first.apply_(given), 10, 2, device)
    double = here.double()
    small = torch.geqrf(double)[0][:SAMPLES].triu()
    factor_floor = 4.0 * d_out * SAMPLES**2 / rates.fp64
    size = float(d_out * d_in)
    apply_floor = max(4.0 * size * SAMPLES / rates.fp32, 3.0 * 4.0 * size / rates.memory)
    return {
        "shape": f"{d_out} x {d_in}",
        "relative error": float(error),
        "diagonal not negative": bool((first.diagonal() > -1e-12).all()),
        "same bits twice": bool(torch.equal(*results)),
        "factorise, ms": 1e3 * factor_s,
        "of its floor": factor_s / factor_floor,
        "QR alone, ms": 1e3 * timed(lambda: torch.geqrf(double), 10, 2, device),
        "small SVD alone, ms": 1e3 * timed(lambda: torch.linalg.svd(small), 10, 2, device),
        "on the CPU, ms": 1e3 * timed(lambda: torch.linalg.svd(small.cpu()), 10, 2, device),
        "product, ms": 1e3 * apply_s,
        "of the product's floor": apply_s / apply_floor,
    }

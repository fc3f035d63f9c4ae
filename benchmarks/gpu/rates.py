"""What the device can do at best: the floors that everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import timed

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Rates:
    """Rates that were measured on this device.

    Attributes:
        bf16: Operations a second of a large square product, multiply and add as two.
        fp32: The same in float32, without TF32.
        fp64: The same in float64.
        memory: Bytes a second of a copy within its memory, read and written.
        to_host: Bytes a second to pageable host memory.
        from_host: Bytes a second from pageable host memory.
        from_locked: The same from page-locked memory.
    """

    bf16: float
    fp32: float
    fp64: float
    memory: float
    to_host: float
    from_host: float
    from_locked: float


def measure_rates(device: torch.device, *, quick: bool) -> Rates:
    """Products of 8192 × 8192 (float64: 4096), copies of 2 GB; small ones where it is quick."""
    torch.set_float32_matmul_precision("highest")
    products = {
        name: _product(device, dtype, 256 if quick else 4096 if name == "fp64" else 8192)
        for name, dtype in _DTYPES.items()
    }
    source = torch.randn(1 << (20 if quick else 29), device=device)
    target = torch.empty_like(source)
    host = torch.empty_like(source, device="cpu")
    num_bytes = source.nbytes

    def copied(to: Tensor, of: Tensor) -> float:
        return num_bytes / timed(lambda: to.copy_(of), 5, 2, device)

    return Rates(
        **products,
        memory=2.0 * copied(target, source),
        to_host=copied(host, source),
        from_host=copied(target, host),
        from_locked=copied(target, host.pin_memory() if device.type == "cuda" else host),
    )


def _product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # Random numbers: zeros use less power, and are multiplied faster.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / timed(lambda: torch.mm(a, b, out=out), 10, 3, device)

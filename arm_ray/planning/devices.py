"""What the machines that a plan may be made for can do.

Peak rates are the vendors' (data sheets named below, dense, without sparsity). What is marked
"measured" comes from `benchmarks/results/gpu-*.json` (one H100, 27 November 2026); everything
marked "assumed" is no vendor figure and was not measured here on such a machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from arm_ray.errors import ConfigError
from arm_ray.hardware import Units, cpu_units, gpu_units

GB = 1_000_000_000


@dataclass(frozen=True)
class Device:
    """Rates of one device (a GPU, or one CPU thread) and of the node it is in.

    Attributes:
        name: As `--device` takes it.
        is_gpu: Whether a shard has memory of its own beside the host's.
        memory_bytes: Of one GPU; of the node for a CPU.
        flops: Peak floating-point operations a second by dtype name.
        memory_bandwidth: Bytes a second.
        host_bandwidth: Bytes a second between host and device memory; unused on a CPU.
        link_bandwidth: Bytes a second between two shards on one node.
        network_bandwidth: Bytes a second between two shards on two nodes.
        disk_read: Bytes a second of a node's storage.
        disk_write: The same.
        launch_s: Seconds to start one small operation.
        factorisation_s: Seconds of a QR and a small SVD beside their operations.
        call_s: Seconds of a core that Ray needs to bring hidden states to a shard's next call.
        forward_efficiency: Fraction of the peak that the forward pass reaches.
        merge_efficiency: Fraction of the peak that the thin float32 products reach.
        factor_efficiency: Fraction of the float64 peak that the QR of a tall matrix reaches.
        bandwidth_efficiency: Fraction of each bandwidth that is reached.
        forward_scale: Measured seconds of forward passes over those that all this comes to.
        rotation_scale: The same of factorisations and their products.
        elementwise_scale: The same of the rest of a merge.
    """

    name: str
    is_gpu: bool
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bandwidth: float
    host_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    disk_read: float
    disk_write: float
    launch_s: float
    factorisation_s: float
    call_s: float = 0.0
    forward_efficiency: float = 0.4
    merge_efficiency: float = 0.4
    factor_efficiency: float = 0.02
    bandwidth_efficiency: float = 0.7
    forward_scale: float = 1.0
    rotation_scale: float = 1.0
    elementwise_scale: float = 1.0

    @property
    def units(self) -> Units:
        """What it multiplies by itself: a GPU of those here, all formats; a CPU, this machine's."""
        return gpu_units((8, 0), self.name) if self.is_gpu else cpu_units()


# NVIDIA H100 Tensor Core GPU data sheet, SXM5: bf16 989.5 TFLOP/s dense (1979 with sparsity),
# float32 67, float64 34, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe 5 128 GB/s both ways.
# Network: one 400 Gb/s adapter for each GPU, as in the NVIDIA DGX H100 data sheet.
_H100 = Device(
    name="h100-80gb",
    is_gpu=True,
    memory_bytes=80 * GB,
    flops={"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 34e12},
    memory_bandwidth=3.35e12,
    # One direction; from page-locked memory 0.85 of it was measured, from pageable 0.15.
    host_bandwidth=64e9,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
    # Assumed: local NVMe storage of a node. Network storage is often slower.
    disk_read=6e9,
    disk_write=3e9,
    # Assumed: CUDA kernels from Python.
    launch_s=6e-6,
    # Measured: 2.7 to 3.5 ms for 896 to 13824 rows and 64 columns.
    factorisation_s=3e-3,
    # Measured: 0.49 to 0.58 with the attention of 1024 tokens, eager.
    forward_efficiency=0.5,
)
# NVIDIA H200 Tensor Core GPU data sheet, SXM: as the H100, with 141 GB at 4.8 TB/s.
_H200 = replace(_H100, name="h200", memory_bytes=141 * GB, memory_bandwidth=4.8e12)
# NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM: bf16 312 TFLOP/s dense, float32 19.5,
# float64 9.7, 2.039 TB/s, NVLink 600 GB/s both ways, PCIe 4 64 GB/s both ways.
# Network: one 200 Gb/s adapter for each GPU, as in the NVIDIA DGX A100 data sheet.
_A100 = replace(
    _H100,
    name="a100-80gb",
    flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 9.7e12},
    memory_bandwidth=2.039e12,
    host_bandwidth=32e9,
    link_bandwidth=300e9,
    network_bandwidth=25e9,
)
# One CPU thread, assumed: 32 float32 operations a cycle (AVX2 with two FMA units) at 3 GHz; bf16
# and fp16 products at the same rate where there are vector units for them, else as much faster or
# slower as was measured (`Units.rate`). `this-cpu` measures instead.
_CPU = Device(
    name="cpu",
    is_gpu=False,
    memory_bytes=0,
    flops={"bfloat16": 96e9, "float16": 96e9, "float32": 96e9, "float64": 48e9},
    memory_bandwidth=10e9,
    host_bandwidth=10e9,
    link_bandwidth=2e9,
    network_bandwidth=1.25e9,
    disk_read=2e9,
    disk_write=1e9,
    launch_s=2e-6,
    factorisation_s=5e-3,
    # Measured: what two shards on two cores took longer with `host` than with `device`, for each of
    # the calls that there are more of (`benchmarks.plans --shards 2`, 30 November 2026).
    call_s=0.04,
    merge_efficiency=0.5,
    factor_efficiency=0.08,
)
DEVICES: dict[str, Device] = {d.name: d for d in (_H100, _A100, _H200, _CPU)}
MEASURED = "this-cpu"


def find_device(name: str, threads: int = 1) -> Device:
    """A device by name; a CPU's rates are those of so many threads, its memory this machine's.

    Raises:
        ConfigError: The name is not known.
    """
    if name != MEASURED and name not in DEVICES:
        raise ConfigError(
            f"the device {name!r} is not known",
            where="--device",
            got=name,
            expected=", ".join([*DEVICES, MEASURED]),
            hint="take the nearest, and give --gpu-memory for its memory",
        )
    if name in DEVICES and DEVICES[name].is_gpu:
        return DEVICES[name]
    device = replace(_CPU, memory_bytes=_machine_memory())
    if name == MEASURED:
        return _measured(device, threads)
    rate = device.units.rate
    return replace(device, flops={k: threads * v * rate(k) for k, v in device.flops.items()})


def _machine_memory() -> int:
    """Physical memory of this machine, or the limit of the container we are in; bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(memory, int(file.read()))
    except (OSError, ValueError):  # no such limit, or "max"
        return memory


def _measured(device: Device, threads: int) -> Device:
    """The same with measured rates of matrix products and of memory; takes about a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        flops = {
            name: _product_flops(getattr(torch, name))
            for name in ("bfloat16", "float16", "float32", "float64")
        }
        source = torch.zeros(1 << 24)
        target = torch.zeros(1 << 24)
        bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    # The rates are reached ones already; the forward pass is no pure product.
    return replace(
        device,
        name=MEASURED,
        flops=flops,
        memory_bandwidth=bandwidth,
        bandwidth_efficiency=1.0,
    )


def _product_flops(dtype: torch.dtype) -> float:
    left = torch.ones(512, 512, dtype=dtype)
    return 2 * 512**3 / _best(lambda: left @ left)


def _best(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best

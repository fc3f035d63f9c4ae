"""Which number formats a device multiplies by itself: from what it says it can, never by timing.

A processor without units for a format computes with it all the same, many times slower. Nothing
heavy is imported here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"
# How much slower a matrix product is than in float32 where there are no units for the format:
# 156 GFLOP/s against 17 and 21, torch 2.13 on two cores of an EPYC with AVX2, 2026-11-26.
SLOWER = {BFLOAT16: 156 / 17, FLOAT16: 156 / 21}
# How much faster it is with matrix units (AMX): 1,035 to 1,107 GFLOP/s against 157, bfloat16, torch
# 2.13 on one core of a Xeon, 2026-12-01. Two virtual cores of one real one may share its unit.
FASTER = 1035 / 157

# Flag of /proc/cpuinfo -> the format that it multiplies, and the least oneDNN ISA that uses it.
_X86 = {
    "avx512_bf16": (BFLOAT16, "AVX512_CORE_BF16"),
    "amx_bf16": (BFLOAT16, "AVX512_CORE_AMX"),
    "avx512_fp16": (FLOAT16, "AVX512_CORE_FP16"),
    "amx_fp16": (FLOAT16, "AVX512_CORE_AMX_FP16"),
}
_ARM = {"bf16": BFLOAT16, "asimdhp": FLOAT16}
# Values of ONEDNN_MAX_CPU_ISA, each with all before it; one that is not here sets no limit.
_ISAS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
)
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# GPUs of before compute capability 8.0, by Ray's names of accelerators.
_OLD_GPUS = ("K80", "P4", "P100", "T4", "V100")


@dataclass(frozen=True)
class Units:
    """What a device multiplies by itself.

    Attributes:
        formats: Of `float32`, `bfloat16`, `float16`.
        where: The device, in words: "this CPU".
        is_limited: Whether an environment variable keeps it from more.
        matrix_formats: Those of a CPU that it has matrix units for.
    """

    formats: frozenset[str]
    where: str
    is_limited: bool = False
    matrix_formats: frozenset[str] = frozenset()

    def rate(self, name: str) -> float:
        """How many times as fast as in float32 a CPU's matrix products are, about."""
        if name in self.matrix_formats:
            return FASTER
        return 1.0 if name in self.formats else 1.0 / SLOWER.get(name, 1.0)

    def choose(self, *preferred: str) -> tuple[str, str]:
        """The first format that the device multiplies by itself, else float32; and why."""
        for name in preferred:
            if name == FLOAT32:
                return name, "as the model is stored"
            if name in self.formats:
                return name, f"{self.where} multiplies {name} by itself"
        limit = " that the environment allows" if self.is_limited else ""
        return FLOAT32, f"{self.where} has no {' or '.join(preferred)} units{limit}"

    def warning(self, name: str) -> str | None:
        """What to say of a format that was asked for; None where the device multiplies it."""
        if name in self.formats or name == FLOAT32:
            return None
        return (
            f"{name} was asked for, and {self.where} has no units for it: matrix products are "
            f"about {SLOWER[name]:.0f} times slower than in float32; `auto` takes float32"
        )


def cpu_units(cpuinfo: str | None = None, environ: Mapping[str, str] | None = None) -> Units:
    """Of this machine's CPU, within the limit that its environment sets for oneDNN.

    Args:
        cpuinfo: Content of /proc/cpuinfo; None reads it. What cannot be read has no units.
        environ: The environment; None: of this process.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    environ = os.environ if environ is None else environ
    limit = next((environ[name].upper() for name in _LIMITS if environ.get(name)), "")
    allowed = _ISAS.index(limit) if limit in _ISAS else len(_ISAS)
    # All cores of a machine say the same; a core that can less decides.
    lists = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = frozenset.intersection(*(frozenset(text.split()) for text in lists or [""]))
    able = {flag: _X86[flag][0] for flag in flags if flag in _X86}
    used = {flag: name for flag, name in able.items() if _ISAS.index(_X86[flag][1]) <= allowed}
    arm = {_ARM[flag] for flag in flags if flag in _ARM}
    return Units(
        frozenset({FLOAT32, *used.values(), *arm}),
        "this CPU",
        is_limited=set(used.values()) != set(able.values()),
        matrix_formats=frozenset(name for flag, name in used.items() if flag.startswith("amx_")),
    )


def gpu_units(capability: Sequence[int] | None, name: str) -> Units:
    """Of an NVIDIA GPU.

    Args:
        capability: Compute capability, major and minor; None: by the name.
        name: Of the GPU, or Ray's name of the accelerator: "V100".
    """
    if capability is None:
        words = set(re.split(r"[^A-Za-z0-9]+", name.upper()))
        capability = (7, 0) if words & set(_OLD_GPUS) else (8, 0)
    formats = {FLOAT32}
    if tuple(capability) >= (7, 0):
        formats.add(FLOAT16)
    if tuple(capability) >= (8, 0):
        formats.add(BFLOAT16)
    return Units(frozenset(formats), name or "this GPU")


def own_gpu_units() -> Units | None:
    """Of this machine's first GPU; None where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return gpu_units(torch.cuda.get_device_capability(), torch.cuda.get_device_name())


def all_of(found: Sequence[Units], where: str) -> Units:
    """What all of several devices multiply by themselves."""
    return Units(
        frozenset.intersection(*(units.formats for units in found)),
        where,
        is_limited=any(units.is_limited for units in found),
        matrix_formats=frozenset.intersection(*(units.matrix_formats for units in found)),
    )


def cpu_model() -> str:
    """Name of this machine's processor, as it says itself."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()

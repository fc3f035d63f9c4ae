"""What a device multiplies by itself: decided from its flags, the same on every machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arm_ray.hardware import FASTER, SLOWER, Units, all_of, cpu_units, gpu_units
from tests.builders.paths import ROOT

# As Linux has it; only what matters here, and what could be taken for it.
EPYC_AVX2 = "processor : 0\nflags\t\t: fpu fma f16c avx avx2 sha_ni vaes\n"
EPYC_AVX512 = "flags\t\t: avx2 avx512f avx512bw avx512_vnni avx512_bf16 avx512_vp2intersect\n"
XEON_AMX = "flags\t\t: avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8\n"
XEON_AVX512 = "flags\t\t: avx2 avx512f avx512bw avx512vl avx512_vnni\n"
GRAVITON_2 = "Features\t: fp asimd aes crc32 atomics fphp asimdhp cpuid asimddp\n"
GRAVITON_3 = "Features\t: fp asimd fphp asimdhp asimddp sve i8mm bf16 dgh rng\n"
ALL = {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize(
    ("text", "limit", "formats"),
    [
        (EPYC_AVX2, "", {"float32"}),
        (EPYC_AVX512, "", {"float32", "bfloat16"}),
        (XEON_AMX, "", ALL),
        (XEON_AVX512, "", {"float32"}),
        (GRAVITON_2, "", {"float32", "float16"}),
        (GRAVITON_3, "", ALL),
        ("", "", {"float32"}),
        # Cores of two kinds: all of them must.
        (EPYC_AVX512 + EPYC_AVX2, "", {"float32"}),
        (EPYC_AVX512, "AVX2", {"float32"}),
        (EPYC_AVX512, "avx512_core", {"float32"}),
        (EPYC_AVX512, "AVX512_CORE_BF16", {"float32", "bfloat16"}),
        (EPYC_AVX512, "DEFAULT", {"float32", "bfloat16"}),
        (XEON_AMX, "AVX512_CORE_BF16", {"float32", "bfloat16"}),
        (XEON_AMX, "AVX512_CORE_FP16", ALL),
        (XEON_AMX, "AVX512_CORE_VNNI", {"float32"}),
    ],
)
def test_flags_of_cpus(text: str, limit: str, formats: set[str]) -> None:
    units = cpu_units(text, {"ONEDNN_MAX_CPU_ISA": limit})
    assert units.formats == formats
    assert cpu_units(text, {"DNNL_MAX_CPU_ISA": limit}) == units


@pytest.mark.parametrize(
    ("text", "limit", "formats"),
    [
        (XEON_AMX, "", {"bfloat16"}),
        (XEON_AMX, "AVX512_CORE_AMX", {"bfloat16"}),
        (XEON_AMX, "AVX512_CORE_FP16", set()),
        (XEON_AMX + EPYC_AVX512, "", set()),
        (EPYC_AVX512, "", set()),
        (GRAVITON_3, "", set()),
    ],
)
def test_matrix_units(text: str, limit: str, formats: set[str]) -> None:
    assert cpu_units(text, {"ONEDNN_MAX_CPU_ISA": limit}).matrix_formats == formats


def test_rates_of_products_by_what_a_cpu_has_for_them() -> None:
    amx, vector, slow = (cpu_units(text, {}) for text in (XEON_AMX, EPYC_AVX512, EPYC_AVX2))
    assert (amx.rate("bfloat16"), amx.rate("float16")) == (FASTER, 1.0)
    assert (vector.rate("bfloat16"), slow.rate("bfloat16")) == (1.0, 1.0 / SLOWER["bfloat16"])
    assert {units.rate(n) for units in (amx, slow) for n in ("float32", "float64")} == {1.0}


@pytest.mark.parametrize(
    ("capability", "name", "formats"),
    [
        ((6, 0), "Tesla P100", {"float32"}),
        ((7, 0), "Tesla V100", {"float32", "float16"}),
        ((8, 0), "NVIDIA A100", ALL),
        ((9, 0), "NVIDIA H100", ALL),
        (None, "V100", {"float32", "float16"}),
        (None, "T4", {"float32", "float16"}),
        (None, "H100", ALL),
        (None, "A100-80G", ALL),
        (None, "NVIDIA-TESLA-P100", {"float32", "float16"}),
        (None, "the next one", ALL),
    ],
)
def test_generations_of_gpus(capability: tuple[int, int], name: str, formats: set[str]) -> None:
    assert gpu_units(capability, name).formats == formats


def test_what_is_chosen_and_said() -> None:
    slow, fast = cpu_units(EPYC_AVX2, {}), cpu_units(EPYC_AVX512, {})
    assert slow.choose("bfloat16") == ("float32", "this CPU has no bfloat16 units")
    assert fast.choose("bfloat16") == ("bfloat16", "this CPU multiplies bfloat16 by itself")
    assert fast.choose("float16", "bfloat16")[0] == "bfloat16"
    assert slow.choose("float16", "bfloat16") == (
        "float32",
        "this CPU has no float16 or bfloat16 units",
    )
    assert fast.choose("float32") == ("float32", "as the model is stored")
    capped = cpu_units(EPYC_AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert capped.choose("bfloat16")[1].endswith("units that the environment allows")
    assert not cpu_units(EPYC_AVX2, {"ONEDNN_MAX_CPU_ISA": "AVX2"}).is_limited


def test_a_slow_format_is_warned_of_with_the_factor() -> None:
    slow, fast = cpu_units(EPYC_AVX2, {}), cpu_units(EPYC_AVX512, {})
    assert "no units for it: matrix products are about 9 times slower" in str(
        slow.warning("bfloat16")
    )
    assert "about 7 times slower" in str(fast.warning("float16"))
    assert fast.warning("bfloat16") is None
    assert slow.warning("float32") is None


def test_several_devices_do_what_all_of_them_do() -> None:
    found = [cpu_units(EPYC_AVX512, {}), cpu_units(EPYC_AVX2, {})]
    assert all_of(found, "a CPU") == Units(frozenset({"float32"}), "a CPU")


def test_the_environment_of_a_process_makes_it_a_slow_one() -> None:
    """The variable with which the slow kind of machine is emulated; torch's own word agrees."""
    program = (
        "import torch; from arm_ray.hardware import cpu_units; "
        "print(cpu_units().choose('bfloat16')[0], torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["float32", "False"]

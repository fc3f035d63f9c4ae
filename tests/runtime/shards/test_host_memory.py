"""Host memory of the weights of a layer group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from arm_ray.runtime.shards.weights import host_memory

CPU = torch.device("cpu")
MB = 1 << 20


def resident() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("large", [False, True])
def test_tensors_do_not_share_a_byte(large: bool) -> None:
    side = 700 if large else 7
    wanted = {
        "a": ((side, side), torch.float32),
        "b": ((side,), torch.bfloat16),
        "none": ((0, 4), torch.float32),
        "c": ((3, 5, side), torch.float16),
        "number": ((), torch.float64),
    }
    found = host_memory(wanted, CPU)
    assert list(found) == list(wanted)
    for number, (name, (shape, dtype)) in enumerate(wanted.items()):
        tensor = found[name]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        tensor.fill_(number + 1)
    for number, tensor in enumerate(found.values()):
        assert torch.equal(tensor, torch.full_like(tensor, number + 1))
    if large:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux")
def test_memory_goes_back_with_the_last_tensor() -> None:
    count = 64 * MB // 4 // 64
    before = resident()
    found = host_memory({str(i): ((count,), torch.float32) for i in range(64)}, CPU)
    for tensor in found.values():
        tensor.fill_(1.0)
    assert resident() - before > 60 * MB
    kept = found.pop("7")
    found.clear()
    del tensor
    # They come and go together: while one is there, all are.
    assert resident() - before > 60 * MB
    assert float(kept.sum()) == count
    del kept
    assert resident() - before < 8 * MB


def test_a_small_group_of_a_large_state_costs_no_mapping() -> None:
    found = host_memory({"a": ((3,), torch.float32)}, CPU)
    assert found["a"].untyped_storage().nbytes() == 12

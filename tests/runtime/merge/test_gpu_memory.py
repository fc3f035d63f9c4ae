"""GPUs that are too small for their shards are refused before any weights are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arm_ray.errors import PlacementError
from arm_ray.planning.memory import actor_memory
from arm_ray.planning.sources import workload_of
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.specs import check_gpu_memory
from arm_ray.runtime.shards.meter import DeviceMemory, device_memory
from tests.builders.merge_case import MergeCase

GB = 10**9


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
@pytest.mark.parametrize(("sharing", "count"), [("auto", 1), (0.5, 2)])
def test_what_is_needed_what_there_is_and_what_would_fit(
    case: MergeCase, operator: str, sharing: str | float, count: int
) -> None:
    config = case.make().config(f"runtime.gpus_per_shard={sharing}", f"method.operator={operator}")
    inputs = open_inputs(config)
    workload = workload_of(config, inputs.layout, inputs.checkpoints)
    shares = [[0], [1]]
    needs = [
        actor_memory(workload, groups, config.runtime, on_gpu=True).limiting.total
        for groups in shares
    ]

    def check(first: float, second: float) -> None:
        found = [DeviceMemory("a card", 80 * GB, round(n * count)) for n in (first, second)]
        check_gpu_memory(config, inputs, shares, found)

    # A plan may be wrong by a tenth.
    check(needs[0], 0.92 * needs[1])
    with pytest.raises(PlacementError, match="a GPU is too small for its layer shard") as info:
        check(needs[0], 0.9 * needs[1])
    error = info.value
    free = f"{0.9 * needs[1] * count / GB:.2f} GB free of 80.00"
    assert error.where == "shard 2 of 2 (layers 1-1), a card"
    assert error.got == free + (", for 2 shards" if count == 2 else "")
    assert str(error.expected).startswith(f"{needs[1] / GB:.2f} GB: process 1.00, ")
    assert str(error.expected).endswith(" with runtime.residency: device")
    # CUDA alone takes more than nine tenths of this.
    assert str(error.hint).startswith("what would fit: no residency fits on any number of them")


def test_another_residency_is_named(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    config = case.make().config()
    inputs = open_inputs(config)
    real = actor_memory

    def more(workload: Any, groups: Any, runtime: Any, *, on_gpu: bool) -> Any:
        found = real(workload, groups, runtime, on_gpu=on_gpu)
        size = 90 * GB if runtime.residency == "device" else 20 * GB
        return SimpleNamespace(
            limiting=SimpleNamespace(total=size, terms={"merged states": size}), host=found.host
        )

    for module in ("runtime.merge.specs", "planning.cluster"):
        monkeypatch.setattr(f"arm_ray.{module}.actor_memory", more)
    with pytest.raises(PlacementError) as info:
        check_gpu_memory(config, inputs, [[0, 1]], [DeviceMemory("a card", 80 * GB, 79 * GB)])
    assert info.value.where == "shard 1 of 1 (layers 0-1), a card"
    assert "runtime.residency=host on 1 GPU(s) of 79.00 GB" in str(info.value.hint)
    assert "runtime.residency=device" not in str(info.value.hint)


def test_memory_that_this_process_has_already_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (30 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 40 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    found = device_memory(torch.device("cuda", 0))
    assert found == DeviceMemory("a card", 80 * GB, 70 * GB)

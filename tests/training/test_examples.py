"""The examples' own configurations and data, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_ray.jobs import grpo, sft
from tests.builders.paths import ROOT
from tests.builders.training import logged, make_base

COMMON = ("steps=2", "save_steps=[1, 2]", "runtime.cpus_per_worker=1", "log_every=1")


@pytest.mark.parametrize(
    ("job", "file", "weights"),
    [
        (sft, "math-sft/sft.yaml", "model.safetensors"),
        (sft, "lora/sft.yaml", "adapter_model.safetensors"),
        (grpo, "grpo/grpo.yaml", "model.safetensors"),
    ],
)
def test_an_example_runs(
    job: object,
    file: str,
    weights: str,
    tmp_path: Path,
    trainers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    base, output = make_base(tmp_path / "base"), tmp_path / "out"
    more = ["max_completion_length=8"] if job is grpo else ["max_length=1024"]
    command = [f"examples/training/{file}", f"model={base}", f"output={output}", *COMMON, *more]
    assert job.main(command) == 0  # type: ignore[attr-defined]
    assert [entry["step"] for entry in logged(output)] == [1, 2]
    assert (output / "checkpoint-2" / weights).is_file()

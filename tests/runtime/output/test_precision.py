"""What `auto` comes to, and that a run keeps it wherever it goes on."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arm_ray.config import EvaluateConfig, validate
from arm_ray.errors import RunDirectoryError
from arm_ray.events import read_events
from arm_ray.hardware import Units
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.devices import find_device
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.output import precision
from arm_ray.runtime.scoring.evaluate import evaluate
from arm_ray.runtime.train import run as training
from arm_ray.runtime.train.workers import Workers
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.training import content, make_base, make_config, make_rows
from tests.doubles.said import reporter_into

FAST = Units(frozenset({"float32", "bfloat16"}), "this CPU")
SLOW = Units(frozenset({"float32"}), "this CPU")
USERS = ("merge.run", "train.run", "scoring.service")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the work be on a machine of one kind or the other."""

    def be(units: Units) -> None:
        for user in USERS:
            monkeypatch.setattr(f"arm_ray.runtime.{user}.units_of", lambda _device: units)
        monkeypatch.setattr("arm_ray.planning.devices.cpu_units", lambda: units)

    return be


def lines() -> Console:
    return Console(file=StringIO(), width=300)


def text(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def began(directory: Path) -> str:
    return str(json.loads((directory / "precision.json").read_text())["dtype"])


def dtypes_of_runs(run: Path) -> list[str]:
    events = read_events(run / "events.jsonl")
    return [e["compute_dtype"] for e in events if e["event"] == "run_started"]


@pytest.mark.usefixtures("shards_in_process")
@pytest.mark.parametrize(
    ("stored", "first", "other", "dtype"),
    [
        (torch.bfloat16, SLOW, FAST, "float32"),
        (torch.bfloat16, FAST, SLOW, "bfloat16"),
        (torch.float32, FAST, SLOW, "float32"),
    ],
)
def test_a_merge_keeps_what_it_began_with(
    case: MergeCase, machine: Any, stored: torch.dtype, first: Units, other: Units, dtype: str
) -> None:
    case.make(dtype=stored)
    machine(first)
    console = lines()
    merge(case.config(), console=console, stop_after=2)
    assert f"precision: {dtype} (auto: " in text(console)
    assert began(case.root / "run") == dtype
    machine(other)
    console = lines()
    merge(case.config(), console=console, stop_after=3)
    assert f"precision: {dtype} (auto: as the run began)" in text(console)
    # What it came to may also be said; something else is another run.
    merge(case.config(f"precision.compute_dtype={dtype}"), console=lines(), stop_after=3)
    changed = "bfloat16" if dtype == "float32" else "float32"
    with pytest.raises(RunDirectoryError, match=f"compute_dtype: {dtype} -> {changed}"):
        merge(case.config(f"precision.compute_dtype={changed}"), console=lines())
    # A run of a version that did not record it.
    (case.root / "run" / "precision.json").unlink()
    merge(case.config(), console=lines())
    assert set(dtypes_of_runs(case.root / "run")) == {dtype}


@pytest.mark.usefixtures("shards_in_process")
def test_a_slow_format_is_warned_of_in_a_merge(case: MergeCase, machine: Any) -> None:
    case.make()
    machine(SLOW)
    merge(case.config("precision.compute_dtype=bfloat16"), console=lines(), stop_after=1)
    events = read_events(case.root / "run" / "events.jsonl")
    said = [e["message"] for e in events if e["event"] == "warning"]
    assert [text for text in said if "about 9 times slower" in text]
    assert dtypes_of_runs(case.root / "run") == ["bfloat16"]


@pytest.mark.usefixtures("trainers")
@pytest.mark.parametrize("trainers", ["in process"], indirect=True)
def test_a_training_keeps_what_it_began_with(tmp_path: Path, machine: Any) -> None:
    values = content(
        make_base(tmp_path / "base"), make_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    )
    values.pop("precision")

    def told(*overrides: str) -> str:
        console = lines()
        training.run_sft(make_config(values, *overrides), console=console)
        return text(console)

    machine(SLOW)
    assert "precision: float32 (auto: this CPU has no bfloat16 units)" in told("stop_after=3")
    machine(FAST)
    assert "precision: float32 (auto: as the run began)" in told()
    assert began(tmp_path / "out") == "float32"
    # Said or not, it is the same run; and something else is another one.
    assert "nothing to do" in told("precision=float32")
    with pytest.raises(RunDirectoryError, match="precision: float32 -> bfloat16"):
        told("precision=bfloat16")
    # A run of before there was `auto` has it in its configuration alone.
    (tmp_path / "out" / "precision.json").unlink()
    file = tmp_path / "out" / "config.yaml"
    file.write_text(file.read_text().replace("precision: auto", "precision: float32"))
    assert "precision: float32" in file.read_text()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    assert "precision: float32 (auto: as the run began)" in told()
    values["output"] = str(tmp_path / "fast")
    told("steps=2", "save_steps=2")
    assert began(tmp_path / "fast") == "bfloat16"


def test_zero_3_on_cpus_trains_in_float32(tmp_path: Path, machine: Any) -> None:
    machine(FAST)
    values = content(tmp_path, tmp_path, tmp_path / "out") | {"precision": "auto"}
    config = make_config(values, "runtime.zero_stage=3")
    workers = Workers(2, "cpu", 1)
    settled = training._with_precision(config, "auto", None, workers, reporter_into([]))
    assert settled.precision == "float32"


@pytest.mark.usefixtures("local_ray", "engines")
@pytest.mark.parametrize("engines", ["plain"], indirect=True)
def test_what_is_scored_in_one_directory_is_scored_in_one_format(
    case: MergeCase, machine: Any
) -> None:
    case.make(sizes=SERVED, dtype=torch.bfloat16)

    def scored(**models: str) -> tuple[str, str]:
        task = {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")}
        given = {
            "models": {name: str(case.root / path) for name, path in models.items()},
            "output": str(case.root / "scores"),
            "tokenizer": str(case.root / "base"),
            "evaluation": {
                "tasks": [task],
                "engine": {"kv_cache_gb": 0.05, "max_model_len": 64},
                "resamples": 200,
            },
        }
        console = lines()
        found = evaluate(validate(EvaluateConfig, given, source="test"), console=console)
        return found["base"]["held"].digest, text(console)

    machine(SLOW)
    before, said = scored(base="base")
    assert "engines: precision: float32 (auto: this CPU has no bfloat16 units)" in said
    machine(FAST)
    after, said = scored(base="base", later="checkpoint-10")
    assert "engines: precision: float32 (auto: as the run began)" in said
    assert after == before
    assert began(case.root / "scores") == "float32"


def test_a_plan_takes_what_the_merge_will_take(case: MergeCase, machine: Any) -> None:
    case.make(dtype=torch.bfloat16)
    config = case.config()
    for units, dtype in ((SLOW, "float32"), (FAST, "bfloat16")):
        machine(units)
        cluster = make_cluster(config.runtime, device="cpu")
        plan = make_plan(config, cluster)
        assert plan.model.compute_dtype == dtype
        said = [note for note in plan.assumptions if "forward pass is in float32" in note]
        assert len(said) == (units is SLOW)
    # GPUs multiply it, whatever this machine does.
    machine(SLOW)
    plan = make_plan(config, make_cluster(config.runtime, gpus=1))
    assert plan.model.compute_dtype == "bfloat16"


def test_assumed_rates_of_a_cpu_without_units_are_lower(machine: Any) -> None:
    machine(SLOW)
    slow = find_device("cpu").flops
    assert slow["bfloat16"] == pytest.approx(slow["float32"] * 17 / 156)
    machine(FAST)
    fast = find_device("cpu").flops
    assert fast["bfloat16"] == fast["float32"]
    assert fast["float16"] < fast["float32"]


def test_of_a_cluster_all_nodes_count(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    [node] = precision.ray.nodes()
    monkeypatch.setattr(precision, "all_of", lambda found, where: (len(found), where))
    assert isinstance(precision.units_of("cpu"), Units)
    monkeypatch.setattr(precision.ray, "nodes", lambda: [node, node])
    assert precision.units_of("cpu") == (2, "the cluster's CPUs")

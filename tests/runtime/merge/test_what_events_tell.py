"""What the events of a merge say about its modules, its shards and its plan: the right numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arm_ray.config import MergeConfig
from arm_ray.events import read_events
from arm_ray.merging.rotation import activation_rotation, minimal_rotation
from arm_ray.model.changes import module_name
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.report.page.write import REPORT_NAME
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from tests.builders.checkpoints import load_all
from tests.builders.merge_case import MergeCase
from tests.builders.merges import state

LINEAR = "method.operator=task_arithmetic"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges are made in this process."""
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def merged(config: MergeConfig) -> list[dict[str, Any]]:
    merge(config, console=Console(quiet=True))
    return read_events(Path(config.output) / "events.jsonl")


def iterations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "iteration_finished"]


@pytest.mark.parametrize(
    "overrides",
    [("method.operator=arm",), (LINEAR,), ("method.operator=arm", "runtime.residency=disk")],
)
def test_update_and_distance_are_norms_of_the_states(
    case: MergeCase, overrides: tuple[str, ...]
) -> None:
    config = case.make(num_layers=2).config(*overrides)
    told = iterations(merged(config))
    base = {name: t.double() for name, t in load_all(case.root / "base").items()}
    before = base
    for number, event in enumerate(told, start=1):
        after = {name: t.double() for name, t in state(config, number).items()}
        found = {(m["layer"], m["module"]): m for m in event["modules"]}
        names = [name for name, tensor in after.items() if tensor.ndim > 1]
        assert len(found) == len(names)
        for name in names:
            layer = int(name.split(".")[2]) if ".layers." in name else None
            entry = found[layer, module_name(name, layer)]
            update = (after[name] - before[name]).norm() / before[name].norm()
            distance = (after[name] - base[name]).norm() / after[name].norm()
            assert entry["update"] == pytest.approx(float(update), rel=1e-3)
            assert entry["distance"] == pytest.approx(float(distance), rel=1e-3)
        before = after


def test_only_what_was_rotated_has_an_angle_and_a_spectrum(case: MergeCase) -> None:
    case.make(num_layers=2)
    for operator in ("arm", "task_arithmetic"):
        config = case.config(f"method.operator={operator}", output=operator)
        for event in iterations(merged(config)):
            rotated = [m for m in event["modules"] if m["angle"] is not None]
            assert bool(rotated) == (operator == "arm")
            for entry in rotated:
                assert entry["layer"] is not None
                assert 0.0 < entry["angle"] < 180.0
                assert 1 <= len(entry["spectrum"]) <= 16
                assert entry["spectrum"] == sorted(entry["spectrum"], reverse=True)
                # Eight samples an iteration.
                assert 1.0 <= entry["rank"] <= 8.0
            others = [m for m in event["modules"] if m["angle"] is None]
            assert all(m["spectrum"] == [] and m["rank"] is None for m in others)


@pytest.mark.parametrize(("rows", "columns"), [(24, 20), (40, 5), (6, 20), (16, 16)])
@pytest.mark.parametrize("sign", ["positive_diagonal", "library"])
def test_what_is_told_of_a_rotation(rows: int, columns: int, sign: Any) -> None:
    shift = torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    rotation = activation_rotation(shift, sign=sign)
    assert rotation is not None
    matrix = rotation.apply(torch.eye(rows, dtype=torch.float64))
    assert rotation.facts.mean_diagonal == pytest.approx(float(matrix.trace()) / rows)
    assert rotation.facts.rank == min(rows, columns)
    sigma = torch.linalg.svdvals(shift).tolist()
    told = rotation.facts.spectrum
    assert len(told) == min(16, len(sigma))
    assert (told[0], told[-1]) == (pytest.approx(sigma[0]), pytest.approx(sigma[-1]))
    assert all(any(math.isclose(value, s) for s in sigma) for value in told)


def test_what_is_told_of_a_minimal_rotation() -> None:
    generator = torch.Generator().manual_seed(5)
    shift, vector = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (3, 9))
    rotation = minimal_rotation(shift, vector)
    assert rotation is not None
    matrix = rotation.apply(torch.eye(12, dtype=torch.float64))
    assert rotation.facts.mean_diagonal == pytest.approx(float(matrix.trace()) / 12)
    assert rotation.facts.spectrum == pytest.approx(torch.linalg.svdvals(shift).tolist())


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_spans_are_as_long_as_the_shards_were_busy(case: MergeCase, operator: str) -> None:
    events = merged(case.make(num_layers=2).config(f"method.operator={operator}"))
    [started] = [e["time"] for e in events if e["event"] == "run_started"]
    spans = [s for event in iterations(events) for s in event["spans"][0]]
    busy = sum(sum(event["busy_seconds"]) for event in iterations(events))
    assert {kind for kind, _, _ in spans} == (
        {"forward", "merge"} if operator == "arm" else {"merge"}
    )
    # Pauses of up to 20 ms between two pieces of work count as work.
    assert sum(seconds for _, _, seconds in spans) >= busy - 0.05 * len(spans)
    assert all(started - 60.0 < begin < events[-1]["time"] for _, begin, _ in spans)


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_the_plan_that_is_written_down_is_that_of_the_command(
    case: MergeCase, operator: str
) -> None:
    config = case.make(num_layers=2).config(f"method.operator={operator}")
    events = merged(config)
    [planned] = [e for e in events if e["event"] == "run_planned"]
    plan = make_plan(config, make_cluster(config.runtime))
    assert planned["device"] == plan.device
    assert planned["iteration_seconds"] == [
        round(i.seconds + i.step_s + i.compare_s, 3) for i in plan.iterations
    ]
    assert planned["peak_shard_bytes"] == [s.memory.host.total for s in plan.shards]
    assert planned["written_bytes"] == sum(i.written_bytes for i in plan.iterations)


def test_a_merge_writes_its_report(case: MergeCase, report_pages: None) -> None:
    config = case.make(num_layers=2).config(LINEAR)
    merged(config)
    text = (Path(config.output) / REPORT_NAME).read_text(encoding="utf-8")
    assert "State-0004 is the model; nothing says yet" in text


def test_a_report_that_fails_is_a_warning_and_no_more(
    case: MergeCase, report_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_runs: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("arm_ray.report.page.write.write_report", fail)
    config = case.make(num_layers=2).config(LINEAR)
    events = merged(config)
    assert [e["event"] for e in events][-2:] == ["run_finished", "warning"]
    assert events[-1]["message"].startswith("the report is not written: RuntimeError: no ink; ")
    assert (Path(config.output) / "model").is_dir()


def test_a_merge_that_cannot_be_planned_is_made_all_the_same(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("rates")

    monkeypatch.setattr("arm_ray.runtime.merge.controller.planned", fail)
    config = case.make(num_layers=2).config(LINEAR)
    events = merged(config)
    assert "the merge could not be planned: 'rates'" in [e.get("message") for e in events]
    assert (Path(config.output) / "model").is_dir()

"""Candidates by a run's directory and a range of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import parse_merge_config
from arm_ray.errors import ConfigError


def candidates_of(given: Any) -> list[str]:
    content = {"base": "b", "output": "o", "candidates": given, "calibration": None}
    content["method"] = {"operator": "task_arithmetic"}
    return [Path(path).name for path in parse_merge_config(content).candidates]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1000, 50, 100, 150, 200, 250):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "checkpoint-300").write_text("a file")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("others", "steps"),
    [
        ({}, [50, 100, 150, 200, 250, 1000]),
        ({"from": 100}, [100, 150, 200, 250, 1000]),
        ({"from": 100, "to": 250, "every": 50}, [100, 150, 200, 250]),
        ({"from": 100, "every": 100}, [100, 200, 1000]),
        ({"to": 100}, [50, 100]),
        ({"from": 150, "to": 150}, [150]),
    ],
)
def test_a_range_is_in_the_order_of_its_steps(run: Path, others: dict[str, int], steps) -> None:
    assert candidates_of({"run": str(run), **others}) == [f"checkpoint-{s}" for s in steps]


def test_ranges_and_directories_may_stand_together(run: Path) -> None:
    given = ["/somewhere/else", {"run": str(run), "from": 200, "to": 300}]
    assert candidates_of(given) == ["else", "checkpoint-200", "checkpoint-250"]


@pytest.mark.parametrize("name", ["global_step_{}", "global_step{}", "global_step{}_hf", "step_{}"])
def test_names_of_other_trainers(tmp_path: Path, name: str) -> None:
    for step in (20, 10):
        (tmp_path / name.format(step)).mkdir()
    assert candidates_of({"run": str(tmp_path)}) == [name.format(10), name.format(20)]


@pytest.mark.parametrize(
    "given",
    [
        {"from": 1},
        {"run": "x", "til": 3},
        {"run": "x", "from": "1"},
        {"run": "x", "every": 0},
        {"run": "x", "from": True},
        {"run": "s3://bucket/run"},
        {"run": 3},
    ],
)
def test_what_is_no_range(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not written as one"):
        candidates_of(given)


def test_a_range_without_a_checkpoint_says_what_is_there(run: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint") as caught:
        candidates_of({"run": str(run), "from": 300, "to": 400})
    assert "50, 100, 150, 200, 250, 1000" in (caught.value.got or "")
    with pytest.raises(ConfigError, match="holds no checkpoint") as caught:
        candidates_of({"run": str(run / "nothing")})
    assert "no directory whose name ends in a step" in (caught.value.got or "")


def test_a_step_that_is_there_twice_is_refused(run: Path) -> None:
    (run / "global_step_100").mkdir()
    with pytest.raises(ConfigError, match="more than once") as caught:
        candidates_of({"run": str(run)})
    assert caught.value.got == "checkpoint-100, global_step_100"
    assert candidates_of({"run": str(run), "from": 150, "to": 200}) == [
        "checkpoint-150",
        "checkpoint-200",
    ]

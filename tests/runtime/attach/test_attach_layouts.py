"""Following runs in the layouts of trainers that do not run here, as their libraries write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from arm_ray.following import publish
from arm_ray.following.config import parse_attach_config
from arm_ray.runtime.attach.run import attach
from tests.builders.checkpoints import load_all

pytestmark = pytest.mark.usefixtures("shards_in_process")


def verl(shards: Path, run: Path) -> list[str]:
    shutil.copytree(shards / "fsdp-1d-tied" / "global_step_7", run / "global_step_7")
    shutil.copytree(shards / "fsdp-2d-tied" / "global_step_7", run / "global_step_14")
    # The third is being written: the tracker does not name it.
    shutil.copytree(run / "global_step_14", run / "global_step_21")
    (run / "latest_checkpointed_iteration.txt").write_text("14")
    return ["fsdp-1d-tied", "fsdp-2d-tied"]


def openrlhf(shards: Path, run: Path) -> list[str]:
    for step, stage in ((7, 2), (14, 3)):
        target = run / "_actor" / f"global_step{step}"
        shutil.copytree(shards / f"zero-{stage}-tied" / "checkpoint-2" / "global_step2", target)
        (target / "metric.json").write_text('{"metric": 0.5}')
    # Of the third there is no metric yet.
    third = run / "_actor" / "global_step21"
    shutil.copytree(run / "_actor" / "global_step14", third)
    (third / "metric.json").unlink()
    return ["zero-2-tied", "zero-3-tied"]


def fsdp(shards: Path, run: Path) -> list[str]:
    for step in (7, 14, 21):
        target = run / f"checkpoint-{step}"
        shutil.copytree(shards / "dcp-tied" / "checkpoint-3", target)
        (target / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    # Of the third a file is missing.
    next((run / "checkpoint-21" / "pytorch_model_fsdp_0").glob("__1_*")).unlink()
    return ["dcp-tied", "dcp-tied"]


@pytest.mark.parametrize("write", [verl, openrlhf, fsdp])
def test_two_checkpoints_are_merged_and_the_third_is_not_taken(
    shards: Path, tmp_path: Path, write: Callable[[Path, Path], list[str]]
) -> None:
    run, published, base = tmp_path / "run", tmp_path / "published", shards / "base-tied"
    members = write(shards, run)
    config = parse_attach_config(
        {
            "run": {"path": str(run), "poll_s": 0.1, "start": "all", "last_step": 14},
            "merge": {
                "base": str(base),
                "method": {"operator": "task_arithmetic", "coefficient": 0.5},
                "runtime": {"layer_shards": 2},
            },
            "publish": {"dir": str(published), "promote": "always"},
        }
    )
    outcome = attach(config, console=Console(file=StringIO(), width=200))
    assert outcome.reason == "finished"
    assert list(publish.published(published)) == [14]
    assert publish.evidence(published / "step-000014")["members"].keys() == {
        "step-000007", "step-000014",
    }  # fmt: skip
    found, before = load_all(published / "step-000014"), load_all(base)
    weights = [load_file(shards / "truth" / name / "truth.safetensors") for name in members]
    for name, value in found.items():
        expected = before[name] + 0.25 * sum(given[name] - before[name] for given in weights)
        assert (value - expected).abs().max() < 1e-6, name

"""Shards on the GPUs of two nodes, as Ray places them; declared GPUs, computation on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from arm_ray.config import parse_merge_config
from arm_ray.runtime.merge.run import merge
from tests.builders.merge_case import MergeCase
from tests.builders.paths import ROOT

pytestmark = pytest.mark.usefixtures("shards_in_process")


def test_eight_shards_on_two_nodes_of_four_gpus(case: MergeCase) -> None:
    case.make("smollm2", num_layers=8)
    content = case.content("eight")
    content["runtime"]["device"] = "cpu"
    content["schedule"] = {"anchor_iterations": 2, "max_iterations": 2, "step": "fixed"}
    # Where they are is the subject: without forward passes they start faster.
    content["method"] = {"operator": "task_arithmetic"}
    file = case.root / "eight.yaml"
    file.write_text(yaml.safe_dump(content))
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("placement_script.py")), str(file)],
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == [4, 4]
    assert found["left"] == []
    assert found["shards of half a GPU"] == 16
    error = found["error"]
    assert "did not place 8 layer shards within 3 s" in error
    assert "8 times 1 CPU, 2 GPU" in error
    assert "8 GPU on 3 node(s)" in error
    one = {**content, "output": str(case.root / "one"), "runtime": {"layer_shards": 1}}
    one["runtime"]["micro_batch_tokens"] = content["runtime"]["micro_batch_tokens"]
    merge(parse_merge_config(one), console=Console(quiet=True))
    left, right = (
        load_file(case.root / name / "model" / "model.safetensors") for name in ("one", "eight")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)

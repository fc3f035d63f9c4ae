"""Same inputs, same bits: every word of docs/determinism.md, and what it does not promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from arm_ray.config import MergeConfig
from arm_ray.config.runtime import RuntimeConfig
from arm_ray.identity import decides
from tests.builders.checkpoints import assert_same_bits, load_all, relative_error
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run
from tests.builders.models import SERVED
from tests.builders.paths import ROOT
from tests.doubles import in_process

pytestmark = pytest.mark.usefixtures("shards_in_process")

PAGE = ROOT / "docs" / "determinism.md"
# Of each key that is said to decide nothing: other values than the plain run's.
OTHERS: dict[str, tuple[str, ...]] = {
    "layer_shards": ("runtime.layer_shards=3",),
    "layers_per_group": ("runtime.layers_per_group=2",),
    "balance": ("runtime.balance=work", "runtime.layer_shards=3"),
    "partition": ("runtime.partition=looped", "runtime.layer_shards=2"),
    "groups_per_turn": (
        *("runtime.groups_per_turn=2", "runtime.partition=looped", "runtime.layer_shards=2"),
    ),
    "residency": ("runtime.residency=disk",),
    "lookahead": ("runtime.lookahead=0", "runtime.layer_shards=2"),
    "recovery_every": ("runtime.recovery_every=1", "keep_states=none"),
    "max_weight_file_gb": ("runtime.max_weight_file_gb=0.0001",),
    "placement_timeout_s": ("runtime.placement_timeout_s=7",),
    "disk_mb_per_s": ("runtime.disk_mb_per_s=50",),
    "storage": ("runtime.storage=shared", "runtime.layer_shards=2"),
    "max_recoveries": ("runtime.max_recoveries=0",),
    "elastic": ("runtime.elastic=false",),
}
# The same for keys that only actors have a use for: all at once, because those take time to start.
OF_ACTORS: dict[str, str] = {
    "transport": "runtime.transport=object_store",
    "scratch": "runtime.scratch=SCRATCH",
    "placement_strategy": "runtime.placement_strategy=PACK",
    "resources": "runtime.resources={somewhere: 1}",
    "memory_gb": "runtime.memory_gb=2",
    "niceness": "runtime.niceness=3",
}
# And for what needs GPUs, which a test only declares.
OF_GPUS = {
    "gpus_per_shard": "tests/runtime/shards/test_placement.py::"
    "test_eight_shards_on_two_nodes_of_four_gpus"
}


def others(case: MergeCase, key: str, overrides: Sequence[str], output: str) -> MergeConfig:
    """A configuration in which the key has another value than in the plain one."""
    config = case.config(*overrides, output=output)
    plain = case.config().runtime
    assert getattr(config.runtime, key) != getattr(plain, key), f"runtime.{key} is as before"
    return config


def test_keys_that_decide_nothing_change_no_bit(case: MergeCase) -> None:
    case.make("qwen3", num_layers=4, dtype=torch.bfloat16)
    expected = load_all(run(case.config(output="plain")).run / "model")
    for key, overrides in OTHERS.items():
        outcome = run(others(case, key, overrides, key))
        assert_same_bits(expected, load_all(outcome.run / "model"))


@pytest.mark.actors
def test_keys_that_only_actors_have_a_use_for_change_no_bit(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("qwen3", num_layers=4, dtype=torch.bfloat16)
    two = ("runtime.layer_shards=2", "runtime.storage=per_node")
    given = [text.replace("SCRATCH", str(case.root / "scratch")) for text in OF_ACTORS.values()]
    for key in OF_ACTORS:
        others(case, key, (*two, *given), "actors")
    outcome = run(case.config(*two, *given, output="actors"))
    monkeypatch.setattr("arm_ray.runtime.merge.controller.placed_shards", in_process.placed_shards)
    expected = run(case.config(output="plain"))
    assert_same_bits(load_all(expected.run / "model"), load_all(outcome.run / "model"))


def test_every_key_that_decides_nothing_is_tried() -> None:
    nothing = {
        key
        for key in RuntimeConfig.model_fields
        if decides(MergeConfig, ("runtime", key)) == "nothing"
    }
    assert nothing == OTHERS.keys() | OF_ACTORS.keys() | OF_GPUS.keys()


def test_the_page_names_tests_that_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    named |= {tuple(reference.split("::")) for reference in OF_GPUS.values()}
    assert len(named) > len(OF_GPUS)
    for file, name in named:
        assert re.search(rf"def {name}\b", (ROOT / file).read_text(encoding="utf-8")), (file, name)


# What a merge does in a process of its own, whose environment says what its processor can do.
SCRIPT = """
import sys, yaml
from rich.console import Console
from arm_ray.config import parse_merge_config
from arm_ray.runtime.merge.run import merge
merge(parse_merge_config(yaml.safe_load(open(sys.argv[1]))), console=Console(quiet=True))
"""
# As of a processor without vector units of 256 bits and more.
OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
OLDER |= {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"}


@pytest.mark.minutes
def test_threads_micro_batches_and_the_processor_are_not_promised(
    case: MergeCase, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change last bits and no more: why they are keys of the result, or of the machine."""
    case.make(num_layers=2, rows=48, sizes={**SERVED, "hidden_size": 256})

    def merged(name: str, env: dict[str, str], **runtime: int) -> dict[str, torch.Tensor]:
        content = case.content(name)
        content["runtime"] |= runtime
        content["schedule"] |= {"max_iterations": 2}
        file = case.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(file)],
            cwd=ROOT,
            env={**clean, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return load_all(case.root / name / "model")

    plain = merged("plain", {})
    assert_same_bits(plain, merged("again", {}))
    changed = {
        "threads": merged("threads", {}, threads=2),
        "micro_batch_tokens": merged("batches", {}, micro_batch_tokens=256),
        "an older processor": merged("older", OLDER),
    }
    differ = {}
    for name, model in changed.items():
        differ[name] = sum(not torch.equal(plain[key], model[key]) for key in plain)
        assert max(relative_error(model[key], plain[key]) for key in plain) < 1e-4, name
    with capsys.disabled():
        print(f"\nof {len(plain)} tensors, with other bits: {json.dumps(differ)}")
    assert differ["micro_batch_tokens"]
    assert differ["an older processor"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same_bits_twice_and_not_those_of_a_cpu(case: MergeCase) -> None:
    case.make(num_layers=2, sizes=SERVED)
    models = {}
    for name, device in (("cpu", "cpu"), ("first", "cuda"), ("second", "cuda")):
        run(case.config(f"runtime.device={device}", output=name))
        models[name] = load_file(Path(case.root) / name / "model" / "model.safetensors")
    assert_same_bits(models["first"], models["second"])
    for name, tensor in models["cpu"].items():
        assert relative_error(models["first"][name], tensor) < 1e-3, name

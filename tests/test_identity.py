"""Which keys decide a result, over all configurations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import MergeConfig, config_difference, parse_merge_config, state_settings
from arm_ray.evaluation.settings import EngineSettings
from arm_ray.following.config import AttachConfig
from arm_ray.identity import flat, identity
from arm_ray.training.config import SftConfig

BASE: dict[str, Any] = {
    "base": "/b",
    "candidates": ["/c"],
    "output": "/o",
    "calibration": {"path": "x.jsonl"},
}
TASK = {"tasks": [{"name": "held", "type": "loss", "path": "x.jsonl"}]}
# Keys of `runtime` that have an influence on the bits.
BITS = {"runtime.threads", "runtime.micro_batch_tokens", "runtime.device"}


def merge(*overrides: str, **more: Any) -> MergeConfig:
    return parse_merge_config({**BASE, **more}, overrides)


def test_what_decides_a_merged_state() -> None:
    keys = set(state_settings(merge(evaluation=TASK)))
    assert {key for key in keys if key.startswith("runtime.")} == BITS
    assert {"base", "candidates", "method.coefficient", "schedule.window_size"} <= keys
    assert {"calibration.seed", "precision.compute_dtype", "tokenizer", "initial_state"} <= keys
    nothing = {"output", "keep_states", "preset", "output_format", "adapter_rank"}
    assert not nothing & keys
    assert not [key for key in keys if key.startswith(("evaluation", "tracking"))]


@pytest.mark.parametrize(
    ("override", "before", "after"),
    [
        ("method.coefficient=0.5", True, True),
        ("runtime.threads=3", True, True),
        ("runtime.layer_shards=3", False, False),
        ("output=/elsewhere", False, False),
        ("keep_states=none", False, False),
        ("tracking.run=name", False, False),
        ("evaluation.every=2", False, False),
        # These decide what is published, and so nothing before it is.
        ("evaluation.select.by=held", False, True),
        ("output_format=adapter", False, True),
    ],
)
def test_a_run_goes_on_only_where_nothing_that_decides_differs(
    override: str, before: bool, after: bool
) -> None:
    old, new = merge(evaluation=TASK), merge(override, evaluation=TASK)
    key = override.split("=", maxsplit=1)[0]
    for published, expected in ((False, before), (True, after)):
        found = config_difference(old, new, published=published)
        assert [line.split(":")[0] for line in found] == ([key] if expected else [])


def test_a_dtype_that_was_settled_is_no_difference() -> None:
    auto, settled = merge(), merge("precision.compute_dtype=bfloat16")
    assert config_difference(auto, settled) == []
    assert config_difference(merge("precision.compute_dtype=float32"), settled) != []


def test_what_decides_what_an_engine_says() -> None:
    settings = EngineSettings()
    given = set(asdict(settings)) - set(settings.identity())
    assert given == {
        "replicas", "gpus_per_engine", "resources", "placement_timeout_s", "timeout_s",
    }  # fmt: skip


def test_what_decides_trained_weights() -> None:
    content = {
        "model": "/m", "output": "/o", "data": {"path": "x"}, "learning_rate": 1e-4, "steps": 4,
        "save_steps": 2,
    }  # fmt: skip
    config = SftConfig.model_validate({**content, "output": Path("/o")})
    every, deciding = set(config.model_dump()), set(config.identity())
    assert every - deciding == {
        "output", "log_every", "stop_after", "preset", "micro_batch_size", "save_total_limit",
        "tracking", "optimizer_from",
    }  # fmt: skip
    assert set(config.identity()["runtime"]) == {"zero_stage"}
    # Where it is given it decides.
    begun = config.model_copy(update={"optimizer_from": Path("/run/checkpoint-2")})
    assert begun.identity()["optimizer_from"] == "/run/checkpoint-2"


def test_what_decides_a_stream_of_arrivals() -> None:
    content = {
        "run": {"path": "/r", "kind": "auto", "poll_s": 3.0},
        "merge": {"base": "/b", "method": {"coefficient": 0.5}, "runtime": {"threads": 2}},
        "publish": {"dir": "/p", "keep": 3},
        "evaluation": {**TASK, "select": {"by": "held"}, "every": 2},
        "sharing": {"use_gpus": True},
        "output": None,
    }
    assert set(dict(flat(identity(AttachConfig, content)))) == {
        "run.path", "run.kind", "merge.base", "merge.method.coefficient", "publish.dir",
        "evaluation.tasks", "evaluation.select.by",
    }  # fmt: skip

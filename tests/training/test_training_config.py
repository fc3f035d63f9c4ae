"""Configurations of the training jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import ConfigError
from arm_ray.training.config import (
    GrpoConfig,
    SftConfig,
    learning_rate_factor,
    parse_training_config,
)
from tests.builders.training import make_config

CONTENT: dict[str, Any] = {
    "model": "base", "output": "out", "data": {"path": "rows.jsonl"}, "learning_rate": 1e-3,
    "steps": 6, "save_steps": [3, 6], "warmup_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learning_rat=1", "learning_rate"),
        ("data.columm=x", "data.columm"),
        ("batch_size=0", "batch_size"),
        ("save_steps=[3, 7]", "save_steps"),
        ("save_steps=0", "save_steps"),
        ("epochs=2", "exactly one"),
        ("steps=null", "exactly one"),
        ("runtime.zero_gather=false", "zero_stage"),
        ("runtime.workers=3", "no multiple of 3"),
        ("micro_batch_size=3", "micro_batch_size"),
        ("preset=paper/sft", "did you mean 'paper/sft-"),
        ("lora.rang=3", "rank"),
    ],
)
def test_wrong_keys_and_values_are_named(override: str, named: str) -> None:
    values = CONTENT if "micro" not in override else {**CONTENT, "runtime": {"workers": 2}}
    with pytest.raises(ConfigError, match=named):
        make_config(values, override)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(CONTENT, "learning_rate=0", "schedule=cosin", "runtime.zero_stage=2")
    assert all(key in str(caught.value) for key in ("learning_rate", "schedule", "zero_stage"))
    with pytest.raises(ConfigError) as caught:
        make_config(CONTENT, "epochs=1", "runtime.offload=cpu")
    assert all(key in str(caught.value) for key in ("steps, epochs", "runtime.offload"))


def test_presets_are_the_papers_and_the_file_takes_precedence() -> None:
    values = {**CONTENT, "preset": "paper/sft-lora", "save_steps": 10}
    for key in ("steps", "learning_rate"):
        values.pop(key)
    config = make_config(values)
    assert (config.learning_rate, config.batch_size, config.epochs) == (1e-5, 128, 5.0)
    assert (config.max_length, config.precision, config.runtime.zero_stage) == (8192, "bfloat16", 3)
    assert config.lora is not None
    assert config.lora.rank == 16
    assert make_config({**values, "preset": "paper/sft-full"}).lora is None
    fewer = make_config({**values, "steps": 20, "batch_size": 64})
    assert (fewer.steps, fewer.epochs, fewer.batch_size) == (20, None, 64)


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    import yaml

    config = make_config({**CONTENT, "lora": {}}, "stop_after=4")
    again = parse_training_config(SftConfig, yaml.safe_load(config.to_yaml()))
    assert again == config


def test_sessions_end_at_stop_after_with_a_checkpoint() -> None:
    assert make_config(CONTENT).session_saves(6) == [3, 6]
    assert make_config(CONTENT, "stop_after=4").session_saves(6) == [3, 4]
    assert make_config(CONTENT, "stop_after=9").session_saves(6) == [3, 6]
    assert make_config(CONTENT, "save_steps=2").session_saves(7) == [2, 4, 6]


def test_learning_rates_follow_their_formulas() -> None:
    rates = {
        name: [learning_rate_factor(make_config(CONTENT, f"schedule={name}"), s, 6)
               for s in range(1, 7)]
        for name in ("constant", "linear", "cosine")
    }  # fmt: skip
    assert rates["constant"] == [0.5, 1, 1, 1, 1, 1]
    assert rates["linear"] == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])
    assert rates["cosine"] == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_grpo_batches_hold_whole_groups() -> None:
    with pytest.raises(ConfigError, match="num_generations"):
        parse_training_config(GrpoConfig, {**CONTENT, "batch_size": 12})

"""Presets: every one is a configuration that can be run, and the user's keys come first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import (
    MergeConfig,
    config_difference,
    load_merge_config,
    parse_merge_config,
)
from arm_ray.errors import ConfigError
from arm_ray.merging.method import open_method
from arm_ray.presets import PRESETS, merged
from arm_ray.schedule import merge_sizes

EVERY = sorted(PRESETS)
# The others look at no activations.
CALIBRATED = {name for name in EVERY if any(part in name for part in ("/arm", "aim", "acm"))}


def content(preset: str | None, **sections: Any) -> dict[str, Any]:
    given = {
        "base": "base",
        "candidates": ["one", "two"],
        "output": "out",
        "preset": preset,
        **copy.deepcopy(sections),
    }
    if preset in CALIBRATED and "calibration" not in given:
        given["calibration"] = {"path": "train.jsonl"}
    return given


def parse(preset: str | None, *overrides: str, **sections: Any) -> MergeConfig:
    return parse_merge_config(content(preset, **sections), overrides)


def leaves(part: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(part, dict):
        return {prefix[:-1]: part}
    found: dict[str, Any] = {}
    for key, value in part.items():
        found.update(leaves(value, f"{prefix}{key}."))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_every_preset_is_a_method_on_a_schedule(name: str) -> None:
    config = parse(name)
    assert config.preset == name
    assert config.method.needs_calibration == (name in CALIBRATED)
    sizes = merge_sizes(config.schedule, len(config.candidates))
    open_method(config.method, *sizes, has_window=config.schedule.has_window)
    resolved = leaves(config.model_dump(mode="json"))
    for key, value in leaves(PRESETS[name]).items():
        assert resolved[key] == value, key


@pytest.mark.parametrize("name", EVERY)
def test_the_resolved_configuration_reads_back_the_same(name: str, tmp_path: Path) -> None:
    config = parse(name, "schedule.tolerance=0", "keep_states=last")
    text = config.to_yaml()
    assert f"preset: {name}\n" in text
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_merge_config(file) == config
    # All keys are in it, so that the name adds nothing.
    without = load_merge_config(file, ["preset=null"])
    assert without.model_copy(update={"preset": name}) == config
    assert config_difference(without, config) == []


def test_what_the_rows_are() -> None:
    rows = {
        name: (
            c.method.operator,
            c.method.edit,
            c.method.coefficient,
            c.method.rotates,
            c.schedule.anchor_iterations,
            c.schedule.max_iterations,
        )
        for name, c in ((name, parse(name)) for name in EVERY)
    }
    baselines = ("task_arithmetic", "ties", "dare", "aim", "acm")
    expected = {
        "paper/arm": ("arm", "none", 0.7, True, 3, 6),
        "paper/arm-anchoring": ("arm", "none", 0.7, True, 6, 6),
        "paper/arm-window": ("arm", "none", 0.7, True, 0, 6),
        "paper/arm-single-turn": ("arm", "none", 0.7, True, 1, 1),
        "paper/timber": ("task_arithmetic", "timber", 1.0, False, 1, 1),
        "paper/pome": ("task_arithmetic", "pome", 1.0, False, 1, 1),
        "paper/arm-timber": ("arm", "timber", 1.0, True, 1, 1),
        "paper/arm-pome": ("arm", "pome", 1.0, True, 1, 1),
    }
    for operator in baselines:
        row = operator.replace("_", "-")
        expected[f"paper/{row}"] = (operator, "none", 0.7, False, 1, 1)
        expected[f"paper/streaming-{row}"] = (operator, "none", 0.7, False, 3, 6)
    assert rows == expected


def test_the_hyperparameters_of_the_paper() -> None:
    config = parse("paper/arm")
    assert config.calibration is not None
    assert config.calibration.batch_size == 64
    assert (config.schedule.window_size, config.schedule.window_divisor) == (2, "n")
    assert parse("paper/ties").method.ties.keep == 0.2
    assert parse("paper/dare").method.dare.drop_rate == 0.9
    assert parse("paper/aim").method.aim.omega == 0.4


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("paper/arm", ["schedule.window_divisor", "method.rotation.sign"]),
        ("paper/streaming-task-arithmetic", ["method.task_arithmetic.reduce"]),
        ("paper/ties", ["method.ties.keep", "method.ties.scope", "method.coefficient"]),
        ("paper/dare", ["method.dare.then", "method.dare.seed"]),
        ("paper/aim", ["method.aim.on", "method.aim.activations_of", "method.ties.scope"]),
        ("paper/acm", ["method.acm.t", "method.acm.shift", "method.acm.on"]),
        ("paper/timber", ["method.timber.gamma", "method.coefficient"]),
        ("paper/arm-pome", ["method.pome.scale", "method.pome.tensors", "method.rotation.sign"]),
    ],
)
def test_what_the_paper_leaves_open_is_written_out(name: str, keys: list[str]) -> None:
    assert set(keys) <= leaves(PRESETS[name]).keys()


def test_the_user_s_keys_win_and_overrides_win_over_both() -> None:
    schedule = {"max_iterations": 4, "anchor_iterations": 2}
    config = parse(
        "paper/arm",
        "schedule.max_iterations=5",
        "method.rotation.sign=library",
        schedule=schedule,
        calibration={"path": "x", "batch_size": 8},
    )
    assert (config.schedule.anchor_iterations, config.schedule.max_iterations) == (2, 5)
    assert config.schedule.window_size == 2
    assert config.method.rotation.sign == "library"
    assert config.calibration is not None
    assert config.calibration.batch_size == 8


def test_null_is_a_value_that_wins() -> None:
    operator = {"operator": "task_arithmetic"}
    config = parse("paper/arm", calibration=None, method=operator)
    assert config.calibration is None
    assert not config.method.rotates


def test_a_preset_can_be_an_override() -> None:
    config = parse(None, "method.ties.keep=0.8", "preset=paper/ties")
    assert (config.method.operator, config.method.ties.keep) == ("ties", 0.8)
    assert config.schedule.max_iterations == 1
    assert parse("paper/ties", "preset=paper/dare").method.operator == "dare"
    plain = {"operator": "ties"}
    assert parse("paper/ties", "preset=null", method=plain).schedule.max_iterations == 6


def test_without_a_preset_the_defaults_stay() -> None:
    plain = parse_merge_config(content("paper/arm") | {"preset": None})
    assert plain.preset is None
    # The paper's steps have one length; without a preset, the data choose it.
    assert config_difference(plain, parse("paper/arm")) == ["schedule.step: subspace -> fixed"]


def test_neither_content_nor_preset_is_changed() -> None:
    given = content("paper/arm", schedule={"max_iterations": 4})
    before, presets = copy.deepcopy(given), copy.deepcopy(PRESETS)
    parse_merge_config(given, ["method.rotation.sign=library"])
    assert given == before
    assert presets == PRESETS


def test_merging_goes_key_by_key() -> None:
    under = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": {"d": 1}}
    over = {"a": {"y": {"w": 3}}, "b": [3], "c": None, "e": {"f": 4}}
    expected = {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [3], "c": None, "e": {"f": 4}}
    assert merged(under, over) == expected


def test_an_unknown_preset_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper/streaming-ties'") as caught:
        parse_merge_config(content("paper/streaming_ties"), source="here.yaml")
    assert caught.value.where == "here.yaml: preset"
    assert all(name in (caught.value.expected or "") for name in EVERY)
    with pytest.raises(ConfigError) as caught:
        parse_merge_config(content("1234567"))
    assert caught.value.what == "there is no preset '1234567'"


def test_a_preset_that_is_no_name_is_a_wrong_value() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merge_config({**content(None), "preset": 5, "calibration": {"path": "x"}})
    assert "preset: got 5 (int)" in caught.value.what


def test_calibration_data_is_still_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merge_config({"base": "b", "candidates": ["c"], "output": "o", "preset": "paper/arm"})
    assert "calibration.path: required, but absent" in caught.value.what


def test_another_preset_is_a_difference_by_its_keys_alone() -> None:
    one, other = parse("paper/ties"), parse("paper/streaming-ties")
    assert config_difference(one, other) == [
        "schedule.anchor_iterations: 1 -> 3",
        "schedule.max_iterations: 1 -> 6",
    ]

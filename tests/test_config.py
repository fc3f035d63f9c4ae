"""Configurations: what is refused, with which words, and what a run is identified by."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from arm_ray.config import (
    MergeConfig,
    config_difference,
    load_merge_config,
    parse_merge_config,
    read_yaml,
)
from arm_ray.config.reading import apply_override
from arm_ray.errors import ConfigError

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)


def content(**sections: Any) -> dict[str, Any]:
    """A valid configuration, sections replaced."""
    return {
        "base": "models/base",
        "candidates": ["run/checkpoint-10", "run/checkpoint-20"],
        "output": "run/merged",
        "calibration": {"path": "train.jsonl"},
        **copy.deepcopy(sections),
    }


def parse(*overrides: str, **sections: Any) -> MergeConfig:
    return parse_merge_config(content(**sections), overrides)


def problems(*overrides: str, **sections: Any) -> list[str]:
    """The lines of problems that the error lists."""
    with pytest.raises(ConfigError) as caught:
        parse(*overrides, **sections)
    return [line[4:] for line in caught.value.what.splitlines() if line.startswith("  - ")]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "merge.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ([], "subspace"),
        (["method.operator=task_arithmetic"], "subspace"),
        (["method.operator=task_arithmetic", "method.rotate=true"], "subspace"),
        (["method.operator=task_arithmetic", "calibration=null"], "fixed"),
        # Nobody has measured whether these gain.
        (["method.edit=timber"], "fixed"),
        (["method.operator=ties"], "fixed"),
        (["method.operator=average"], "fixed"),
        (["method.operator=dare"], "fixed"),
        (["schedule.step=fixed"], "fixed"),
        (["preset=paper/arm"], "fixed"),
        (["preset=paper/task-arithmetic"], "fixed"),
    ],
)
def test_steps_are_searched_by_default_where_that_is_known_to_gain(
    overrides: list[str], step: str
) -> None:
    config = parse(*overrides)
    assert config.schedule.step == step
    assert config.promises == (step == "subspace")
    # What is written down is what was done, whatever a later version's default is.
    assert f"step: {step}" in config.to_yaml()


def test_the_smallest_configuration_has_the_paper_s_settings() -> None:
    config = parse()
    assert (config.method.operator, config.method.coefficient) == ("arm", 0.7)
    assert (config.schedule.anchor_iterations, config.schedule.window_size) == (3, 2)
    assert (config.schedule.max_iterations, config.schedule.window_divisor) == (6, "n")
    assert config.calibration is not None
    assert config.calibration.batch_size == 64
    assert config.method.rotation.sign == "positive_diagonal"


def test_runs_of_older_versions_have_a_key_that_is_no_more() -> None:
    assert parse(precision={"merge_dtype": "float32"}) == parse()
    [line] = problems(precision={"merge_dtype": "bfloat16"})
    assert line.startswith("precision.merge_dtype")


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"candidate": ["x"]}, "candidate: unknown key; did you mean 'candidates'?"),
        (
            {"schedule": {"max_iteration": 3}},
            "schedule.max_iteration: unknown key; did you mean 'max_iterations'?",
        ),
        (
            {"calibration": {"path": "x", "batchsize": 3}},
            "calibration.batchsize: unknown key; did you mean 'batch_size'?",
        ),
        (
            {"method": {"rotation": {"signs": "library"}}},
            "method.rotation.signs: unknown key; did you mean 'sign'?",
        ),
        (
            {"method": {"rotation": {"xyz": 1}}},
            "method.rotation.xyz: unknown key; known here: variant, sign, rank_tolerance",
        ),
        ({"precision": {"dtype": "float32"}}, "precision.dtype: unknown key; did you mean"),
        ({"runtime": {"thread": 2}}, "runtime.thread: unknown key; did you mean 'threads'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(sections, problem: str) -> None:
    [found] = problems(**sections)
    assert found.startswith(problem)


@pytest.mark.parametrize("key", ["schedule.max_iterations", "foo.bar", "base.x", "a.b.c.d"])
def test_a_key_with_a_dot_in_it_is_an_unknown_key(key: str) -> None:
    [found] = problems(**{key: 3})
    assert found.startswith(f"{key}: unknown key")


def test_a_key_that_is_no_text_is_named() -> None:
    [found] = problems(schedule={5: 1})
    assert found.startswith("schedule.5: ")


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        ({"base": 5}, "base: got 5 (int); "),
        ({"base": None}, "base: got null; "),
        ({"candidates": "run/checkpoint-10"}, "candidates: got 'run/checkpoint-10' (str); "),
        ({"candidates": []}, "candidates: got [] (list); "),
        ({"candidates": ["a", 3]}, "candidates.1: got 3 (int); "),
        ({"schedule": {"max_iterations": "6"}}, "schedule.max_iterations: got '6' (str); "),
        ({"schedule": {"max_iterations": 6.0}}, "schedule.max_iterations: got 6.0 (float); "),
        ({"schedule": {"max_iterations": True}}, "schedule.max_iterations: got True (bool); "),
        ({"schedule": {"max_iterations": 0}}, "schedule.max_iterations: got 0 (int); "),
        ({"schedule": {"anchor_iterations": -1}}, "schedule.anchor_iterations: got -1 (int); "),
        ({"schedule": {"window_size": 1}}, "schedule.window_size: got 1 (int); "),
        ({"schedule": {"tolerance": 1.0}}, "schedule.tolerance: got 1.0 (float); "),
        ({"schedule": {"tolerance": float("nan")}}, "schedule.tolerance: got nan (float); "),
        ({"schedule": 5}, "schedule: got 5 (int); "),
        ({"schedule": [1]}, "schedule: got [1] (list); "),
        ({"method": {"coefficient": 0}}, "method.coefficient: got 0 (int); "),
        ({"method": {"coefficient": 10.1}}, "method.coefficient: got 10.1 (float); "),
        ({"method": {"coefficient": True}}, "method.coefficient: got True (bool); "),
        ({"calibration": {"path": "x", "batch_size": 0}}, "calibration.batch_size: got 0 (int); "),
        ({"calibration": {"path": "x", "shuffle": 1}}, "calibration.shuffle: got 1 (int); "),
        ({"calibration": {"path": "x", "seed": -1}}, "calibration.seed: got -1 (int); "),
        ({"calibration": {}}, "calibration.path: required, but absent"),
        ({"runtime": {"layer_shards": 0}}, "runtime.layer_shards: got 0 (int); "),
        ({"runtime": {"layer_shards": "many"}}, "runtime.layer_shards: got 'many' (str); "),
        ({"runtime": {"gpus_per_shard": -1.0}}, "runtime.gpus_per_shard: got -1.0 (float); "),
        ({"keep_states": "first"}, "keep_states: got 'first' (str); "),
    ],
)
def test_a_wrong_value_is_shown_with_its_type_and_key(sections, start: str) -> None:
    [found] = problems(**sections)
    assert found.startswith(start)
    assert "literal[" not in found
    assert "constrained-" not in found


def test_a_size_that_is_not_finite_is_refused_at_once() -> None:
    [found] = problems(runtime={"max_weight_file_gb": float("inf")})
    assert found.startswith("runtime.max_weight_file_gb: got inf")


def test_a_wrong_choice_names_the_nearest_one() -> None:
    [found] = problems(precision={"compute_dtype": "bfloat"})
    assert found.endswith("; did you mean 'bfloat16'?")
    [found] = problems(method={"operator": "task_aritmetic"})
    assert "known are arm, task_arithmetic, ties" in found
    assert found.endswith("; did you mean 'task_arithmetic'?")


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merge_config(
            {
                "candidates": [],
                "output": "o",
                "methd": {},
                "schedule": {"max_iterations": -1, "window": 3},
            },
            source="here.yaml",
        )
    error = caught.value
    assert error.what.startswith("the configuration has 5 problems\n")
    for key in ("base", "candidates", "methd", "schedule.max_iterations", "schedule.window"):
        assert f"\n  - {key}: " in error.what
    assert error.where == "here.yaml"
    assert error.hint is not None


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        ({"calibration": None}, "calibration: required by method.operator: arm"),
        (
            {"schedule": {"anchor_iterations": 2, "window_size": 4}},
            "schedule.window_size: got 4, but only 3 states exist",
        ),
        (
            {"schedule": {"anchor_iterations": 0, "window_size": 4}},
            "schedule.window_size: got 4, but only 3 states exist",
        ),
        (
            {"schedule": {"anchor_iterations": 0, "initial": "last_candidate"}},
            "schedule.initial: last_candidate needs anchored iterations",
        ),
        (
            {"candidates": ["a"], "schedule": {"initial": "last_candidate"}},
            "schedule.initial: last_candidate with a single candidate",
        ),
    ],
)
def test_combinations_that_cannot_be_are_refused(sections, start: str) -> None:
    [found] = problems(**sections)
    assert found.startswith(start)


def test_several_impossible_combinations_are_listed_at_once() -> None:
    found = problems(
        calibration=None,
        candidates=["a"],
        schedule={"anchor_iterations": 1, "window_size": 3, "initial": "last_candidate"},
    )
    assert [line.split(":")[0] for line in found] == [
        "schedule.window_size",
        "schedule.initial",
        "calibration",
    ]


def test_combinations_at_the_edge_are_allowed() -> None:
    parse(calibration=None, method={"operator": "task_arithmetic"})
    parse(schedule={"anchor_iterations": 3, "window_size": 4})
    parse(schedule={"anchor_iterations": 0, "window_size": 3})
    # Without a window its size does not matter.
    parse(schedule={"anchor_iterations": 2, "max_iterations": 2, "window_size": 9})
    assert parse(method={"coefficient": 1}).method.coefficient == 1.0


def test_overrides_set_nested_keys_and_take_precedence() -> None:
    config = parse(
        "schedule.max_iterations=4",
        "method.rotation.sign = library",
        "schedule.tolerance=1e-3",
        "method.coefficient=.5",
        "calibration.shuffle=false",
        "candidates=[a, b, c]",
        "output=some=where",
        "runtime={layer_shards: 2}",
        schedule={"max_iterations": 9, "anchor_iterations": 2},
    )
    assert (config.schedule.max_iterations, config.schedule.anchor_iterations) == (4, 2)
    assert config.method.rotation.sign == "library"
    assert config.schedule.tolerance == 1e-3
    assert config.method.coefficient == 0.5
    assert config.calibration is not None
    assert config.calibration.shuffle is False
    assert config.candidates == ["a", "b", "c"]
    assert config.output == "some=where"
    assert config.runtime.layer_shards == 2


def test_the_last_override_counts() -> None:
    assert parse("output=a", "output=b").output == "b"


def test_an_override_can_take_a_section_away() -> None:
    config = parse("calibration=null", "method.operator=task_arithmetic")
    assert config.calibration is None


def test_an_override_fills_an_empty_section(write) -> None:
    path = write("base: b\ncandidates: [c]\noutput: o\ncalibration:\nruntime:\n")
    config = load_merge_config(path, ["calibration.path=x.jsonl", "runtime.threads=2"])
    assert config.calibration is not None
    assert (config.calibration.path, config.runtime.threads) == ("x.jsonl", 2)


@pytest.mark.parametrize(
    "text", ["schedule.max_iterations", "", "=3", "schedule.=3", ".x=3", "a..b=3", "  =3"]
)
def test_a_malformed_override_is_shown_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood") as caught:
        parse(text)
    assert "section.key=value" in (caught.value.expected or "")
    assert repr(text) in caught.value.what


@pytest.mark.parametrize("text", ["base.x=3", "candidates.0=x", "schedule.window_size.y=1"])
def test_an_override_through_a_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="does not fit the file"):
        parse(text, schedule={"window_size": 2})


def test_an_override_of_an_unknown_key_is_an_unknown_key() -> None:
    [found] = problems("schedul.max_iterations=3")
    assert found == "schedul: unknown key; did you mean 'schedule'?"


@pytest.mark.parametrize("value", ["[1", "{a: 1, a: 2}", "'x", "!!python/name:os.system ''"])
def test_an_override_whose_value_is_no_yaml_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse(f"schedule.tolerance={value}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1e3),
        ("-2.5e2", -250.0),
        (".5e1", 5.0),
        ("1.e-2", 1e-2),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e-4x", "1e-4x"),
        ("'1e-4'", "1e-4"),
        ("12", 12),
        ("null", None),
        ("", None),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: object) -> None:
    parsed: dict[str, Any] = {}
    apply_override(parsed, f"x={text}")
    assert parsed == {"x": value}
    assert type(parsed["x"]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "base: a\nbase: b\n",
        "schedule:\n  tolerance: 1\n  tolerance: 1\n",
        "candidates: [{x: 1, x: 2}]\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(write, text: str) -> None:
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_merge_config(write(text))
    assert "stands twice" in (caught.value.got or "")


def test_keys_beside_a_merge_key_take_the_place_of_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "one: &one {a: 1, b: 2}\ntwo: &two\n  <<: *one\n  b: 3\n"
        "three: {<<: *two, a: 4}\nfour: *two\n"
    )
    assert read_yaml(file) == {
        "one": {"a": 1, "b": 2},
        "two": {"a": 1, "b": 3},
        "three": {"a": 4, "b": 3},
        "four": {"a": 1, "b": 3},
    }
    file.write_text("one: &one {a: 1}\ntwo:\n  <<: *one\n  b: 3\n  b: 4\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert "the key 'b' stands twice" in (caught.value.got or "")
    assert "line" in (caught.value.got or "")


@pytest.mark.parametrize(
    "text",
    [
        "base: [1",
        "a:\n\t- b",
        "a: !!python/object:os.system x",
        "output: 2024-13-01",  # looks like a date, and is none
    ],
)
def test_a_file_that_is_no_yaml_is_refused(write, text: str) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_merge_config(write(text))


@pytest.mark.parametrize(("text", "got"), [("", "nothing"), ("- a\n", "a list"), ("abc", "a text")])
def test_a_file_without_keys_is_refused(write, text: str, got: str) -> None:
    with pytest.raises(ConfigError, match="does not hold keys and values") as caught:
        load_merge_config(write(text))
    assert caught.value.got == got


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, write) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path, write(b"base: \xff\xfe")):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_merge_config(path)
        assert caught.value.where == str(path)


def test_defaults_written_out_read_back_the_same(write) -> None:
    config = parse()
    text = config.to_yaml()
    assert "coefficient: 0.7" in text
    assert "micro_batch_tokens" in text
    assert load_merge_config(write(text)) == config


# What YAML could take for something else than text.
texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
) | (
    st.sampled_from(
        ["yes", "no", "null", "~", "1_000", "0x1F", "2024-01-02", "1:30", "<<", "=", "#x", "'"]
    )
    | st.sampled_from(['"', "\\", "é/ü", "\u2028", "- a", "a: b", " x "])
)


@PROPERTY
@given(
    base=texts,
    candidates=st.lists(texts, min_size=1, max_size=3),
    path=texts,
    coefficient=st.floats(0, 2, exclude_min=True),
    tolerance=st.floats(0, 1, exclude_max=True),
    rank_tolerance=st.floats(0, 1, exclude_max=True),
    shards=st.just("auto") | st.integers(1, 10**6),
)
def test_every_configuration_written_out_reads_back_the_same(
    tmp_path_factory, base, candidates, path, coefficient, tolerance, rank_tolerance, shards
) -> None:
    config = parse(
        base=base,
        candidates=candidates,
        calibration={"path": path},
        method={"coefficient": coefficient, "rotation": {"rank_tolerance": rank_tolerance}},
        schedule={"tolerance": tolerance},
        runtime={"layer_shards": shards},
    )
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_merge_config(file) == config
    assert config_difference(load_merge_config(file), config) == []


def test_a_path_that_looks_like_a_number_with_an_exponent_reads_back(write) -> None:
    config = parse(base="1e5", candidates=["1e-5", "2e-5"])
    assert load_merge_config(write(config.to_yaml())) == config


def test_no_difference_to_itself() -> None:
    assert config_difference(parse(), parse()) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("base=other", "base: models/base -> other"),
        ("candidates=[a]", "candidates: ['run/checkpoint-10', 'run/checkpoint-20'] -> ['a']"),
        ("method.coefficient=0.5", "method.coefficient: 0.7 -> 0.5"),
        ("method.rotation.sign=library", "method.rotation.sign: positive_diagonal -> library"),
        ("method.rotation.rank_tolerance=0", "method.rotation.rank_tolerance: 1e-06 -> 0.0"),
        ("schedule.max_iterations=7", "schedule.max_iterations: 6 -> 7"),
        ("schedule.tolerance=0", "schedule.tolerance: 0.0001 -> 0.0"),
        ("calibration.seed=1", "calibration.seed: 0 -> 1"),
        ("tokenizer=base", "tokenizer: auto -> base"),
        ("runtime.threads=2", "runtime.threads: 1 -> 2"),
        ("runtime.micro_batch_tokens=64", "runtime.micro_batch_tokens: 2048 -> 64"),
        ("runtime.device=cpu", "runtime.device: auto -> cpu"),
    ],
)
def test_keys_that_decide_the_result_are_a_difference(override: str, line: str) -> None:
    assert config_difference(parse(), parse(override)) == [line]


def test_a_format_that_was_asked_for_is_a_difference_to_another_one() -> None:
    one, other = (parse(f"precision.compute_dtype={name}") for name in ("bfloat16", "float32"))
    assert config_difference(one, other) == ["precision.compute_dtype: bfloat16 -> float32"]
    # What `auto` came to is recorded in the run.
    assert config_difference(parse(), other) == []


@pytest.mark.parametrize(
    "override",
    [
        "output=elsewhere",
        "keep_states=last",
        "runtime.layer_shards=3",
        "runtime.gpus_per_shard=0.5",
        "runtime.max_weight_file_gb=1.0",
        "runtime.placement_timeout_s=5.0",
    ],
)
def test_keys_that_have_no_influence_are_none(override: str) -> None:
    assert config_difference(parse(), parse(override)) == []


def test_the_format_of_the_written_model_counts_once_it_is_written() -> None:
    one, other = parse(), parse("precision.storage_dtype=float32")
    assert config_difference(one, other) == []
    line = "precision.storage_dtype: auto -> float32"
    assert config_difference(one, other, published=True) == [line]


def test_a_section_that_appears_is_a_difference() -> None:
    operator = {"operator": "task_arithmetic"}
    without = parse(calibration=None, method=operator)
    lines = config_difference(without, parse(method=operator))
    assert "calibration.path: absent -> train.jsonl" in lines


def test_a_configuration_cannot_be_changed() -> None:
    config = parse()
    with pytest.raises(ValueError, match="frozen"):
        config.schedule.max_iterations = 3  # type: ignore[misc]


def test_read_yaml_gives_plain_content(write) -> None:
    assert read_yaml(write("a: {b: [1, 2e1, x]}")) == {"a": {"b": [1, 20.0, "x"]}}

"""The whole merge against the plain program, over families, schedules, shards and resumptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from arm_ray.config import MergeConfig
from arm_ray.events import read_events
from arm_ray.merging.rotation import Rotation, activation_rotation
from arm_ray.runtime.shards.placement import placed_shards
from tests.builders import reference
from tests.builders.checkpoints import assert_same_bits, load_all, relative_error
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run, state
from tests.builders.models import FAMILIES
from tests.doubles import in_process

pytestmark = pytest.mark.usefixtures("shards_in_process")

SCHEDULES: dict[str, dict[str, Any]] = {
    "hybrid": {"anchor_iterations": 2, "max_iterations": 4},
    "anchoring": {"anchor_iterations": 3, "max_iterations": 3},
    "window": {"anchor_iterations": 0, "max_iterations": 3, "window_size": 3},
    "window n-1": {"anchor_iterations": 0, "max_iterations": 3, "window_divisor": "n_minus_1"},
    "last candidate": {"anchor_iterations": 2, "max_iterations": 2, "initial": "last_candidate"},
}


@pytest.fixture(params=["in process", pytest.param("actors", marks=pytest.mark.minutes)])
def both_ways(
    request: pytest.FixtureRequest, shards_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed is the same in this process; dozens of actors take minutes to start."""
    if request.param == "actors":
        monkeypatch.setattr("arm_ray.runtime.merge.controller.placed_shards", placed_shards)


def assert_equals_reference(case: MergeCase, content: dict[str, Any], *overrides: str) -> None:
    config = case.config(*overrides)
    run(config)
    expected = reference.streaming_merge(content)
    for iteration, weights in enumerate(expected, start=1):
        found = state(config, iteration)
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            assert relative_error(found[name], tensor) < 1e-5, (iteration, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_arm_equals_the_plain_program_on_every_family(case: MergeCase, family: str) -> None:
    case.make(family)
    assert_equals_reference(case, case.content())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_arm_equals_the_plain_program_on_every_schedule(
    case: MergeCase, schedule: dict[str, Any]
) -> None:
    case.make("qwen2.5")
    overrides = [f"schedule.{key}={value}" for key, value in schedule.items()]
    assert_equals_reference(
        case, {**case.content(), "schedule": schedule}, *overrides, "runtime.layer_shards=2"
    )


def test_single_round_is_equation_3(case: MergeCase) -> None:
    case.make("llama3.2", count=1)
    schedule = {"anchor_iterations": 1, "max_iterations": 1}
    overrides = [f"schedule.{key}={value}" for key, value in schedule.items()]
    assert_equals_reference(case, {**case.content(), "schedule": schedule}, *overrides)


def test_library_signs_equal_the_plain_program(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK's signs may turn with the last bit of a shift, so both factorise the same bits."""
    shifts: list[torch.Tensor] = []

    def recorded(shift: torch.Tensor, **options: Any) -> Rotation | None:
        shifts.append(shift.clone())
        return activation_rotation(shift, **options)

    plain = reference.dense_rotation

    def of_the_same_bits(shift: torch.Tensor, sign: str, tolerance: float) -> torch.Tensor | None:
        alike = [s for s in shifts if s.shape == shift.shape and relative_error(s, shift) < 1e-4]
        [found] = alike
        return plain(found, sign, tolerance)

    monkeypatch.setattr("arm_ray.merging.method.activation_rotation", recorded)
    monkeypatch.setattr(reference, "dense_rotation", of_the_same_bits)
    case.make()
    content = case.content()
    content["method"] = {"rotation": {"sign": "library"}}
    content["schedule"] = {"anchor_iterations": 1, "max_iterations": 1, "step": "fixed"}
    assert_equals_reference(
        case,
        content,
        "method.rotation.sign=library",
        "schedule.anchor_iterations=1",
        "schedule.max_iterations=1",
    )


def test_more_samples_than_outputs_and_repeated_samples(case: MergeCase) -> None:
    case.make(rows=20)
    content = case.content()
    content["calibration"]["batch_size"] = 50
    assert_equals_reference(case, content, "calibration.batch_size=50")
    events = read_events(case.root / "run" / "events.jsonl")
    warnings = " ".join(e["message"] for e in events if e["event"] == "warning")
    assert "rank-deficient" in warnings
    assert "50 samples" in warnings


def test_one_sample(case: MergeCase) -> None:
    case.make()
    content = case.content()
    content["calibration"]["batch_size"] = 1
    assert_equals_reference(case, content, "calibration.batch_size=1")


def test_rows_in_file_order_without_shuffling(case: MergeCase) -> None:
    case.make()
    content = case.content()
    content["calibration"]["shuffle"] = False
    assert_equals_reference(case, content, "calibration.shuffle=false")


def test_task_arithmetic_has_its_closed_forms(case: MergeCase) -> None:
    case.make(count=2)
    config = case.config("method.operator=task_arithmetic", "schedule.anchor_iterations=4")
    run(config)
    base, *candidates = [
        load_file(p / "model.safetensors") for p in (case.root / "base", *case.candidates)
    ]
    for t in range(1, 5):
        for name, tensor in state(config, t).items():
            mean = (candidates[0][name].double() + candidates[1][name].double()) / 2
            kept = (1 - 0.7) ** t
            expected = kept * base[name].double() + (1 - kept) * mean
            assert relative_error(tensor.double(), expected) < 1e-6


def test_a_window_of_two_tends_to_its_limit(case: MergeCase) -> None:
    case.make(count=1)
    config = case.config(
        "method.operator=task_arithmetic",
        "schedule={anchor_iterations: 0, window_divisor: n_minus_1, max_iterations: 30}",
        "schedule.tolerance=0",
        "schedule.step=fixed",
        "keep_states=last",
    )
    run(config)
    base, candidate = [
        load_file(p / "model.safetensors") for p in (case.root / "base", *case.candidates)
    ]
    for name, tensor in state(config, 30).items():
        expected = ((1 - 0.7) * base[name].double() + candidate[name].double()) / (2 - 0.7)
        assert relative_error(tensor.double(), expected) < 1e-6
    kept = sorted(p.name for p in (case.root / "run" / "states").iterdir())
    assert kept == ["0030"]


@pytest.mark.usefixtures("both_ways")
def test_shards_give_the_same_bits(case: MergeCase) -> None:
    case.make("qwen3", num_layers=5, dtype=torch.bfloat16)
    runs = {}
    for label, shards in (("one", 1), ("two", 2), ("four", 4)):
        config = case.config(f"runtime.layer_shards={shards}", output=label)
        run(config)
        runs[label] = [state(config, t) for t in range(1, 5)]
        runs[label].append(load_file(case.root / label / "model" / "model.safetensors"))
    for label in ("two", "four"):
        for left, right in zip(runs["one"], runs[label], strict=True):
            assert_same_bits(left, right)
    cosines = [
        [
            (e["weight_cosine"], e["task_vector_cosine"])
            for e in read_events(case.root / label / "events.jsonl")
            if e["event"] == "iteration_finished"
        ]
        for label in runs
    ]
    assert len(cosines[0]) == 4
    assert all(row == cosines[0] for row in cosines)


VARIANTS = {
    "host": ["runtime.residency=host"],
    "disk": ["runtime.residency=disk", "runtime.layer_shards=2"],
    "one after another": ["runtime.lookahead=0", "runtime.layer_shards=2"],
    "far ahead": ["runtime.lookahead=4", "runtime.layer_shards=3"],
    "object store": ["runtime.transport=object_store", "runtime.layer_shards=3"],
    "groups of two": ["runtime.layers_per_group=2", "runtime.layer_shards=2"],
    "dealt round": ["runtime.partition=looped", "runtime.layer_shards=2"],
    "dealt, on disk": [
        "runtime.partition=looped", "runtime.layer_shards=3", "runtime.residency=disk",
        "runtime.transport=object_store",
    ],
    "dealt by two": [
        "runtime.partition=looped", "runtime.groups_per_turn=2", "runtime.layer_shards=2",
        "runtime.residency=host",
    ],
}  # fmt: skip


@pytest.mark.usefixtures("both_ways")
def test_residency_transport_and_lookahead_give_the_same_bits(case: MergeCase) -> None:
    case.make("qwen2.5", num_layers=4, dtype=torch.bfloat16)
    run(case.config(output="plain"))
    expected = load_file(case.root / "plain" / "model" / "model.safetensors")
    for label, overrides in VARIANTS.items():
        config = case.config(*overrides, output=label)
        outcome = run(config)
        events = read_events(outcome.run / "events.jsonl")
        assert [e for e in events if e["event"] == "warning" and "transport" in e["message"]] == []
        assert_same_bits(expected, load_file(outcome.run / "model" / "model.safetensors"))


@pytest.mark.actors
def test_actors_give_the_bits_of_shards_in_this_process(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("qwen2.5", num_layers=4, dtype=torch.bfloat16)
    # Dealt round, so that the first shard is also sent what it goes on with; and it ends early,
    # while iterations that were submitted ahead wait to hear of it, with a state that is nowhere
    # but in memory.
    settings = (
        "runtime.layer_shards=3",
        "runtime.transport=direct",
        "runtime.partition=looped",
        "schedule={anchor_iterations: 9, max_iterations: 9, tolerance: 0.2, step: fixed}",
        "keep_states=none",
        "runtime.recovery_every=never",
    )
    outcome = run(case.config(*settings, output="actors"))
    assert outcome.reason == "converged"
    assert 1 < outcome.iterations < 9
    events = read_events(case.root / "actors" / "events.jsonl")
    assert [e for e in events if e["event"] == "warning" and "transport" in e["message"]] == []
    assert [e for e in events if e["event"] == "state_written"] == []
    monkeypatch.setattr("arm_ray.runtime.merge.controller.placed_shards", in_process.placed_shards)
    assert run(case.config(*settings, output="here")).iterations == outcome.iterations
    assert_same_bits(*(load_all(case.root / name / "model") for name in ("actors", "here")))


@pytest.mark.usefixtures("both_ways")
def test_speculative_iterations_leave_nothing_behind(case: MergeCase) -> None:
    case.make("mistral")
    schedule = "schedule={anchor_iterations: 9, max_iterations: 9, tolerance: 0.2, step: fixed}"
    outcomes = {}
    for label, lookahead in (("ahead", 8), ("not ahead", 0)):
        overrides = (schedule, "runtime.layer_shards=2", f"runtime.lookahead={lookahead}")
        outcome = outcomes[label] = run(case.config(*overrides, output=label))
        assert outcome.reason == "converged"
        assert 1 < outcome.iterations < 9
        kept = sorted(p.name for p in (outcome.run / "states").iterdir())
        assert kept == [f"{t:04d}" for t in range(1, outcome.iterations + 1)]
    assert outcomes["ahead"].iterations == outcomes["not ahead"].iterations
    left, right = (load_file(case.root / o / "model" / "model.safetensors") for o in outcomes)
    assert_same_bits(left, right)


def test_a_linear_merge_is_the_same_in_one_pass_and_in_parts(case: MergeCase) -> None:
    case.make("qwen3", count=3, max_shard_size="60KB")
    linear = "method.operator=task_arithmetic"
    whole = case.config(linear, "runtime.max_weight_file_gb=0.0001", output="whole")
    run(whole)
    model = load_all(Path(whole.output) / "model")
    assert_same_bits(state(whole, 4), model)
    parts = case.config(linear, "keep_states=last", "runtime.layer_shards=3", output="parts")
    for halt in (1, 3):
        assert run(parts, stop_after=halt).model is None
    assert run(parts, stop_after=3).iterations == 3
    run(parts)
    assert_same_bits(model, load_all(Path(parts.output) / "model"))
    assert [p.name for p in (Path(parts.output) / "states").iterdir()] == ["0004"]
    nothing = case.config(linear, "keep_states=none", output="nothing")
    run(nothing)
    assert_same_bits(model, load_all(Path(nothing.output) / "model"))
    assert not (Path(nothing.output) / "states").exists()


def test_halting_and_resuming_gives_the_same_bits(case: MergeCase) -> None:
    case.make()
    whole = case.config("runtime.layer_shards=2", output="whole")
    run(whole)
    for halt in (1, 2, 3):
        parts = case.config("runtime.layer_shards=2", "keep_states=last", output=f"parts{halt}")
        halted = run(parts, stop_after=halt)
        assert (halted.reason, halted.model, halted.iterations) == ("stop_after", None, halt)
        assert not (Path(parts.output) / "model").exists()
        outcome = run(parts)
        assert outcome.reason == "max_iterations"
        assert_same_bits(
            load_file(Path(whole.output) / "model" / "model.safetensors"),
            load_file(Path(parts.output) / "model" / "model.safetensors"),
        )
    assert run(whole).reason == "complete"


def test_a_state_cut_off_in_the_middle_is_made_again(case: MergeCase) -> None:
    case.make()
    config = case.config()
    run(config, stop_after=2)
    expected = state(config, 2)
    directory = Path(config.output) / "states" / "0002"
    (directory / "state.json").unlink()
    (directory / "group-00001.safetensors").write_bytes(b"half")
    run(config, stop_after=2)
    assert_same_bits(expected, state(config, 2))


def test_it_stops_when_the_states_stop_turning(case: MergeCase) -> None:
    case.make(count=1)
    config = case.config(
        "method.operator=task_arithmetic",
        "schedule={anchor_iterations: 9, max_iterations: 9, tolerance: 1e-6, step: fixed}",
    )
    # All anchored states of one candidate lie on a line from the base: the cosine is 1 at once.
    outcome = run(config)
    assert (outcome.reason, outcome.iterations) == ("converged", 2)
    assert outcome.model is not None
    first, second = [
        e for e in read_events(outcome.run / "events.jsonl") if e["event"] == "iteration_finished"
    ]
    assert first["task_vector_cosine"] is None
    assert second["task_vector_cosine"] == pytest.approx(1.0)
    assert first["weight_cosine"] == pytest.approx(_cosine(case, config), rel=1e-9)


def _cosine(case: MergeCase, config: MergeConfig) -> float:
    old, new = load_file(case.root / "base" / "model.safetensors"), state(config, 1)
    left, right = (torch.cat([w[n].double().flatten() for n in new]) for w in (old, new))
    return float(torch.dot(left, right) / left.norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_model_loads_as_it_is(case: MergeCase, dtype: torch.dtype) -> None:
    case.make("qwen2.5", dtype=dtype, max_shard_size="60KB")
    assert (case.root / "base" / "model.safetensors.index.json").exists()
    config = case.config("runtime.layer_shards=2", "runtime.max_weight_file_gb=0.0001")
    outcome = run(config)
    assert outcome.model is not None
    assert len(list(outcome.model.glob("model-*.safetensors"))) >= 2
    model, report = AutoModelForCausalLM.from_pretrained(
        outcome.model, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == dtype
    last = state(config, 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last[name].to(dtype)), name
    tokenizer = AutoTokenizer.from_pretrained(outcome.model)
    assert "red" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "red"}], tokenize=False
    )
    assert (outcome.model / "generation_config.json").exists()
    card = (outcome.model / "README.md").read_text()
    # A directory is no model of the hub, which alone the front matter may name.
    assert "base_model:" not in card
    assert f"| base | `{config.base}` |" in card
    assert "- merge\n" in card
    text = json.loads((outcome.model / "config.json").read_text())
    assert text["dtype"] == str(dtype).removeprefix("torch.")


def test_every_state_is_a_model_in_float32(case: MergeCase) -> None:
    case.make("smollm2", dtype=torch.bfloat16)
    config = case.config()
    run(config, stop_after=1)
    directory = Path(config.output) / "states" / "0001"
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_shard_holds_its_own_layers_only(case: MergeCase) -> None:
    from arm_ray.merging.method import open_method
    from arm_ray.runtime.inputs import open_inputs
    from arm_ray.runtime.merge.specs import shard_specs
    from arm_ray.runtime.output.run_directory import open_run
    from arm_ray.runtime.shards.layer_shard import LayerShard
    from arm_ray.runtime.shards.placement import Placement

    case.make("mistral", num_layers=4)
    config = case.config("runtime.layer_shards=2")
    inputs = open_inputs(config)
    with open_run(config) as opened:
        specs = shard_specs(
            config,
            open_method(config.method, len(config.candidates)),
            inputs,
            opened.path,
            Placement(2, "cpu"),
        )
        names = [
            {name for group in spec.groups for name in inputs.layout.groups[group].tensors}
            for spec in specs
        ]
        assert names[0] | names[1] == set(inputs.layout.shapes)
        assert not names[0] & names[1]
        for spec, own in zip(specs, names, strict=True):
            shard = LayerShard(spec)
            for index in spec.groups:
                for name in inputs.layout.groups[index].tensors:
                    shard._store.rows("base", index, name, slice(0, 1))
            held = {name for weights in shard._store._stored.values() for name in weights}
            assert held == own

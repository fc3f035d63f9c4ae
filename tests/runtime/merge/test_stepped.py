"""Steps that losses choose, and the model that they are kept to be no worse than."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.errors import CalibrationError, ConfigError
from arm_ray.events import read_events
from arm_ray.steps import step_samples
from tests.builders.checkpoints import assert_same_bits, load_all, relative_error
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run, state
from tests.builders.models import fine_tuned, save
from tests.builders.trained import plain_loss, trained_case, write_questions

pytestmark = pytest.mark.usefixtures("shards_in_process")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    return trained_case(tmp_path_factory.mktemp("trained"))


def config_of(case: MergeCase, output: Path, *overrides: str, **sections: Any) -> MergeConfig:
    """One iteration of 12 samples with a line search, compared on 12 samples, 12 for the end."""
    content = case.content()
    content |= {
        "output": str(output),
        "calibration": {**content["calibration"], "batch_size": 12, "seed": 1},
        "method": {"operator": "task_arithmetic"},
        "schedule": {"anchor_iterations": 1, "max_iterations": 1, "step": "line_search"},
        "select": {"samples": 12},
        **sections,
    }
    return parse_merge_config(content, overrides)


def events_of(config: MergeConfig, name: str) -> list[dict[str, Any]]:
    known = read_events(Path(config.output) / "events.jsonl")
    return [event for event in known if event["event"] == name]


def lines_of(case: MergeCase, rows: Sequence[int]) -> list[str]:
    lines = (case.root / "calibration.jsonl").read_text().splitlines()
    return list(dict.fromkeys(lines[row] for row in rows))


def order_of(case: MergeCase, seed: int = 1) -> list[int]:
    count = len((case.root / "calibration.jsonl").read_text().splitlines())
    return np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()


def merged(case: MergeCase, coefficients: Sequence[float]) -> Any:
    """The plain formula of Task Arithmetic, as a model."""
    model: Any = AutoModelForCausalLM.from_pretrained(case.root / "base")
    base = load_all(case.root / "base")
    weights = {name: tensor.clone() for name, tensor in base.items()}
    for path, coefficient in zip(case.candidates, coefficients, strict=True):
        for name, tensor in load_all(path).items():
            weights[name] += coefficient * (tensor - base[name])
    model.load_state_dict(weights, strict=False)
    return model.eval()


@pytest.mark.parametrize("shards", [1, 2])
def test_losses_are_those_of_the_plain_formula(
    trained: MergeCase, tmp_path: Path, shards: int
) -> None:
    config = config_of(trained, tmp_path / "run", f"runtime.layer_shards={shards}")
    run(config)
    [event] = events_of(config, "step_chosen")
    order = order_of(trained)
    second = lines_of(trained, order[12:24])
    choose, check = step_samples(len(second))
    parts = {"tried": second[:choose], "checked": second[choose : choose + check]}
    for part, samples in parts.items():
        for tried in event[part]:
            model = merged(trained, tried["coefficients"][0])
            expected = plain_loss(model, trained.root / "base", samples)
            assert tried["loss"] == pytest.approx(expected, rel=1e-4)
    losses = {tuple(t["coefficients"][0]): t["loss"] for t in event["tried"]}
    chosen = event["checked"][0]["coefficients"][0]
    assert losses[tuple(chosen)] == min(losses.values())
    assert event["coefficients"] in [t["coefficients"] for t in event["checked"]]
    # The state is the one whose loss was taken.
    wanted = merged(trained, event["coefficients"][0]).state_dict()
    for name, tensor in state(config, 1).items():
        assert relative_error(tensor, wanted[name]) < 1e-5
    [selected] = events_of(config, "model_selected")
    held = [order[-24:-12], order[-12:]]
    for part, rows in zip(("compared", "final"), held, strict=True):
        known = {each["state"]: each["loss"] for each in selected[part]}
        for name, path in (("base", trained.root / "base"), ("candidate-2", trained.candidates[1])):
            rows_of = lines_of(trained, rows)
            if part == "compared":
                assert known[name] == pytest.approx(
                    plain_loss(path, trained.root / "base", rows_of), rel=1e-4
                )
            else:
                assert name in known


@pytest.mark.parametrize(
    "step",
    [
        "subspace",
        pytest.param("line_search", marks=pytest.mark.minutes),
        pytest.param("backtracking", marks=pytest.mark.minutes),
    ],
)
def test_the_bits_are_the_same_however_it_is_run(
    trained: MergeCase, tmp_path: Path, step: str
) -> None:
    overrides = [
        f"schedule.step={step}",
        "method.operator=arm",
        # The second iteration of one of them is a window: its reference is not the state before.
        f"schedule.anchor_iterations={1 if step == 'subspace' else 2}",
        "schedule.max_iterations=2",
    ]
    plain = config_of(trained, tmp_path / "plain", *overrides)
    run(plain)
    wanted = load_all(Path(plain.output) / "model")
    ways = {
        "shards": ["runtime.layer_shards=3"],
        "disk": ["runtime.layer_shards=2", "runtime.residency=disk", "keep_states=last"],
        "dealt round": ["runtime.layer_shards=2", "runtime.partition=looped"],
        "host": ["runtime.residency=host"],
    }
    for name, more in ways.items():
        config = config_of(trained, tmp_path / name, *overrides, *more)
        run(config)
        assert_same_bits(load_all(Path(config.output) / "model"), wanted)
        for ours, theirs in zip(
            events_of(config, "step_chosen"), events_of(plain, "step_chosen"), strict=True
        ):
            different = {k for k in ours if ours[k] != theirs[k]}
            assert different <= {"time", "seconds"}
    halted = config_of(trained, tmp_path / "halted", *overrides)
    run(halted, stop_after=1)
    run(halted)
    assert_same_bits(load_all(Path(halted.output) / "model"), wanted)


OPERATORS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"ties": {"scope": "global"}},
    "ties by tensor": {"operator": "ties", "ties": {"scope": "per_tensor"}},
    "dare": {},
    "arm": {},
    "aim": {},
    "arm, minimal": {"operator": "arm", "rotation": {"variant": "minimal"}},
}


# The quick ones: numbers over the whole model, and rotations.
@pytest.mark.parametrize(
    "name",
    [n if n in ("ties", "arm") else pytest.param(n, marks=pytest.mark.minutes) for n in OPERATORS],
)
def test_a_chosen_coefficient_gives_what_a_fixed_one_gives(
    trained: MergeCase, tmp_path: Path, name: str
) -> None:
    method = {"operator": name, **OPERATORS[name]}
    searched = config_of(trained, tmp_path / "searched", method=method)
    run(searched)
    [event] = events_of(searched, "step_chosen")
    coefficient = 2.0 * event["coefficients"][0][0]
    # With the promise, samples are encoded in the same way.
    fixed = config_of(
        trained,
        tmp_path / "fixed",
        "schedule.step=fixed",
        "select.promise=true",
        method={**method, "coefficient": coefficient},
    )
    run(fixed)
    found, wanted = state(searched, 1), state(fixed, 1)
    for key, tensor in wanted.items():
        assert relative_error(found[key], tensor) < 1e-5, key


def test_subspace_is_no_worse_than_a_line_and_blocks_no_worse_than_that(
    trained: MergeCase, tmp_path: Path
) -> None:
    found = {}
    for name, overrides in {
        "line": ["schedule.step=line_search"],
        "subspace": ["schedule.step=subspace"],
        "blocks": ["schedule.step=subspace", "schedule.step_blocks=3"],
    }.items():
        config = config_of(trained, tmp_path / name, *overrides)
        run(config)
        [event] = events_of(config, "step_chosen")
        found[name] = min(each["loss"] for each in event["tried"])
        if name == "blocks":
            [manifest] = (Path(config.output) / "states").glob("*/state.json")
            known = json.loads(manifest.read_text())["coefficients"]
            for ours, theirs in zip(known, event["coefficients"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-6)
    assert found["blocks"] <= found["subspace"] <= found["line"]


def test_a_better_state_becomes_the_model(trained: MergeCase, tmp_path: Path) -> None:
    config = config_of(trained, tmp_path / "run", "schedule.step=subspace", "select.samples=24")
    outcome = run(config)
    [selected] = events_of(config, "model_selected")
    compared = {each["state"]: each["loss"] for each in selected["compared"]}
    assert compared["state-0001"] < min(v for k, v in compared.items() if k != "state-0001")
    assert selected["model"] == "state-0001"
    assert "state-0001 is better than checkpoint-10, the best checkpoint" in selected["verdict"]
    assert outcome.model is not None
    assert_same_bits(load_all(outcome.model), state(config, 1))
    assert selected["verdict"] in (outcome.model / "README.md").read_text()


def test_where_no_merge_is_better_the_checkpoint_is_the_model(
    trained: MergeCase, tmp_path: Path
) -> None:
    """A first state that a fixed step throws far beyond the checkpoints."""
    config = config_of(
        trained,
        tmp_path / "run",
        "schedule.step=fixed",
        "select.promise=true",
        "method.coefficient=0.05",
    )
    outcome = run(config)
    [selected] = events_of(config, "model_selected")
    assert selected["model"] == "candidate-2"
    assert "no merge beat checkpoint-10: the best is state-0001" in selected["verdict"]
    assert outcome.model is not None
    assert_same_bits(load_all(outcome.model), load_all(trained.candidates[1]))


def test_candidates_that_are_noise_gain_nothing(trained: MergeCase, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(trained.root / "base")
    case = MergeCase(trained.root)
    case.candidates = [
        save(fine_tuned(base, seed=i, scale=0.3), tmp_path / f"noise-{i}") for i in (1, 2)
    ]
    config = config_of(
        case, tmp_path / "run", "schedule.anchor_iterations=3", "schedule.max_iterations=3"
    )
    outcome = run(config)
    assert outcome.reason == "no_gain"
    assert outcome.iterations == 1
    [selected] = events_of(config, "model_selected")
    assert selected["model"] == "base"
    assert outcome.model is not None
    assert_same_bits(load_all(outcome.model), load_all(trained.root / "base"))
    # It is over: the same command finds the model.
    assert run(config).reason == "complete"


def test_a_run_that_was_halted_before_it_ended_for_no_gain_ends_alike(
    trained: MergeCase, tmp_path: Path
) -> None:
    overrides = ["schedule.anchor_iterations=4", "schedule.max_iterations=4", "keep_states=last"]
    whole = config_of(trained, tmp_path / "whole", *overrides)
    first = run(whole)
    halted = config_of(trained, tmp_path / "halted", *overrides)
    run(halted, stop_after=1)
    again = run(halted)
    assert (again.reason, again.iterations) == (first.reason, first.iterations)
    assert_same_bits(
        load_all(Path(halted.output) / "model"), load_all(Path(whole.output) / "model")
    )


def test_what_cannot_be_is_refused(trained: MergeCase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no coefficient whose value could be searched"):
        run(config_of(trained, tmp_path / "a", method={"operator": "slerp"}))
    with pytest.raises(CalibrationError, match="too few rows to choose a step by") as caught:
        run(config_of(trained, tmp_path / "b", "calibration.batch_size=40"))
    assert "72 rows" in str(caught.value)
    assert "calibration.batch_size to 36 or less" in str(caught.value)
    with pytest.raises(CalibrationError, match="too few rows"):
        run(config_of(trained, tmp_path / "c", "select.samples=60"))
    given = str(trained.root / "calibration.jsonl")
    with pytest.raises(CalibrationError, match="have been seen before"):
        run(config_of(trained, tmp_path / "d", f"select.final_path={given}"))
    missing = config_of(trained, tmp_path / "e").model_copy(update={"calibration": None})
    with pytest.raises(ConfigError, match="needs calibration samples"):
        run(missing)


def test_conversations_without_an_answer_are_refused(trained: MergeCase, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "two red apples"}]}
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps(row) + "\n") * 60)
    with pytest.raises(CalibrationError, match="no turn of the assistant"):
        run(config_of(trained, tmp_path / "run", f"calibration.path={data}"))


def test_comparing_on_calibration_samples_is_said(
    trained: MergeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_questions(tmp_path / "other.jsonl", 40, seed=5)
    given = str(trained.root / "calibration.jsonl")
    config = config_of(
        trained,
        tmp_path / "run",
        f"select.path={given}",
        f"select.final_path={other}",
        "select.samples=96",
        "select.final_samples=0",
    )
    run(config)
    [warning] = [e for e in events_of(config, "warning") if "also calibrated on" in e["message"]]
    assert "of 96 samples" in warning["message"]
    capsys.readouterr()


def test_untied_heads_and_other_families(tmp_path: Path) -> None:
    case = trained_case(tmp_path, "qwen2.5", learning_rate=0.02)
    config = config_of(case, tmp_path / "run", "runtime.layer_shards=2")
    run(config)
    [event] = events_of(config, "step_chosen")
    second = lines_of(case, order_of(case)[12:24])
    choose, _ = step_samples(len(second))
    for tried in event["tried"]:
        expected = plain_loss(
            merged(case, tried["coefficients"][0]), case.root / "base", second[:choose]
        )
        assert tried["loss"] == pytest.approx(expected, rel=1e-4)

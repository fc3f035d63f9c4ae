"""Numbers that are not finite, or have exploded, end an iteration; what was finished stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import TensorSpec, write_weight_file
from arm_ray.errors import ArmRayError, CorruptCheckpointError, NumericalError
from arm_ray.events import read_events
from arm_ray.merging.method import Method
from arm_ray.merging.operator import MergedTensor, TensorInputs
from arm_ray.report.status import status_of
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase

WEIGHT = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
ONCE = "schedule={anchor_iterations: 1, max_iterations: 1, tolerance: 0.0, step: fixed}"
# Of all that need no forward passes; sce leaves out what differs least, and NaN with it.
LINEAR = ("average", "lore", "model_stock", "opcm", "ram", "sce", "slerp", "task_arithmetic")
LINEAR += ("ties", "twin")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges are made in this process."""
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def run(case: MergeCase, *overrides: str, output: str = "run") -> MergeOutcome:
    config = case.config(*overrides, output=output)
    return merge(config, console=Console(quiet=True), writes_report=False)


def change(directory: Path, name: str, by: Callable[[torch.Tensor], Any]) -> None:
    """Change a tensor of a checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    by(tensors[name])
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def refused(case: MergeCase, *overrides: str, output: str = "run") -> ArmRayError:
    """What ends a merge; nothing of its iteration is a state, and there is no model."""
    with pytest.raises(ArmRayError) as caught:
        run(case, *overrides, output=output)
    directory = case.root / output
    assert not (directory / "model").exists()
    last = read_events(directory / "events.jsonl")[-1]
    assert last["event"] == "run_failed"
    assert last["message"] == str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("operator", [*LINEAR, "arm", "aim", "acm"])
def test_weights_that_are_not_finite_are_found_by_every_operator(
    case: MergeCase, operator: str
) -> None:
    case.make(num_layers=2)
    broken = (
        ("base", case.root / "base", float("inf")),
        ("candidate-2", case.candidates[1], float("nan")),
    )
    for label, directory, value in broken:
        good = (directory / "model.safetensors").read_bytes()
        change(directory, WEIGHT, lambda t, v=value: t.view(-1)[7:8].fill_(v))  # type: ignore[misc]
        error = refused(case, f"method.operator={operator}", ONCE, output=f"run-{label}")
        assert isinstance(error, CorruptCheckpointError), error
        assert error.subject == label
        assert WEIGHT in error.what
        assert states.finished_states(case.root / f"run-{label}") == {}
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors").write_bytes(good)


def multiply(patch: pytest.MonkeyPatch, factor: float, iteration: int, name: str) -> None:
    """Have what an iteration makes of a tensor come out so many times as large."""
    original = Method.merge

    def merged(self: Method, inputs: TensorInputs) -> MergedTensor:
        result = original(self, inputs)
        if inputs.iteration == iteration and inputs.name == name:
            result.tensor = result.tensor * factor
        return result

    patch.setattr(Method, "merge", merged)


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "arm"])
@pytest.mark.parametrize(
    ("factor", "said"),
    [(1e38, "NaN, infinity or numbers too large"), (1e5, "far larger than those")],
)
@pytest.mark.parametrize("name", [WEIGHT, NORM])
def test_a_merged_state_that_explodes_is_none(
    case: MergeCase,
    monkeypatch: pytest.MonkeyPatch,
    operator: str,
    factor: float,
    said: str,
    name: str,
) -> None:
    case.make(num_layers=2)
    multiply(monkeypatch, factor, 1, name)
    error = refused(case, f"method.operator={operator}")
    assert isinstance(error, NumericalError), error
    assert said in error.what
    assert name in error.what
    assert error.where == "iteration 1: base, candidate-1, candidate-2"
    assert states.finished_states(case.root / "run") == {}


@pytest.mark.parametrize("operator", ["task_arithmetic", "average"])
def test_a_candidate_of_another_magnitude_is_named(case: MergeCase, operator: str) -> None:
    case.make(num_layers=2)
    change(case.candidates[1], WEIGHT, lambda t: t.view(-1)[7:8].fill_(1e30))
    error = refused(case, f"method.operator={operator}", ONCE)
    assert isinstance(error, NumericalError)
    assert error.subject == "candidate-2"
    assert WEIGHT in error.what


@pytest.mark.parametrize("operator", ["arm", "aim", "acm"])
@pytest.mark.parametrize(
    ("dtype", "factor", "said"),
    [("float16", 1e5, "NaN, infinite or too large"), ("float32", 1e7, "have exploded")],
)
def test_activations_are_watched(
    case: MergeCase, operator: str, dtype: str, factor: float, said: str
) -> None:
    case.make(num_layers=2)
    # AIM runs the base alone: there is nothing to compare it with.
    directory, label = case.candidates[1], "candidate-2"
    if operator == "aim":
        if dtype == "float32":
            return
        directory, label = case.root / "base", "base"
    change(directory, "model.layers.1.mlp.down_proj.weight", lambda t: t.mul_(factor))
    error = refused(case, f"method.operator={operator}", f"precision.compute_dtype={dtype}")
    assert isinstance(error, NumericalError), error
    assert said in error.what
    assert "layer 1" in error.what
    assert error.subject == label
    assert error.where == f"{label}, iteration 1"


def test_a_loss_that_is_not_finite_names_its_state(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make(num_layers=2)
    original = torch.nn.functional.cross_entropy

    def broken(*given: Any, **named: Any) -> torch.Tensor:
        return original(*given, **named) * float("nan")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    error = refused(
        case, "schedule.step=line_search", "select.samples=8", "calibration.batch_size=4"
    )
    assert isinstance(error, NumericalError), error
    assert "loss is NaN" in error.what
    assert error.subject is not None
    assert "iteration" in (error.where or "")


@pytest.mark.parametrize("operator", ["task_arithmetic", "arm"])
def test_weights_that_the_written_dtype_cannot_hold_are_not_written(
    case: MergeCase, operator: str
) -> None:
    case.make(num_layers=2)
    for directory in (case.root / "base", *case.candidates):
        change(directory, WEIGHT, lambda t: t.view(-1)[7:8].fill_(7e4))
    given = f"method.operator={operator}"
    error = refused(case, given, "precision.storage_dtype=float16")
    assert isinstance(error, NumericalError), error
    assert f"{WEIGHT} does not fit into float16" in error.what
    # Beside the merge all went well: it goes on from there, with another format.
    kept = states.finished_states(case.root / "run")
    assert list(kept) == ([1, 2, 3, 4] if operator == "arm" else [])
    again = run(case, given, "precision.storage_dtype=float32")
    whole = run(case, given, "precision.storage_dtype=float32", output="whole")
    assert again.model is not None
    assert whole.model is not None
    assert_same_bits(load_all(again.model), load_all(whole.model))


@pytest.mark.parametrize(
    ("value", "given", "written"),
    [
        (65_504.0, torch.float32, torch.float16),
        (65_505.0, torch.float32, torch.float16),
        (65_520.0, torch.float32, torch.float16),
        (3.4e38, torch.float32, torch.bfloat16),
        (1e39, torch.float64, torch.float32),
        (99_840.0, torch.bfloat16, torch.float16),
        (7e4, torch.float32, torch.float8_e5m2),
    ],
)
def test_no_finite_number_becomes_infinite_in_a_file(
    tmp_path: Path, value: float, given: torch.dtype, written: torch.dtype
) -> None:
    rows = torch.tensor([[1.0, -value]], dtype=given)
    # Half a step above the largest is rounded down to it.
    fits = value in (65_504.0, 65_505.0)
    file, specs = tmp_path / "one.safetensors", [TensorSpec("w", written, (1, 2))]
    if fits:
        write_weight_file(file, specs, [rows])
        assert float(load_file(file)["w"][0, 1]) == -65_504.0
        return
    with pytest.raises(NumericalError, match="w does not fit into") as caught:
        write_weight_file(file, specs, [rows])
    assert f"{value:.6g}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_was_not_finite_when_it_was_read_hides_no_number(tmp_path: Path, odd: float) -> None:
    file, specs = tmp_path / "one.safetensors", [TensorSpec("w", torch.float16, (1, 2))]
    with pytest.raises(NumericalError, match="w does not fit into float16"):
        write_weight_file(file, specs, [torch.tensor([[odd, 1e6]])])
    write_weight_file(file, specs, [torch.tensor([[odd, 1.0]])])
    assert torch.equal(load_file(file)["w"].isfinite(), torch.tensor([[False, True]]))


def test_the_last_good_state_stays_and_is_gone_on_from(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make(num_layers=2)
    # One iteration after another: otherwise the second may still be on its way when the third ends.
    one_by_one = "runtime.lookahead=0"
    whole = run(case, one_by_one, output="whole")
    with monkeypatch.context() as patch:
        multiply(patch, float("inf"), 3, WEIGHT)
        error = refused(case, one_by_one)
    assert isinstance(error, NumericalError)
    assert "iteration 3" in (error.where or "")
    directory = case.root / "run"
    assert sorted(states.finished_states(directory)) == [1, 2]
    status = status_of(directory)
    assert status.state == "failed"
    assert WEIGHT in status.told
    assert status.iteration == 2
    again = run(case, one_by_one)
    assert again.model is not None
    assert whole.model is not None
    assert_same_bits(load_all(again.model), load_all(whole.model))

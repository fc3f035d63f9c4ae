"""Values that differ between parts of a model: how they are written, and what is done with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from arm_ray.config import parse_merge_config
from arm_ray.config.parts import with_parts
from arm_ray.errors import ConfigError
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.operator_settings import TiesSettings
from arm_ray.merging.parts import at_depth, part_of
from arm_ray.merging.settings import MethodSettings
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.planning.render import render
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.tensors import gaussian


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)


def merged(case: MergeCase, output: str, *overrides: str) -> dict[str, torch.Tensor]:
    outcome = merge(case.config(*overrides, output=output), console=Console(quiet=True))
    return load_all(outcome.model or Path())


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        ((0.7,), 0.3, 0.7),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.5), 0.75, 0.75),
        ((0.2, 0.4, 0.8), 0.5, 0.4),
    ],
)
def test_a_list_is_spread_over_the_depth(values, depth: float, expected: float) -> None:
    assert at_depth(values, depth) == pytest.approx(expected)
    if len(values) > 1:
        even = np.linspace(0.0, 1.0, len(values))
        assert at_depth(values, depth) == pytest.approx(np.interp(depth, even, values))


def test_a_tensor_is_of_the_first_part_that_it_passes() -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    assert part_of(name, ["self_attn", "mlp", "*.down_proj"]) == "mlp"
    assert part_of(name, ["*.down_proj", "mlp"]) == "*.down_proj"
    assert part_of(name, ["*", "mlp"]) == "mlp"
    assert part_of(name, ["self_attn", "*"]) == "*"
    assert part_of(name, ["down_proj", "layers.3."]) == "down_proj"
    assert part_of(name, ["*.layers.4.*"]) is None


def test_keys_are_taken_apart() -> None:
    content = {
        "method": {
            "coefficient": {"self_attn": 0.5, "*.down_proj": [0.4, 0.9], "default": 0.6},
            "ties": {"keep": [0.2, 0.4], "scope": "per_tensor"},
            "slerp": {"t": 0.5},
        }
    }
    method = with_parts(content, "merge.yaml")["method"]
    assert method["by_part"] == {
        "coefficient": {"self_attn": [0.5], "*.down_proj": [0.4, 0.9]},
        "ties.keep": {"*": [0.2, 0.4]},
    }
    assert method["coefficient"] == 0.6
    assert method["ties"] == {"scope": "per_tensor"}
    assert method["slerp"] == {"t": 0.5}
    assert content["method"]["ties"]["keep"] == [0.2, 0.4]


@pytest.mark.parametrize(
    ("coefficient", "told"),
    [
        ([0.5, 11.0], "method.coefficient: got 11.0, expected at most 10"),
        ([], "method.coefficient: is an empty list"),
        ({}, "method.coefficient: is an empty mapping"),
        ({"mlp": "much"}, "method.coefficient.mlp: got 'much', expected a number"),
        ({"mlp": [0.1, 0.0]}, "method.coefficient.mlp: got 0.0, expected above 0"),
        ({"mlp": True}, "method.coefficient.mlp: got True"),
        ({"mlp": {"a": 0.5}}, "expected a number or a list of numbers"),
    ],
)
def test_what_is_no_value_is_told_with_its_place(
    case: MergeCase, coefficient: Any, told: str
) -> None:
    content = {**case.content(), "base": "b", "candidates": ["c"]}
    content["method"] = {"coefficient": coefficient}
    with pytest.raises(ConfigError) as caught:
        parse_merge_config(content)
    assert told in str(caught.value)


@pytest.mark.parametrize("operator", ["arm", "task_arithmetic"])
def test_a_coefficient_by_part_is_that_of_each_tensor(case: MergeCase, operator: str) -> None:
    """Each tensor has the bits of a merge with its own coefficient for all."""
    case.make("qwen2.5", num_layers=3)
    once = (f"method.operator={operator}", "schedule.anchor_iterations=1")
    once += ("schedule.max_iterations=1", "schedule.step=auto")
    found = merged(
        case, "parts", *once, "method.coefficient={self_attn: [0.2, 0.8], mlp: 0.4, default: 0.6}"
    )
    fixed = (*once[:-1], "schedule.step=fixed")
    whole = {
        value: merged(case, f"all-{value}", *fixed, f"method.coefficient={value}")
        for value in (0.2, 0.5, 0.8, 0.4, 0.6)
    }
    depths = {".layers.0.": 0.2, ".layers.1.": 0.5, ".layers.2.": 0.8}
    for name, tensor in found.items():
        value = 0.6
        if "self_attn" in name:
            value = next(v for piece, v in depths.items() if piece in name)
        elif "mlp" in name:
            value = 0.4
        assert torch.equal(tensor, whole[value][name]), name


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("in_mlp", "elsewhere"), [(0.5, 0.2), (1.0, 0.2), (0.2, 1.0)])
def test_a_threshold_by_part_is_that_of_each_tensor(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, large: bool, in_mlp: float, elsewhere: float
) -> None:
    """Also where a tensor is too large to be measured whole."""
    case.make("qwen2.5")
    if large:
        monkeypatch.setattr("arm_ray.runtime.shards.linear._LARGEST_WHOLE", 100)
    ties = ("method.operator=ties", "method.ties.scope=per_tensor", "calibration=null")
    by_part = f"method.ties.keep={{mlp: {in_mlp}, default: {elsewhere}}}"
    found = merged(case, "parts", *ties, by_part)
    mlp = merged(case, "mlp", *ties, f"method.ties.keep={in_mlp}")
    others = merged(case, "others", *ties, f"method.ties.keep={elsewhere}")
    assert_same_bits(found, {n: (mlp if "mlp" in n else others)[n] for n in found})


def test_dare_s_rate_by_part() -> None:
    settings = MethodSettings("dare", by_part={"dare.drop_rate": {"*": (0.0, 0.9)}})
    method = open_method(settings, 2)
    reference = torch.zeros(40, 50)
    shares = []
    for depth in (0.0, 0.5, 1.0):
        inputs = TensorInputs("w", reference, [gaussian(40, 50, seed=1)], 1, depth=depth)
        shares.append(float((method.merge(inputs).tensor != 0).float().mean()))
    assert shares[0] == 1.0
    assert shares[1] == pytest.approx(0.55, abs=0.04)
    assert shares[2] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method.coefficient=[0.2, 0.8]", "schedule.step=subspace"], "looks for one coefficient"),
        (["method.operator=ties", "method.ties.keep=[0.1, 0.2]"], "one threshold over the whole"),
        (["method.operator=average", "method.coefficient=[0.2, 0.8]"], "has no coefficient"),
        (["method.slerp.t=[0.2, 0.8]"], "method.slerp: is set, but operator 'arm'"),
        (["method.coefficient={self_atn: 0.5}"], "no tensor of the model is 'self_atn'"),
        (["method.coefficient={mlp: 0.5, down_proj: 0.4}"], "'down_proj', or another filter takes"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    case: MergeCase, overrides: list[str], told: str
) -> None:
    case.make()
    with pytest.raises(ConfigError) as caught:
        merged(case, "run", *overrides)
    assert told in str(caught.value)


def test_a_step_is_not_searched_where_the_coefficient_has_parts(case: MergeCase) -> None:
    config = case.make().config("method.coefficient=[0.2, 0.8]", "schedule.step=auto")
    assert config.schedule.step == "fixed"
    assert case.config("schedule.step=auto", output="b").schedule.step == "subspace"


def test_the_plan_says_what_each_part_gets(case: MergeCase) -> None:
    case.make()
    given = "method.coefficient={self_attn: [0.2, 0.8], default: 0.6}"
    config = case.config(given, "runtime.device=cpu")
    plan = make_plan(config, make_cluster(config.runtime, gpu_memory_gb=8.0, device="cpu"))
    parts = {fact.part: (fact.tensors, fact.first, fact.last) for fact in plan.model.by_part}
    assert parts == {"self_attn": (12, 0.2, 0.8), "*": (17, 0.6, 0.6)}
    text = render(plan)
    assert "method.coefficient 0.2 (first layer) to 0.8 (last) in 12 tensor(s): self_attn" in text
    assert "method.coefficient 0.6 in 17 tensor(s): all others" in text


def test_settings_by_part_survive_the_run_s_own_configuration(case: MergeCase) -> None:
    """A run that goes on reads what it has written, and finds nothing changed."""
    case.make()
    given = ("method.coefficient=[0.2, 0.8]",)
    config = case.config(*given)
    merge(config, console=Console(quiet=True), stop_after=2)
    again = merge(config, console=Console(quiet=True))
    assert again.model is not None
    card = (again.model / "README.md").read_text()
    assert "| operator | `arm`, coefficient 0.2 to 0.8 (`*`) |" in card
    whole = merged(case, "whole", *given)
    assert_same_bits(whole, load_all(again.model))


def test_an_override_holds_in_place_of_values_that_were_saved(case: MergeCase) -> None:
    case.make()
    method = {"coefficient": 0.7, "by_part": {"coefficient": {"*": [0.2, 0.2]}}}
    content = {**case.content(), "method": method}
    kept = parse_merge_config(content, ["schedule.max_iterations=1"])
    assert kept.method.by_part == {"coefficient": {"*": (0.2, 0.2)}}
    for override in ("method.coefficient=0.5", "method.coefficient={default: 0.5}"):
        changed = parse_merge_config(content, [override]).method
        assert (changed.coefficient, changed.by_part) == (0.5, {})


@pytest.mark.parametrize(
    ("by_part", "told"),
    [
        ({"nonsense": {"*": [0.5]}}, "method.by_part.nonsense: no key with values by part"),
        ({"coefficient": {"*": []}}, "method.by_part.coefficient.*: is an empty list"),
        ({"coefficient": {"*": [-50]}}, "method.by_part.coefficient.*: got -50, expected above 0"),
        ({"coefficient": 3}, "method.by_part.coefficient: got 3, expected a mapping"),
        ([1], "method.by_part: got [1], expected a mapping"),
    ],
)
def test_what_was_saved_is_checked_too(case: MergeCase, by_part: Any, told: str) -> None:
    content = {**case.make().content(), "method": {"by_part": by_part}}
    with pytest.raises(ConfigError) as caught:
        parse_merge_config(content)
    assert told in str(caught.value)


def test_limits_hold_for_each_part() -> None:
    della = MethodSettings("della", by_part={"della.drop_rate": {"mlp": (0.5, 0.95)}})
    with pytest.raises(ConfigError, match=r"method\.della\.epsilon: got 0\.1 with drop_rate 0\.95"):
        open_method(della, 2)
    open_method(MethodSettings("della", by_part={"della.drop_rate": {"mlp": (0.5, 0.8)}}), 2)
    dare = MethodSettings("dare", by_part={"dare.drop_rate": {"mlp": (0.9,), "*": (0.0,)}})
    assert dare.full_rank_reasons
    nothing = MethodSettings("dare", by_part={"dare.drop_rate": {"mlp": (0.0,), "*": (0.0,)}})
    assert not nothing.full_rank_reasons


def test_ties_settings_keep_their_type() -> None:
    settings = MethodSettings("ties", ties=TiesSettings(scope="per_tensor"))
    assert settings.unused_sections == []


def test_weights_of_an_average_by_part_are_those_of_each_tensor(case: MergeCase) -> None:
    """The first model's a number, the second's by name, and by depth where no name fits."""
    case.make()
    average = (
        "method.operator=average",
        "method.average.kind=weighted",
        "method.average.weights=[1.0, {self_attn: 0.5, default: [0.0, 2.0]}]",
        "schedule.anchor_iterations=1",
        "schedule.max_iterations=1",
    )
    found = merged(case, "run", *average)
    candidates = [load_all(path) for path in case.candidates]
    layers = 3
    for name, tensor in found.items():
        number = name.split(".layers.")[-1].partition(".")[0]
        layer = int(number) if number.isdigit() else (0 if "embed" in name else layers - 1)
        second = 0.5 if "self_attn" in name else 2.0 * layer / (layers - 1)
        weights = np.array([1.0, second]) / (1.0 + second)
        expected = sum(w * c[name].double() for w, c in zip(weights, candidates, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0, {"self_attn": 0.5}], "method.average.weights.1: says nothing for other parts"),
        ([1.0, {"self_attn": -1.0, "default": 1.0}], "weights.1.self_attn: got -1.0"),
        ([1.0, []], "method.average.weights.1: is an empty list"),
    ],
)
def test_weights_by_part_that_say_nothing_are_told(weights: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        with_parts({"method": {"average": {"weights": weights}}}, "merge.yaml")


def test_a_part_without_any_weight_is_refused(case: MergeCase) -> None:
    zero = "method.average.weights=[{mlp: 0.0, default: 1.0}, {mlp: [0.0, 0.0], default: 1.0}]"
    average = (
        "method.operator=average",
        "method.average.kind=weighted",
        zero,
        "schedule.anchor_iterations=1",
        "schedule.max_iterations=1",
    )
    case.make()
    with pytest.raises(ConfigError, match="the weights of all models are zero for"):
        merged(case, "run", *average)


def test_saved_weights_by_part_name_an_entry_that_is_there() -> None:
    method = {
        "average": {"kind": "weighted", "weights": [1.0, 2.0]},
        "by_part": {"average.weights.2": {"mlp": [1.0]}},
    }
    with pytest.raises(ConfigError, match=r"average\.weights\.2: there is no such entry"):
        with_parts({"method": method}, "merge.yaml")

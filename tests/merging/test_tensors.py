"""Operators on state dicts in memory: the bits of a merge on disk, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import arm_ray.merging as public
from arm_ray.config import parse_merge_config
from arm_ray.errors import ArmRayError, ConfigError, MismatchError
from arm_ray.merging import merge_state_dicts, merge_tensors, method_settings
from arm_ray.merging.settings import MethodSettings
from tests.builders.checkpoints import assert_same_bits
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run

W = "model.layers.0.mlp.up_proj.weight"


def models(count: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def made() -> dict[str, Tensor]:
        return {
            W: torch.randn(6, 5, generator=generator),
            "model.norm.weight": torch.randn(5, generator=generator),
            "steps": torch.tensor([3]),
        }

    return made(), [made() for _ in range(count)]


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("operator", "sections"),
    [
        ("task_arithmetic", {}),
        ("ties", {"ties": {"keep": 0.3}, "coefficient": 1.0}),
        ("dare", {"dare": {"drop_rate": 0.5}}),
    ],
)
def test_the_bits_are_those_of_a_merge_on_disk(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, operator: str, sections: dict[str, Any]
) -> None:
    monkeypatch.setattr("arm_ray.runtime.merge.run.is_up_or_named", lambda _address: False)
    case.make()
    method = {"operator": operator, **sections}
    content = case.content()
    content["schedule"] = {"max_iterations": 1, "anchor_iterations": 1, "step": "fixed"}
    done = run(parse_merge_config({**content, "method": method}))
    assert done.model is not None
    merged = merge_state_dicts(
        weights_of(case.root / "base"), [weights_of(p) for p in case.candidates], operator,
        **sections,
    )  # fmt: skip
    assert_same_bits(merged, weights_of(done.model))


def test_the_formula_and_what_is_left_alone() -> None:
    base, given = models()
    kept = [{name: t.clone() for name, t in model.items()} for model in (base, *given)]
    merged = merge_state_dicts(base, given, coefficient=0.5)
    expected = base[W] + 0.5 * ((given[0][W] - base[W]) + (given[1][W] - base[W])) / 2
    assert torch.allclose(merged[W], expected, atol=1e-6)
    assert torch.equal(merged["steps"], base["steps"])
    for model, before in zip((base, *given), kept, strict=True):
        assert all(torch.equal(model[name], before[name]) for name in before)
        assert all(merged[name].data_ptr() != model[name].data_ptr() for name in before)


def test_the_dtype_is_the_bases() -> None:
    base, given = models()
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.items()}
    merged = merge_state_dicts(half, given)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16, torch.int64}


def test_arm_rotates_by_shifts() -> None:
    base, given = models()
    shifts = [torch.randn(6, 3, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    merged = merge_tensors(base[W], [m[W] for m in given], "arm", shifts=shifts, coefficient=0.7)
    rotated = [
        public.activation_rotation(shift).apply(model[W] - base[W])
        for shift, model in zip(shifts, given, strict=True)
    ]
    assert torch.allclose(merged, base[W] + 0.7 * (rotated[0] + rotated[1]) / 2, atol=1e-5)
    again = merge_state_dicts(base, given, "arm", shifts={W: shifts}, coefficient=0.7)
    assert torch.equal(again[W], merged)


def test_low_rank_edits_are_of_linear_modules() -> None:
    base, given = models(1)
    edited = merge_state_dicts(base, given, edit="alpharl", alpharl={"rank": 1, "others": "keep"})
    delta = edited[W] - base[W]
    assert int(torch.linalg.matrix_rank(delta, rtol=1e-4)) == 1
    plain = merge_state_dicts(base, given)
    assert torch.equal(edited["model.norm.weight"], plain["model.norm.weight"])


def test_settings_are_those_of_a_configuration() -> None:
    made = method_settings("ties", coefficient=1.0, ties={"keep": 0.3, "scope": "per_tensor"})
    assert isinstance(made, MethodSettings)
    assert (made.operator, made.ties.keep, made.ties.scope) == ("ties", 0.3, "per_tensor")
    base, given = models()
    left = merge_state_dicts(base, given, made)
    assert torch.equal(left[W], merge_state_dicts(base, given, made, coefficient=1.0)[W])


@pytest.mark.parametrize(
    ("operator", "settings", "words"),
    [
        ("ties", {"ties": {"keep": 2.0}}, "at most 1"),
        ("ties", {"ties": {"density": 0.5}}, "there is no such setting"),
        ("ties", {"ties": {"scope": "row"}}, "'global' or 'per_tensor'"),
        ("ties", {"coefficient": "big"}, "a setting is no number"),
        ("tise", {}, "no operator is called 'tise'"),
        ("slerp", {"coefficient": 0.5}, "coefficient"),
        ("task_arithmetic", {"ties": {"keep": 0.5}}, "does not read it"),
        ("arm", {}, "none are given"),
        ("aim", {}, "needs more than the weights"),
    ],
)
def test_wrong_settings(operator: str, settings: dict[str, Any], words: str) -> None:
    base, given = models()
    with pytest.raises(ConfigError, match=words):
        merge_state_dicts(base, given, operator, **settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda base, given: given[1].pop(W),
        lambda base, given: given[0].update({W: given[0][W][:2]}),
        lambda base, given: given.clear(),
    ],
)
def test_models_that_do_not_fit(change: Any) -> None:
    base, given = models()
    change(base, given)
    with pytest.raises(ArmRayError, match=r"base|no models"):
        merge_state_dicts(base, given)


@pytest.mark.parametrize(
    "shifts",
    [
        {W: [torch.zeros(6, 3)]},
        {W: [torch.zeros(5, 3), torch.zeros(5, 3)]},
        {"model.norm.weight": [torch.zeros(5, 3)] * 2},
        {"other": [torch.zeros(5, 3)] * 2},
    ],
)
def test_shifts_that_do_not_fit(shifts: dict[str, list[Tensor]]) -> None:
    base, given = models()
    with pytest.raises(MismatchError, match="shifts"):
        merge_state_dicts(base, given, "arm", shifts=shifts)

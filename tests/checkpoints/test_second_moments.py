"""OTA's second moments, from their files to the operator: read, checked, and handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arm_ray.config import MergeConfig
from arm_ray.errors import (
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
)
from arm_ray.runtime.inputs import open_inputs
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard, Weights

NAME = "model.layers.1.mlp.up_proj.weight"
ANCHORED = "schedule={anchor_iterations: 2, max_iterations: 2, tolerance: 0.0}"


def weights(path: Path) -> Weights:
    return {name: t.clone() for name, t in load_file(path / "model.safetensors").items()}


def write_moments(case: MergeCase, dtype: torch.dtype = torch.float32) -> list[Path]:
    """A directory without config.json for each candidate: squares of small random numbers."""
    paths = []
    for index, candidate in enumerate(case.candidates):
        generator = torch.Generator().manual_seed(50 + index)
        moments = {
            name: (1e-3 * torch.randn(t.shape, generator=generator)).square().to(dtype)
            for name, t in weights(candidate).items()
        }
        paths.append(case.root / f"moments-{index}")
        paths[-1].mkdir(exist_ok=True)
        save_file(moments, paths[-1] / "model.safetensors")
    return paths


def configure(case: MergeCase, paths: list[Path], *overrides: str, output: str = "run") -> Any:
    given = ", ".join(map(str, paths))
    return case.config(
        "method.operator=ota",
        f"method.ota.second_moments=[{given}]",
        ANCHORED,
        *overrides,
        output=output,
    )


def expected(reference: Weights, case: MergeCase, paths: list[Path], density: float) -> Weights:
    """Σ P_i ΔW_i / Σ P_i in float64; the threshold is taken over the whole model."""
    above = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in reference.items()}
    below = {name: t.clone() for name, t in above.items()}
    for candidate, path in zip(case.candidates, paths, strict=True):
        moments = {name: t.double() for name, t in weights(path).items()}
        own = weights(candidate)
        # As the engine has them: differences in float32.
        changes = {n: (own[n].float() - t.float()).double() for n, t in reference.items()}
        saliency = {n: moments[n] * changes[n] ** 2 for n in reference}
        every = torch.cat([t.flatten() for t in saliency.values()]).sort().values
        dropped = len(every) - int(len(every) * density)
        limit = float(every[dropped - 1]) if dropped else 0.0
        for name in reference:
            # Saliencies are compared in float32: leave room at the threshold itself.
            kept = saliency[name] >= limit * (1 - 1e-5)
            weight = (moments[name].sqrt() + 1e-26) * kept
            above[name] += weight * changes[name]
            below[name] += weight
    return {
        name: reference[name].double() + torch.where(below[name] > 0, t / below[name], 0.0)
        for name, t in above.items()
    }


def assert_near(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name].double() - tensor).norm() / tensor.norm()) < 1e-6, name


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_two_anchored_iterations_are_the_formula(case: MergeCase, density: float) -> None:
    case.make()
    paths = write_moments(case)
    config = configure(case, paths, f"method.ota.density={density}")
    shard = DirectShard(config)
    first = shard.linear(1)
    assert_near(first, expected(weights(case.root / "base"), case, paths, density))
    assert_near(shard.linear(2), expected(first, case, paths, density))


@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_residency_and_stored_dtype_decide_no_bits(case: MergeCase, residency: str) -> None:
    case.make("qwen2.5")
    paths = write_moments(case, torch.bfloat16)
    plain = DirectShard(configure(case, paths, output="plain")).linear(1)
    wide = [path.with_name(f"{path.name}-wide") for path in paths]
    for narrow, path in zip(paths, wide, strict=True):
        path.mkdir()
        save_file({n: t.float() for n, t in weights(narrow).items()}, path / "model.safetensors")
    overrides = (f"runtime.residency={residency}", "runtime.layers_per_group=2")
    shard = DirectShard(configure(case, wide, *overrides, output=residency))
    found = shard.linear(1)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    # Nothing of them stays behind the group.
    assert shard.shard._store._moments == {}


def test_rotated_task_vectors_with_equal_moments_have_their_mean(case: MergeCase) -> None:
    """The path with forward passes: equal weights make OTA a mean, which is task arithmetic."""
    case.make()
    paths = write_moments(case)
    for path in paths:
        ones = {name: torch.ones_like(t) for name, t in weights(path).items()}
        save_file(ones, path / "model.safetensors")
    found = DirectShard(configure(case, paths, "method.rotate=true")).with_forward(1)
    plain = case.config(
        "method.operator=task_arithmetic",
        "method.coefficient=1.0",
        "method.rotate=true",
        ANCHORED,
        output="plain",
    )
    wanted = DirectShard(plain).with_forward(1)
    assert_near(found, {name: tensor.double() for name, tensor in wanted.items()})


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_what_is_no_mean_of_squares_is_refused(case: MergeCase, bad: float) -> None:
    case.make()
    paths = write_moments(case)
    moments = weights(paths[1])
    moments[NAME][70, 5] = bad
    save_file(moments, paths[1] / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=f"second moments of {NAME} hold") as caught:
        DirectShard(configure(case, paths)).linear(1)
    error = caught.value
    assert error.where == f"second moments of candidate-2: {paths[1] / 'model.safetensors'}"
    assert (error.got or "").endswith("at [70, 5]")


def test_zero_is_a_moment(case: MergeCase) -> None:
    """A weight without a history takes the plain mean."""
    case.make()
    paths = write_moments(case)
    for path in paths:
        moments = weights(path)
        moments[NAME].zero_()
        save_file(moments, path / "model.safetensors")
    found = DirectShard(configure(case, paths)).linear(1)[NAME]
    mean = sum(weights(path)[NAME].double() for path in case.candidates) / 2
    assert float((found.double() - mean).norm() / mean.norm()) < 1e-6


def test_fingerprints_name_them_and_change_with_them(case: MergeCase) -> None:
    case.make()
    paths = write_moments(case)
    before = open_inputs(configure(case, paths)).fingerprints
    assert sorted(before) == [
        "base",
        "candidate-1",
        "candidate-2",
        "second moments of candidate-1",
        "second moments of candidate-2",
    ]
    moments = {name: 2 * tensor for name, tensor in weights(paths[0]).items()}
    (paths[0] / "model.safetensors").unlink()
    save_file(moments, paths[0] / "model.safetensors")
    after = open_inputs(configure(case, paths)).fingerprints
    assert [name for name in before if before[name] != after[name]] == [
        "second moments of candidate-1"
    ]


def refused(config: MergeConfig, kind: type[Exception], match: str) -> Any:
    with pytest.raises(kind, match=match) as caught:
        open_inputs(config)
    return caught.value


def test_directories_that_do_not_fit(case: MergeCase) -> None:
    case.make()
    paths = write_moments(case)
    error = refused(configure(case, paths[:1]), ConfigError, "not one directory")
    assert (error.got, error.where) == ("1 directories", "method.ota.second_moments")
    missing = [paths[0], case.root / "nowhere"]
    match = r"^second moments of candidate-2: a checkpoint directory does not exist"
    refused(configure(case, missing), NotACheckpointError, match)
    moments = weights(paths[1])
    norm = moments.pop("model.norm.weight")
    save_file(moments, paths[1] / "model.safetensors")
    error = refused(configure(case, paths), MismatchError, "a tensor is missing")
    assert error.where.startswith("second moments of candidate-2: ")
    assert "zeros for one that was frozen" in error.hint
    save_file({**moments, "model.norm.weight": norm[:-1].clone()}, paths[1] / "model.safetensors")
    refused(configure(case, paths), MismatchError, r"the shape of model\.norm\.weight differs")
    (paths[1] / "model.safetensors").write_bytes(b"")
    refused(configure(case, paths), CorruptCheckpointError, r"^second moments of candidate-2: ")

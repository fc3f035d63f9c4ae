"""An operator that another package brings: installed as a distribution, found by its name.

The operator is the example of `docs/adding-an-operator.md`, word for word.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arm_ray.config import MergeConfig, load_merge_config, parse_merge_config
from arm_ray.errors import ConfigError
from arm_ray.merging.method import Method, open_method
from arm_ray.merging.operator import Operator
from arm_ray.merging.registry import ENTRY_POINTS, OPERATORS, find_operator
from arm_ray.merging.settings import OPERATOR_NAMES, MethodSettings
from tests.builders.operators import assert_rows_give_the_whole, inputs_of, merge
from tests.builders.paths import ROOT
from tests.builders.tensors import gaussian

GUIDE = ROOT / "docs" / "adding-an-operator.md"
Install = Callable[[str, str, str], Path]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a module and its metadata where an installer would; returns the directory."""
    site, modules = tmp_path / "site", set(sys.modules)

    def install(module: str, source: str, entries: str) -> Path:
        info = site / f"{module}-0.1.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        name = module.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entries}\n")
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()
        return site

    yield install
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(site)):
            del sys.modules[name]


@pytest.fixture
def example(install: Install) -> Path:
    """The guide's package."""
    # By hand: Python 3.10 reads no TOML.
    table = rf'\[project\.entry-points\."{re.escape(ENTRY_POINTS)}"\]\n(\w+) = "(.*)"\n'
    [(name, value)] = re.findall(table, blocks("toml")[0])
    return install("my_merging", blocks("python")[0], f"{name} = {value}")


def content(**method: Any) -> dict[str, Any]:
    return {
        "base": "base",
        "candidates": ["one", "two", "three"],
        "output": "out",
        "schedule": {"window_size": 3},
        "method": {"operator": "trimmed_mean", **method},
    }


def parse(**method: Any) -> MergeConfig:
    return parse_merge_config(content(**method))


def opened(*num_models: int, **method: Any) -> Method:
    return open_method(parse(**method).method, *(num_models or (3,)), has_window=True)


# ---- the example


def test_it_is_found_by_its_name(example: Path) -> None:
    operator = find_operator("trimmed_mean")
    assert isinstance(operator, Operator)
    assert operator.name == "trimmed_mean"
    assert sys.modules["my_merging"].__file__ == str(example / "my_merging.py")
    method = opened(options={"cut": 1})
    assert method.operator is operator
    assert not method.needs_forward
    assert method.rounds(3) == 0


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (3, 2, 2)])
@pytest.mark.parametrize(("count", "cut", "window"), [(3, 1, False), (4, 1, True), (7, 2, False)])
def test_it_merges(example: Path, shape, count: int, cut: int, window: bool) -> None:
    vectors = [gaussian(*shape, seed=i) for i in range(count)]
    inputs = inputs_of(gaussian(*shape, seed=9), vectors, includes_reference=window)
    models = count + window
    found = merge(opened(models, options={"cut": cut}, coefficient=0.5), inputs)
    changes = [c.double() - inputs.reference.double() for c in inputs.contributors]
    changes += [torch.zeros(shape, dtype=torch.float64)] * window
    middle = torch.stack(changes).sort(0).values[cut : models - cut].mean(0)
    expected = inputs.reference.double() + 0.5 * middle
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.equal(
        merge(opened(models), replace(inputs, contributors=[inputs.reference] * count)),
        inputs.reference,
    )


def test_its_pieces_give_the_bits_of_the_whole(example: Path) -> None:
    vectors = [gaussian(23, 11, seed=i) for i in range(9)]
    method = opened(9, options={"cut": 1})
    assert_rows_give_the_whole(method, inputs_of(gaussian(23, 11, seed=50), vectors), [3, 4, 17])


def test_the_steps_around_it_are_there(example: Path) -> None:
    shift = gaussian(6, 3, seed=4)
    vectors = [gaussian(6, 5, seed=i) for i in range(3)]
    plain = inputs_of(torch.zeros(6, 5), vectors, shifts=[shift] * 3, is_linear=True)
    method = open_method(MethodSettings("trimmed_mean", 1.0, rotate=True, options={"cut": 1}), 3)
    assert method.needs_forward
    assert method.merge(plain).rotated == 3
    assert method.settings.needs_calibration


def test_the_test_of_the_guide_passes(example: Path) -> None:
    exec(compile(blocks("python")[1], str(GUIDE), "exec"), {})


def test_the_configuration_takes_its_name_and_options(example: Path, tmp_path: Path) -> None:
    config = parse(options={"cut": 1, "note": ["a", 2.5, None, {"b": True}]})
    assert config.method.operator == "trimmed_mean"
    assert config.method.options == {"cut": 1, "note": ["a", 2.5, None, {"b": True}]}
    assert config.calibration is None
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_merge_config(file) == config
    assert load_merge_config(file, ["method.options.cut=2"]).method.options["cut"] == 2


def test_its_own_check_is_asked_for_every_number_of_models(example: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(2, 3, 4, options={"cut": 1, "side": "left"})
    assert caught.value.what.splitlines()[1:] == [
        "  - method.options.side: unknown key; known here: cut",
        "  - method.options.cut: got 1, which leaves none of 2 models",
    ]


def test_options_without_such_an_operator_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.options: is set, but operator 'ties'"):
        open_method(MethodSettings("ties", options={"cut": 1}), 2)


def test_it_is_found_in_a_fresh_interpreter(example: Path, tmp_path: Path) -> None:
    program = (
        "from arm_ray.config import load_merge_config\n"
        "from arm_ray.merging.method import open_method\n"
        f"config = load_merge_config({str(tmp_path / 'merge.yaml')!r})\n"
        "print(open_method(config.method, 3).operator.name)\n"
    )
    (tmp_path / "merge.yaml").write_text(parse(options={"cut": 1}).to_yaml(), encoding="utf-8")
    path = os.pathsep.join([str(example), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("trimmed_mean", 0), done.stderr


# ---- what goes wrong


def test_a_name_that_nobody_has_is_answered_with_all_that_are_there(example: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merge_config(content() | {"method": {"operator": "trimed_mean"}})
    assert "opcm" in caught.value.what
    assert "did you mean 'trimmed_mean'?" in caught.value.what
    with pytest.raises(ConfigError, match="no operator is called 'trimed_mean'"):
        find_operator("trimed_mean")


@pytest.mark.parametrize(
    ("source", "entry", "got"),
    [
        ("raise RuntimeError('no licence')", "OPERATOR", "RuntimeError: no licence"),
        ("import a_module_that_is_not_there", "OPERATOR", "ModuleNotFoundError: No module named"),
        ("OPERATOR = 1 +", "OPERATOR", "SyntaxError: "),
        ("", "OPERATOR", "AttributeError: "),
        ("OPERATOR = 'ties'", "OPERATOR", "str"),
        ("def update(given, settings): ...", "update", "function"),
        (
            "from arm_ray.merging.operator import Operator\nOPERATOR = Operator",
            "OPERATOR",
            "type",
        ),
    ],
)
def test_a_broken_entry_point_is_named(install: Install, source: str, entry: str, got: str) -> None:
    install("broken_merging", source, f"broken = broken_merging:{entry}")
    config = parse_merge_config(content() | {"method": {"operator": "broken"}})
    with pytest.raises(ConfigError, match="'broken' of another package cannot be used") as caught:
        open_method(config.method, 3)
    assert caught.value.where == f"entry point broken_merging:{entry}"
    assert (caught.value.got or "").startswith(got)
    assert "docs/adding-an-operator.md" in (caught.value.hint or "")


def test_a_broken_one_is_not_in_the_way_of_others(install: Install) -> None:
    install("broken_merging", "raise RuntimeError", "broken = broken_merging:OPERATOR")
    assert open_method(MethodSettings("ties"), 2).operator is OPERATORS["ties"]


def test_the_names_of_our_own_operators_are_taken(install: Install) -> None:
    install("greedy_merging", "raise RuntimeError", "ties = greedy_merging:OPERATOR")
    assert find_operator("ties") is OPERATORS["ties"]


def test_every_operator_is_in_the_settings_and_every_name_leads_to_one() -> None:
    assert OPERATORS.keys() <= set(OPERATOR_NAMES)
    for name in OPERATOR_NAMES:
        assert find_operator(MethodSettings(name).steps[-1]).name in OPERATORS

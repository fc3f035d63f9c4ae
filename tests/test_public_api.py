"""What is public is on the list, and the page is made of the list."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import arm_ray
from arm_ray.cli import main
from arm_ray.cli.parser import make_parser
from arm_ray.public_api import JOBS, PUBLIC, as_markdown
from tests.builders.paths import ROOT


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list_is_what_the_module_says(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(PUBLIC[module]) == sorted(found.__all__)
    for name in PUBLIC[module]:
        value = getattr(found, name)
        assert value is getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            hints = inspect.signature(value).parameters.values()
            assert all(p.annotation is not p.empty for p in hints), name


def test_the_names_that_are_stable() -> None:
    """Taking one away, or renaming it, is a change that users have to be told of."""
    assert set(PUBLIC["arm_ray"]) >= {
        "merge", "evaluate", "attach", "plan", "load_config",
        "MergeResult", "EvaluateResult", "AttachResult", "Score", "ArmRayError", "__version__",
    }  # fmt: skip
    assert set(PUBLIC["arm_ray.merging"]) >= {
        "merge_tensors", "merge_state_dicts", "method_settings", "activation_rotation",
        "find_operator", "Operator", "TaskVectors", "TensorInputs", "Statistics",
    }  # fmt: skip
    assert PUBLIC["arm_ray.integrations"] == ("AttachCallback",)


def test_every_package_with_public_names_is_on_the_list() -> None:
    public = {
        ".".join(path.relative_to(ROOT).parts[:-1])
        for path in (ROOT / "arm_ray").rglob("__init__.py")
        if "lazily(" in path.read_text(encoding="utf-8")
    }
    assert public == set(PUBLIC)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "python -m arm_ray.public_api > docs/api.md"
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("name", JOBS)
def test_jobs_of_the_package_and_of_a_checkout_are_the_same(name: str) -> None:
    inside = importlib.import_module(f"arm_ray.jobs.{name}")
    assert importlib.import_module(f"jobs.{name}").main is inside.main
    assert inside.main(["--help"] if name in ("sft", "grpo") else ["/nowhere.yaml"]) in (0, 1)


def test_all_jobs_are_named() -> None:
    for folder in ("arm_ray/jobs", "jobs"):
        files = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert files - {"__init__", "command", "training"} == set(JOBS)


def test_the_version_is_said_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == arm_ray.__version__


def test_commands_of_the_docs_are_there() -> None:
    said: set[str] = set()
    for path in [*Path(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        said |= set(re.findall(r"^(?:    )?arm-ray (\w+)", path.read_text(), re.MULTILINE))
    [commands] = [a for a in make_parser()._actions if a.choices]
    assert said
    assert said <= set(commands.choices or ())


def test_typed() -> None:
    assert (ROOT / "arm_ray" / "py.typed").is_file()

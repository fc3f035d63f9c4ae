"""What people install: the wheel's content, and the documents of a release."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import arm_ray
from tests.builders.paths import ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves a folder beside what it builds.
    source = folder / "source"
    source.mkdir()
    for name in ("arm_ray", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    assert path.name.startswith(f"arm_ray-{arm_ray.__version__}-")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel: list[str]) -> None:
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "arm_ray").rglob("*.py")}
    assert sources <= set(wheel)
    roots = {name.split("/")[0] for name in wheel}
    assert not roots & {"tests", "benchmarks", "examples", "scripts", "studies"}


def test_the_wheel_has_what_is_no_python(wheel: list[str]) -> None:
    """Types, and the parts of a report's page."""
    data = [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "arm_ray").rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    assert "arm_ray/py.typed" in data
    assert set(data) <= set(wheel)


def test_a_release_is_told_with_its_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == arm_ray.__version__
    assert f"## {arm_ray.__version__} " in Path(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

"""The studies of the paper's tables, and the example of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from arm_ray import cli
from arm_ray.config import validate
from arm_ray.study.config import StudyConfig, load_study_config
from arm_ray.study.plan import Study
from tests.builders.paths import ROOT

FILES = sorted((ROOT / "studies").glob("*.yaml"))
OF_THE_PAPER = [path for path in FILES if path.stem.startswith("paper-")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_that_is_there_is_one(path: Path) -> None:
    study = Study(load_study_config(path), str(path))
    assert study.cells
    assert study.config.tables
    if path in OF_THE_PAPER:
        # Every merge has the settings of a row of the paper.
        assert all(str(m.config.preset).startswith("paper/") for m in study.merges.values())
    assert f"`{path.name}`" in (ROOT / "studies/README.md").read_text()


def test_every_table_of_the_paper_has_a_study() -> None:
    text = (ROOT / "studies/README.md").read_text()
    numbers = {int(n) for row in re.findall(r"Tables? ([\d, and]+)", text)
               for n in re.findall(r"\d+", row)}  # fmt: skip
    assert numbers == set(range(1, 14))
    assert {f"Figure {n}" for n in range(3, 8)} <= set(re.findall(r"Figure \d", text))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == "paper-single-turn" else pytest.mark.minutes)
        for path in OF_THE_PAPER
    ],
    ids=lambda path: path.stem,
)
def test_a_study_of_the_paper_passes_its_dry_run(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["study", str(path), "--dry-run", "--gpus", "8"]) == 0
    assert "merges in all: " in capsys.readouterr().out


def test_the_example_of_the_docs_is_one() -> None:
    text = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    study = Study(validate(StudyConfig, yaml.safe_load(example), source="docs"), "docs")
    assert {run.series for run in study.runs} == {"smooth", "given", "mixed", "further"}
    assert sum(run.training is not None for run in study.runs) == 6


@pytest.mark.parametrize(
    ("study", "tables"),
    [
        ("mini-step", {"last", "gain", "operators", "losses", "cost"}),
        ("mini-further", {"lengths", "rounds", "going_on", "going_on_difference"}),
        ("mini-rl", {"answers", "gain"}),
        ("mini-rl-qwen", {"answers", "gain"}),
        ("mini-math-code", {"scores", "best"}),
        ("mini-code-answers", {"scores", "best"}),
        ("mini-choice", {"choice", "choice_last", "samples", "going_on", "going_on_difference"}),
    ],
)
def test_the_tables_of_the_docs_are_those_of_the_results(study: str, tables: set[str]) -> None:
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    for name in tables:
        text = (ROOT / f"studies/results/{study}/tables/{name}.md").read_text(encoding="utf-8")
        assert text.split("\n\n")[1] in page, name


def test_the_first_table_of_the_readme_rounds_those_of_the_results() -> None:
    results = ROOT / "studies/results/mini-step"
    losses = (results / "tables/losses.md").read_text()
    means = {round(float(n), 3) for n in re.findall(r"\b(0\.\d{4}) ±", losses)}
    section = (ROOT / "README.md").read_text().split("## Does it pay?")[1].split("\n## ")[0]
    numbers = {float(n) for n in re.findall(r"\b0\.\d{3}\b", section)} - {0.001}
    assert len(numbers) >= 10
    assert numbers <= means

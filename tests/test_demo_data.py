"""The demo's data files: well-formed, and no problem in two of them."""

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from arm_ray.jobs.sft import load_config
from arm_ray.training.pipeline import Stages, load_pipeline_config
from tests.builders.paths import ROOT

DEMO = Path(__file__).parents[1] / "examples" / "smollm2"
ROWS = {"train": 496, "calibration": 100, "validation": 103, "heldout": 301}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = load_script("make_data")


def read(name):
    lines = (DEMO / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_well_formed(name):
    rows = read(name)
    assert len(rows) == ROWS[name]
    for row in rows:
        assert sorted(row) == ["completion", "prompt"]
        assert re.fullmatch(r"Question: \S.*\nAnswer:", row["prompt"])
        assert re.fullmatch(r" [\d(][-+*/(). \d]* = -?\d+(\.\d+)?", row["completion"])


def test_no_problem_is_in_two_files_or_twice_in_one():
    texts = {name: [make_data.normalise(row["prompt"]) for row in read(name)] for name in ROWS}
    for name, found in texts.items():
        assert len(set(found)) == len(found), name
    for first, second in combinations(texts, 2):
        assert not set(texts[first]) & set(texts[second]), (first, second)


def test_data_stays_small_and_carries_its_licence():
    data = DEMO / "data"
    assert sum(file.stat().st_size for file in data.iterdir()) < 1_500_000
    assert "Copyright (c) 2021 Arkil Patel" in (data / "LICENSE.svamp").read_text(encoding="utf-8")
    assert "MIT" in (data / "README.md").read_text(encoding="utf-8")


def test_rows_are_made_from_upstream_form():
    problem = {
        "Body": "Tom has 2 bags of 600.",
        "Question": "How many\n are there?",
        "Equation": "( 2.0 * 600.0 )",
        "Answer": 1200.0,
    }
    assert make_data.to_row(problem) == {
        "prompt": "Question: Tom has 2 bags of 600. How many are there?\nAnswer:",
        "completion": " 2 * 600 = 1200",
    }
    nested = {**problem, "Equation": "( ( 4.0 + 2.5 ) - 1.0 )", "Answer": 5.5}
    assert make_data.to_row(nested)["completion"] == " ( 4 + 2.5 ) - 1 = 5.5"


def test_variants_of_a_story_stay_together():
    problems = [
        {"Body": f"Story {chr(97 + s)} {n}", "Question": "Q", "Equation": "( 1 )", "Answer": n}
        for s in range(20)
        for n in range(40)
    ]
    files = make_data.split(problems)
    assert sum(map(len, files.values())) == 800
    homes = {}
    for name, rows in files.items():
        for row in rows:
            letter = row["prompt"].split()[2]
            assert homes.setdefault(letter, name) == name


def test_configurations_fit_together():
    config = load_pipeline_config(DEMO / "pipeline.yaml")
    stages = Stages(config, "pipeline.yaml")
    alone = load_config(DEMO / "sft.yaml")
    # The training alone is the pipeline's.
    assert alone.identity() == stages.training.identity()
    assert alone.output.resolve() == stages.training.output
    # The merges have the same inputs. Two differ in the operator alone; the third finds its step.
    first, second, third = (m.model_dump() for m in stages.merges.values())
    assert (first["method"].pop("operator"), second["method"].pop("operator")) == (
        "task_arithmetic",
        "arm",
    )
    for key in ("base", "candidates", "calibration", "method", "precision", "schedule"):
        assert first[key] == second[key], key
    for key in ("base", "candidates", "calibration", "precision"):
        assert first[key] == third[key], key
    assert (third["method"]["operator"], third["schedule"]["step"]) == (
        "task_arithmetic",
        "subspace",
    )
    assert Path(ROOT / third["select"]["path"]).name == "validation.jsonl"
    for merge in stages.merges.values():
        assert Path(merge.calibration.path).name == "calibration.jsonl"
        assert Path(ROOT / merge.calibration.path).is_file()

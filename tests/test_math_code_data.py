"""The data of the study of mathematics and code: well-formed, small, no problem in two of them."""

import json
import re
from itertools import combinations

import pytest

from examples.math_code import make_data
from tests.builders.paths import ROOT

DATA = ROOT / "examples/math_code/data"
ROWS = {
    "math-train": 400,
    "math-calibration": 60,
    "math-heldout": 200,
    "code-train": 334,
    "code-calibration": 60,
    "code-heldout": 200,
}
FORMS = {
    "math": (r"Question: .*\S\nAnswer:", r" \S.*\n#### -?[\d,]+(\.\d+)?"),
    "code": (r"Task: \S.*\nTest: assert .*\nProgram:", r"\n.*\bdef .*"),
}


def read(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_well_formed(name):
    rows = read(name)
    assert len(rows) == ROWS[name]
    for row in rows:
        assert sorted(row) == ["completion", "prompt"]
        for text, form in zip(
            (row["prompt"], row["completion"]), FORMS[name.split("-")[0]], strict=True
        ):
            assert re.fullmatch(form, text, re.DOTALL), text
        assert len(row["prompt"] + row["completion"]) <= make_data.LONGEST
        assert "<<" not in row["completion"] or name.startswith("code")


def test_no_problem_is_in_two_files_or_twice_in_one():
    texts = {name: [" ".join(row["prompt"].lower().split()) for row in read(name)] for name in ROWS}
    for name, found in texts.items():
        assert len(set(found)) == len(found), name
    for first, second in combinations(texts, 2):
        assert not set(texts[first]) & set(texts[second]), (first, second)


def test_data_stay_small_and_carry_their_licences():
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 600_000
    assert "Copyright (c) 2021 OpenAI" in (DATA / "LICENSE.gsm8k").read_text(encoding="utf-8")
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert "MIT" in readme
    assert "CC BY 4.0" in readme


def test_rows_are_made_from_upstream_form():
    problem = {"question": "Two\nbags of  3?", "answer": "It is 2*3=<<2*3=6>>6.\n#### 6"}
    assert make_data.math_row(problem) == {
        "prompt": "Question: Two bags of 3?\nAnswer:",
        "completion": " It is 2*3=6.\n#### 6",
    }
    task = {
        "task_id": 601,
        "text": "Write a  function f.",
        "code": "def f(x): \r\n\treturn x ",
        "test_list": ["assert f(1) == 1", "assert f(2) == 2"],
    }
    row = {
        "prompt": "Task: Write a function f.\nTest: assert f(1) == 1\nProgram:",
        "completion": "\ndef f(x):\n    return x",
    }
    assert make_data.code_row(task) == row
    # Each part of MBPP has its file, and what is too long has none.
    longer = {**task, "task_id": 602, "text": "Longer.", "code": "x = 1\n" * 100}
    others = [{**task, "task_id": number} for number in (10, 11, 511)]
    files = make_data.files([problem], [problem], [task, longer, *others])
    assert {name: len(rows) for name, rows in files.items()} == {
        "math-calibration": 1, "math-train": 0, "math-heldout": 1,
        "code-calibration": 1, "code-train": 1, "code-heldout": 1,
    }  # fmt: skip
    assert files["code-train"] == [row]

"""Parts that share no text, and finding texts that are in two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import CalibrationError, ConfigError
from arm_ray.training.config import DataConfig
from arm_ray.training.data import PlacedRow
from arm_ray.training.split import keep_apart, normalised, overlaps, part_of, split_file, texts_in

SHARES = {"train": 0.8, "calibration": 0.1, "validation": 0.1}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_compared_without_case_spacing_and_signs() -> None:
    assert normalised("  What is\n2 + 3?") == "what is 2 3"
    assert normalised("ＷＨＡＴ ｉｓ 2＋3") == "what is 2 3"
    assert normalised("Straße_x") == "strasse x"
    assert normalised("?!") == ""


def test_the_part_depends_on_the_text_and_the_seed_alone() -> None:
    texts = [f"question number {i}" for i in range(4000)]
    parts = [part_of(text, 0, SHARES) for text in texts]
    assert parts == [part_of(text.upper() + "?", 0, SHARES) for text in texts]
    assert parts != [part_of(text, 1, SHARES) for text in texts]
    for name, share in SHARES.items():
        assert parts.count(name) == pytest.approx(4000 * share, rel=0.2)
    # Shares count relative to their sum.
    assert parts == [part_of(text, 0, {k: 10 * v for k, v in SHARES.items()}) for text in texts]
    with pytest.raises(ConfigError, match="shares"):
        part_of("a", 0, {"train": 0.0})


def test_files_share_no_question(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 50} is?", "completion": str(i)} for i in range(100)]
    data = DataConfig(path=str(write(tmp_path / "all.jsonl", rows)))
    counts = split_file(data, tmp_path / "parts", SHARES, seed=1)
    found = {
        name: [json.loads(x) for x in (tmp_path / f"parts/{name}.jsonl").read_text().splitlines()]
        for name in SHARES
    }
    assert counts == {name: len(part) for name, part in found.items()}
    assert sum(counts.values()) == 100
    questions = [{row["prompt"] for row in part} for part in found.values()]
    assert sum(len(part) for part in questions) == len(set().union(*questions)) == 50
    write(tmp_path / "all.jsonl", rows[::-1])
    split_file(data, tmp_path / "again", SHARES, seed=1)
    for name in SHARES:
        again = (tmp_path / f"again/{name}.jsonl").read_text().splitlines()
        assert [json.loads(x) for x in again] == found[name][::-1]


def test_a_part_without_rows_is_refused_and_nothing_written(tmp_path: Path) -> None:
    data = DataConfig(path=str(write(tmp_path / "all.jsonl", [{"text": "one"}])))
    with pytest.raises(CalibrationError, match="would be empty"):
        split_file(data, tmp_path / "parts", SHARES)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ConfigError, match="name"):
        split_file(data, tmp_path / "parts", {"../x": 1.0})


def test_overlaps_are_counted_with_examples() -> None:
    found = overlaps(["One two", "three", "ONE, two!", ""], ["one two", "", "four"])
    assert (found.count, found.indices) == (2, (0, 2))
    assert found.examples == ("One two", "ONE, two!")


def test_every_text_of_a_row_counts_if_it_is_long_enough(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "how many apples are left now"}], "id": "a b c"},
        {
            "question": "what is the sum of two and three",
            "n": 3,
            "choices": ["one of the many others"],
        },
    ]
    assert list(texts_in(str(write(tmp_path / "b.jsonl", rows)))) == [
        "how many apples are left now",
        "what is the sum of two and three",
        "one of the many others",
    ]


def test_training_rows_are_kept_apart(tmp_path: Path) -> None:
    other = write(tmp_path / "heldout.jsonl", [{"q": "How many red apples are left?"}])
    rows = [PlacedRow(f"train.jsonl, line {i + 1}", {"prompt": q}) for i, q in
            enumerate(["how many red  apples are left", "something else entirely"])]  # fmt: skip
    questions = [row.row["prompt"] for row in rows]
    left, told = keep_apart(rows, questions, [str(other)], "drop")
    assert left == rows[1:]
    assert "1 training rows" in told[0]
    assert "train.jsonl, line 1" in told[0]
    assert keep_apart(rows, questions, [str(other)], "warn")[0] == rows
    with pytest.raises(CalibrationError, match=r"heldout\.jsonl"):
        keep_apart(rows, questions, [str(other)], "error")
    with pytest.raises(CalibrationError, match="all training rows"):
        keep_apart(rows[:1], questions[:1], [str(other)], "drop")

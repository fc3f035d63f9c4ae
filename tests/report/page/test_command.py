"""`arm-ray report`: what it prints and writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_ray import cli
from arm_ray.report.page import library
from tests.builders.runs import merge_run


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_known", "0;")


def test_it_prints_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [merge_run(tmp_path, name) for name in ("one", "two")]
    assert cli.main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    file = tmp_path / "both.html"
    assert cli.main(["report", *map(str, runs), "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert "2 runs compared" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["report", "status", "serve"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nothing/there", "there is no such run"),
        ("s3://bucket/run", "a run at a URL is not looked at from here"),
        ("s3://key:s3cret@bucket/run", "a run at a URL"),
    ],
)
def test_what_is_no_directory_is_refused(
    command: str, given: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, given]) == 1
    errors = capsys.readouterr().err
    assert told in errors
    assert "s3cret" not in errors


def test_a_file_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = merge_run(tmp_path) / "events.jsonl"
    assert cli.main(["report", str(file)]) == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert "there is no such run" in errors
    assert "got: a file" in errors


def test_a_plain_file_url_is_a_path(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    assert cli.main(["report", f"file://{run}"]) == 0
    assert (run / "report.html").is_file()

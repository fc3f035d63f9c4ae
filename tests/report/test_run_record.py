"""A run's directory is read as far as it goes, and what is missing is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arm_ray.errors import RunDirectoryError
from arm_ray.report.run_record import open_record
from tests.builders.runs import merge_run


def test_a_merge_is_read(tmp_path: Path) -> None:
    record = open_record(merge_run(tmp_path))
    assert record.kind == "merge"
    assert record.missing == ()
    assert record.inputs["candidate-2"] == "d2"
    assert record.config["method"] == {"operator": "arm", "coefficient": 0.7}
    assert record.scores == (tmp_path / "run" / "evaluation").resolve()
    finished = record.last("run_finished")
    assert finished is not None
    assert finished["iterations"] == 2
    assert [e["iteration"] for e in record.of("iteration_finished")] == [1, 2]


def test_a_line_that_is_being_written_is_left_out_and_told(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    whole = open_record(run).events
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1795944519.488, "event": "run_fin')
    record = open_record(run)
    assert list(record.events) == list(whole)
    assert record.missing == ("1 line of events.jsonl cannot be read and left out.",)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]\n", b'"text"\n', b'{"time": 1}\n'])
def test_lines_that_are_no_events_are_left_out(tmp_path: Path, content: bytes) -> None:
    run = merge_run(tmp_path)
    with (run / "events.jsonl").open("ab") as file:
        file.write(content)
    record = open_record(run)
    assert record.last("run_finished") is not None
    assert len(record.missing) == 1


def test_a_run_without_events_is_told_by_its_configuration(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    (run / "events.jsonl").unlink()
    record = open_record(run)
    assert record.kind == "merge"
    assert record.events == []
    assert record.missing[0].startswith("There are no events (events.jsonl)")


def test_a_run_without_its_configuration_is_told_by_its_events(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    (run / "config.yaml").write_text("base: [unfinished", encoding="utf-8")
    record = open_record(run)
    assert record.kind == "merge"
    assert record.config == {}
    assert record.missing == (
        "config.yaml is no valid YAML.",
        "The configuration (config.yaml) is not there or cannot be read.",
    )


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.yaml": "models: {a: /m/a}\noutput: out\n"}, "evaluation"),
        ({"config.yaml": "series: {}\nevaluation: {}\n"}, "study"),
        ({"config.yaml": "run: {}\nmerge: {}\npublish: {}\n"}, "attach"),
        ({"work/attach.json": "{}"}, "attach"),
        ({"train_log.jsonl": "{}"}, "training"),
        ({"events.jsonl": '{"event": "stage_finished", "stage": "scores"}\n'}, "pipeline"),
        ({"notes.txt": "hello"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_what_wrote_a_directory_is_told(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    record = open_record(tmp_path)
    assert record.kind == kind
    is_foreign = any("holds no run" in text for text in record.missing)
    assert is_foreign == (kind == "unknown")


def test_a_pipeline_has_its_merges_as_parts(tmp_path: Path) -> None:
    merge_run(tmp_path / "merges", "arm")
    event = {"time": 1.0, "event": "stage_finished", "stage": "arm", "seconds": 2.0}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    record = open_record(tmp_path)
    assert record.kind == "pipeline"
    assert list(record.parts) == ["arm"]
    assert record.parts["arm"].kind == "merge"


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="there is no such run"):
        open_record(tmp_path / "nothing")


def test_secrets_are_gone_before_anything_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merge_run(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        message = "https://me:pass@host/x?token=abc and of-the-environment"
        file.write(json.dumps({"event": "warning", "message": message}) + "\n")
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("tracking: {mlflow: {tracking_uri: 'https://me:pass@host'}}\napi_key: abcdef\n")
    record = open_record(run)
    last = record.last("warning")
    assert last is not None
    assert last["message"] == "https://…@host/x?token=… and …"
    assert record.config["api_key"] == "…"
    for text in (record.config_text, str(record.config), str(record.events)):
        assert "pass" not in text
        assert "abcdef" not in text
        assert "of-the-environment" not in text

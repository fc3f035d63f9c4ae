"""What people see and what machines read of the same happenings."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from arm_ray.events import EventLog, read_events
from arm_ray.runtime.session.reporter import Reporter


def console() -> Console:
    return Console(file=io.StringIO(), width=20)


def said(of: Reporter) -> str:
    file = of.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_line_is_printed_as_it_is() -> None:
    reporter = Reporter(console())
    reporter.say("[bold]a line that is longer than the console[/bold] /a/path 3.5")
    assert said(reporter) == "[bold]a line that is longer than the console[/bold] /a/path 3.5\n"


def test_a_warning_is_for_people_and_machines(tmp_path: Path) -> None:
    reporter = Reporter(console()).with_events(EventLog(tmp_path / "events.jsonl"))
    reporter.about("engines").warn("slow")
    reporter.note("two rows dropped")
    assert said(reporter) == "warning: engines: slow\ntwo rows dropped\n"
    events = read_events(tmp_path / "events.jsonl")
    assert [e["message"] for e in events] == ["engines: slow", "two rows dropped"]


def test_a_warning_that_cannot_be_written_is_still_seen(tmp_path: Path) -> None:
    reporter = Reporter(console()).with_events(EventLog(tmp_path / "gone" / "events.jsonl"))
    reporter.warn("the disk is full")
    assert said(reporter) == "warning: the disk is full\n"


def test_without_a_log_there_are_only_lines() -> None:
    reporter = Reporter(console())
    reporter.warn("no log yet")
    assert said(reporter) == "warning: no log yet\n"

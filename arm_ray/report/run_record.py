"""What a run left in its directory, read as far as it goes.

Whatever is missing, unfinished, torn or of another version is told (`RunRecord.missing`) and never
an error: a page or a status is made of what there is. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from arm_ray.errors import RunDirectoryError
from arm_ray.secrets import all_hidden, environment_hidden, hidden, patterns_hidden
from arm_ray.storage.regular import json_in, log_lines, log_objects, parse_json, read_text
from arm_ray.storage.yaml_text import LARGEST_YAML, load_yaml

Kind = Literal["merge", "evaluation", "pipeline", "study", "attach", "training", "unknown"]
Event = Mapping[str, Any]
EVENTS_NAME, CONFIG_NAME, JOURNAL_NAME = "events.jsonl", "config.yaml", "attach.json"
# Keys of a configuration that tell what it is of.
_KEYS: Mapping[Kind, frozenset[str]] = {
    "attach": frozenset({"run", "merge", "publish"}),
    "study": frozenset({"series", "evaluation"}),
    "merge": frozenset({"candidates", "output"}),
    "evaluation": frozenset({"models", "output"}),
    "training": frozenset({"model", "output"}),
}
# Where a job writes the records of its scores.
_SCORES: Mapping[Kind, str] = {
    "merge": "evaluation",
    "evaluation": ".",
    "pipeline": "evaluation",
    "study": "scores",
    "attach": "scores",
}
# The events that only one kind of job writes.
_TOLD_BY: Mapping[str, Kind] = {
    "stage_finished": "pipeline",
    "study_started": "study",
    "checkpoint_taken": "attach",
    "arrival_published": "attach",
    "training_started": "training",
    "run_started": "merge",
}


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it.

    Attributes:
        path: The directory.
        kind: What wrote it; `unknown`: no run of arm_ray.
        events: Its events, in order; those that cannot be read are left out.
        config: Its configuration; empty where there is none.
        config_text: The same, as it is written.
        inputs: What was merged -> digest.
        parts: Runs that are part of this one, by name.
        missing: What is not there or cannot be read, in sentences.
    """

    path: Path
    kind: Kind
    events: Sequence[Event] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, RunRecord] = field(default_factory=dict)
    missing: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Of the run: the name of its directory, and of attach that of the run it follows."""
        followed = self.section("run").get("path")
        if self.kind == "attach" and isinstance(followed, str) and followed.strip("/"):
            return followed.rstrip("/").rpartition("/")[2]
        return self.path.name

    @property
    def scores(self) -> Path | None:
        """The directory of the scores' records; None: it has none."""
        place = _SCORES.get(self.kind)
        if place is None or not (self.path / place).is_dir():
            return None
        return (self.path / place).resolve()

    def of(self, *names: str) -> Iterator[Event]:
        """The events of these names, in order."""
        return (event for event in self.events if event.get("event") in names)

    def last(self, *names: str) -> Event | None:
        """The last event of these names; None: there is none."""
        return next((e for e in reversed(self.events) if e.get("event") in names), None)

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty where it is not there."""
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}


def open_record(path: Path) -> RunRecord:
    """Read a run's directory, or of attach the one that it publishes in.

    Raises:
        RunDirectoryError: There is no such directory.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise RunDirectoryError(
            "there is no such run",
            where=path,
            got="a file" if path.exists() else "nothing",
            expected="the output directory of a merge, evaluation, pipeline, study or attach",
        )
    if not (path / EVENTS_NAME).exists() and (path / "work" / JOURNAL_NAME).is_file():
        path = path / "work"
    missing: list[str] = []
    events = _events(path, missing)
    text, config = _config(path, missing)
    kind = _kind(path, events, config)
    if kind == "unknown":
        missing.append("This directory holds no run of arm_ray, or nothing of it is left.")
    elif not events:
        missing.append(
            f"There are no events ({EVENTS_NAME}): times, iterations and scores by iteration "
            "are not known."
        )
    if not config and kind not in ("unknown", "pipeline"):
        missing.append(f"The configuration ({CONFIG_NAME}) is not there or cannot be read.")
    inputs = _inputs(path) if kind == "merge" else {}
    record = RunRecord(path, kind, events, config, text, inputs, {}, tuple(missing))
    return _with_parts(record)


def _events(path: Path, missing: list[str]) -> list[Event]:
    file = path / EVENTS_NAME
    try:
        text = b"\n".join(log_lines(file)).decode("utf-8", errors="replace")
    except OSError:
        return []
    events: list[Event] = []
    torn = 0
    # The secrets go before anything is made of it.
    lines = environment_hidden(text).split("\n")
    for line, raw in zip(lines, text.split("\n"), strict=False):
        if not line.strip():
            continue
        try:
            event = _event(line, raw)
        except ValueError:
            torn += 1
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
        else:
            torn += 1
    if torn:
        # A last line without its end is one that is being written, or that a crash has cut off.
        what = "1 line" if torn == 1 else f"{torn} lines"
        missing.append(f"{what} of {EVENTS_NAME} cannot be read and left out.")
    return events


def _event(line: str, raw: str) -> Any:
    """One event without secrets; hiding them in its text is faster, and may have broken it."""
    try:
        return parse_json(patterns_hidden(line))
    except ValueError:
        return all_hidden(parse_json(raw))


def _config(path: Path, missing: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = read_text(path / CONFIG_NAME, LARGEST_YAML)
    except (OSError, ValueError):
        return "", {}
    try:
        content = load_yaml(text)
    except ValueError:
        missing.append(f"{CONFIG_NAME} is no valid YAML.")
        return hidden(text), {}
    content = all_hidden(content) if isinstance(content, dict) else {}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True), content


def _kind(path: Path, events: Sequence[Event], config: Mapping[str, Any]) -> Kind:
    if (path / JOURNAL_NAME).is_file():
        return "attach"
    for kind, keys in _KEYS.items():
        if keys <= config.keys():
            return kind
    for event in events:
        if event["event"] in _TOLD_BY:
            return _TOLD_BY[event["event"]]
    if (path / "results.jsonl").is_file():
        return "study"
    if (path / "merges").is_dir() and (path / "train").is_dir():
        return "pipeline"
    if (path / "train_log.jsonl").is_file():
        return "training"
    if (path / "scores.json").is_file() or any(e["event"] == "model_scored" for e in events):
        return "evaluation"
    return "unknown"


def _inputs(path: Path) -> Mapping[str, str]:
    try:
        content = json_in(path / "inputs.json")
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def _with_parts(record: RunRecord) -> RunRecord:
    """With the runs that are part of it, where they are there."""
    found: dict[str, Path] = {}
    if record.kind == "pipeline":
        found = _runs_below(record.path / "merges")
        for name in ("train", "evaluation"):
            if (record.path / name / CONFIG_NAME).is_file():
                found[name] = record.path / name
    elif record.kind == "attach":
        # Of hundreds of arrivals, the newest tells how merges go.
        found = dict(list(_runs_below(record.path / "merges").items())[-1:])
    parts = {name: open_record(path) for name, path in found.items()}
    return RunRecord(**{**record.__dict__, "parts": parts})


def _runs_below(path: Path) -> dict[str, Path]:
    try:
        names = sorted(p.name for p in path.iterdir() if (p / CONFIG_NAME).is_file())
    except OSError:
        return {}
    return {name: path / name for name in names}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty where it is not there, without what is torn."""
    try:
        return list(log_objects(path))
    except OSError:
        return []

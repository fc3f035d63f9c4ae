"""What stands on the page: the right sentences and numbers, escaped, and what is missing."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from arm_ray.errors import RunDirectoryError
from arm_ray.report.page import library
from arm_ray.report.page.answers import changed_answers
from arm_ray.report.page.comparison import differences_of
from arm_ray.report.page.view import view_of
from arm_ray.report.page.write import REPORT_NAME, page_of, write_report
from arm_ray.report.run_facts import scores_of
from arm_ray.report.run_record import open_record
from tests.builders.runs import EVIL, RIGHT, keep_events, merge_run, scored


class Page(HTMLParser):
    """What a browser makes of a page: elements, ids, and the specifications of its plots."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.specs: dict[str, Any] = {}
        self.words = ""
        self._within: tuple[str, dict[str, str | None]] | None = None
        self._buffer = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._within, self._buffer = self.tags[-1], ""

    def handle_endtag(self, tag: str) -> None:
        if self._within is not None and tag == self._within[0]:
            name = self._within[1].get("data-for")
            if name is not None:
                self.specs[name] = json.loads(self._buffer)
            self._within = None

    def handle_data(self, data: str) -> None:
        if self._within is None:
            self.words += data
        else:
            self._buffer += data

    @property
    def ids(self) -> list[str]:
        """All ids, in order."""
        return [str(attrs["id"]) for _, attrs in self.tags if "id" in attrs]


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser's tests have the real one."""
    monkeypatch.setattr(library, "_known", "window.vegaEmbed = undefined;")


def page(*runs: Path) -> Page:
    return Page(page_of(runs))


def test_the_verdict_says_which_how_much_how_sure_and_what_next(tmp_path: Path) -> None:
    view = view_of(open_record(merge_run(tmp_path)))
    assert view.chosen == "state-0002"
    assert view.finding.headline.startswith(
        "state-0002 and checkpoint-10, the best that was not merged, are equal within the error "
        "(quiz score 75.0 % against 37.5 %, difference +37.5 %, 90 % interval "
    )
    assert view.finding.tone == "even"
    assert "score more problems" in view.finding.next
    against = [text.partition(" ")[0] for text in view.finding.against]
    assert against == ["base", "checkpoint-10", "checkpoint-20"]
    assert view.finding.against[0].startswith("base +62.5 points (")


def test_differences_are_paired_problem_by_problem(tmp_path: Path) -> None:
    record = open_record(merge_run(tmp_path))
    found = differences_of(record, scores_of(record), "state-0002")
    ours = sum(RIGHT["state-0002"]) / 8
    assert {d.other.model: d.comparison.difference for d in found} == {
        model: pytest.approx(ours - sum(right) / 8)
        for model, right in RIGHT.items()
        if model != "state-0002"
    }
    base = next(d for d in found if d.other.model == "base")
    assert base.comparison.num_problems == 8
    assert base.gain == pytest.approx(5 / 8)
    assert base.is_sure
    # Exact: five of the signs that differ are all on one side.
    assert base.comparison.p_value == pytest.approx(2 / 2**5, abs=0.03)


def test_answers_that_changed_from_the_best_checkpoint(tmp_path: Path) -> None:
    record = open_record(merge_run(tmp_path))
    [changed] = changed_answers(record, scores_of(record), "state-0002")
    assert changed.models == ["base", "checkpoint-10", "state-0002"]
    assert changed.counts == {"gained": 4, "lost": 1}
    assert changed.equal == 3
    assert {row.problem: row.change for row in changed.rows} == {
        "1": "lost",
        "3": "gained",
        "4": "gained",
        "5": "gained",
        "6": "gained",
    }
    lost = next(row for row in changed.rows if row.change == "lost")
    assert lost.question == "What is 1 + 1?\n→ 2"
    assert [(a.text, a.verdict, a.is_right) for a in lost.answers] == [
        ("base says 1", "wrong", False),
        ("candidate-1 says 1", "right", True),
        ("state-0002 says 1", "wrong", False),
    ]


def test_the_sections_stand_in_order_and_have_their_plots(tmp_path: Path) -> None:
    made = page(merge_run(tmp_path))
    sections = [attrs["id"] for tag, attrs in made.tags if tag == "section"]
    assert sections == [
        f"run-{name}"
        for name in (
            "scores",
            "progress",
            "angles",
            "modules",
            "answers",
            "timeline",
            "costs",
            "lineage",
            "command",
            "notes",
        )
    ]
    assert list(made.specs) == [
        f"run-{name}-plot"
        for name in (
            "scores-0",
            "differences-0",
            "progress-0",
            "angles",
            "rotation",
            "update",
            "spectra",
            "timeline",
        )
    ]
    assert len(made.ids) == len(set(made.ids))
    # Behind each plot there is a table.
    plots = sum(attrs.get("class") == "chart" for _, attrs in made.tags)
    behind = sum(tag == "details" and attrs.get("class") == "table" for tag, attrs in made.tags)
    assert behind >= plots == len(made.specs)


def test_plots_hold_the_numbers_of_the_events(tmp_path: Path) -> None:
    specs = page(merge_run(tmp_path)).specs
    rotation = specs["run-rotation-plot"]["data"]["values"]
    assert {(r["t"], r["layer"], r["module"]): r["value"] for r in rotation} == {
        (t, layer, module): 10.0 * t + layer
        for t in (1, 2)
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    spectra = specs["run-spectra-plot"]["data"]["values"]
    one = [r["value"] for r in spectra if r["layer"] == 1 and r["module"] == "mlp.down_proj"]
    assert one == [1.0, 0.5, 0.25, 0.125]
    progress = specs["run-progress-0-plot"]["layer"]
    states = progress[-1]["data"]["values"]
    assert [(r["iteration"], r["value"], r["chosen"]) for r in states] == [
        (1, 50.0, False),
        (2, 75.0, True),
    ]
    timeline = specs["run-timeline-plot"]["data"]["values"]
    assert [row["kind"] for row in timeline if row["actor"] == "shard 2"] == ["forward"] * 2


def test_costs_stand_beside_the_plan(tmp_path: Path) -> None:
    view = view_of(open_record(merge_run(tmp_path)))
    [costs] = [s for s in view.sections if s.id == "run-costs"]
    table = costs.figures[0].table
    assert table is not None
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["iterations, time"] == ["8.0 s", "5.0 s", "1.60"]
    assert rows["largest memory of a shard"] == ["3 GB", "2 GB", "1.50"]
    assert rows["states and model written"] == ["3 kB", "3 kB", "1.00"]
    assert rows["hidden states sent between shards"] == ["400 bytes", "400 bytes", "1.00"]


def test_what_comes_from_a_run_is_escaped(tmp_path: Path) -> None:
    run = merge_run(tmp_path, "run<b>&")
    text = page_of([run])
    made = Page(text)
    assert EVIL not in text
    assert html.escape(EVIL, quote=False).split("=")[0] in text
    assert not any(tag == "img" for tag, _ in made.tags)
    # Ours: one for each plot, the library, the page's own.
    assert sum(tag == "script" for tag, _ in made.tags) == len(made.specs) + 2
    assert EVIL in made.words
    assert "run<b>&" in made.words


def test_names_and_paths_of_a_run_are_escaped(tmp_path: Path) -> None:
    """Of models, tasks, configuration keys and values, paths and warnings: each its own text."""
    run = merge_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    texts = {place: f"{place}{EVIL}" for place in ("base", "candidate", "value", "path", "task")}
    config |= {"base": texts["base"], "candidates": [texts["candidate"]] * 2}
    config["calibration"]["path"] = texts["path"]
    config[f"key{EVIL}"] = texts["value"]
    config["evaluation"]["tasks"][0]["name"] = texts["task"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    model = f"model{EVIL}"

    def changed(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "model_scored":
            scores = {texts["task"]: {"score": 0.5}}
            return {**event, "model": model, "path": texts["path"], "scores": scores}
        return {**event, "path": texts["path"]} if "path" in event else event

    keep_events(run, changed)
    scored(run / "evaluation", "<i>", RIGHT["base"], task="<u>quiz")
    for text in (page_of([run]), page_of([run, run])):
        made = Page(text)
        assert EVIL not in text
        assert not any(tag in ("img", "i", "u") for tag, _ in made.tags)
        assert sum(tag == "script" for tag, _ in made.tags) == len(made.specs) + 2
    alone = Page(page_of([run]))
    for told in ("base", "candidate", "path"):
        assert texts[told] in alone.words, told
    # In YAML's quotes.
    assert "value<script>" in alone.words
    assert "key<script>" in alone.words


def test_json_within_the_page_cannot_end_its_element(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    evil = "</script><script>alert(1)</script>"
    keep_events(run, lambda e: {**e, "model": evil} if e["event"] == "model_scored" else e)
    text = page_of([run])
    assert evil not in text
    assert "\\u003c/script\\u003e" in text
    specs = Page(text).specs
    assert any(
        row["what"] == f"scored {evil}" for row in specs["run-timeline-plot"]["data"]["values"]
    )


def test_only_the_pages_own_scripts_may_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    text = page_of([merge_run(tmp_path)])
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    policy = html.unescape(policy)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
    assert allowed == digests
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    script_part = next(p for p in policy.split(";") if p.strip().startswith("script-src"))
    assert "unsafe-inline" not in script_part
    assert "http:" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 6])
def test_half_a_run_is_shown_as_far_as_it_goes(tmp_path: Path, kept: int) -> None:
    run = merge_run(tmp_path)
    shutil.rmtree(run / "evaluation")
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)[:kept]
    (run / "events.jsonl").write_bytes(b"".join(lines) + b'{"event": "itera')
    made = page(run)
    assert "1 line of events.jsonl cannot be read" in made.words
    assert "The run has not come to a model yet." in made.words
    assert ("run-angles" in made.ids) == (kept >= 4)
    assert "run-command" in made.ids


def test_a_run_of_an_older_version_says_what_it_lacks(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    new = ("modules", "spans", "busy_seconds")

    def older(event: dict[str, Any]) -> dict[str, Any] | None:
        if event["event"] == "run_planned":
            return None
        return {key: value for key, value in event.items() if key not in new}

    keep_events(run, older)
    made = page(run)
    assert "do not say what became of each module: an older version" in made.words
    assert "No plan was written down: an older version." in made.words
    assert "run-timeline-plot" in made.specs


@pytest.mark.parametrize("content", ["null", "3", '"x"', "[]", '{"a": 1}', "[null]", "[[1]]"])
def test_events_of_any_form_make_a_page(tmp_path: Path, content: str) -> None:
    run = merge_run(tmp_path)
    broken = json.loads(content)

    def spoil(event: dict[str, Any]) -> dict[str, Any]:
        return {k: v if k in ("event", "time") else broken for k, v in event.items()}

    keep_events(run, spoil)
    made = page(run)
    assert "run-scores" in made.ids


def test_a_foreign_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    assert "This is no run of arm_ray." in page(tmp_path).words


def test_a_merge_that_nobody_scored_says_how(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    shutil.rmtree(run / "evaluation")
    keep_events(run, lambda e: None if e["event"] == "model_scored" else e)
    finding = view_of(open_record(run)).finding
    assert finding.tone == "unknown"
    assert finding.headline.startswith("State-0002 is the model; nothing says yet")
    assert finding.next.startswith("arm-ray evaluate CHECKPOINT")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first, second = merge_run(tmp_path / "a", "one"), merge_run(tmp_path / "b", "two")
    text = (second / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("coefficient: 0.7", "coefficient: 0.3")
    (second / "config.yaml").write_text(text, encoding="utf-8")
    made = page(first, second)
    assert len(made.ids) == len(set(made.ids))
    assert {"run-1-scores", "run-2-scores", "compared", "settings"} <= set(made.ids)
    values = made.specs["compared-0-plot"]["data"]["values"]
    assert [(v["model"], v["value"]) for v in values] == [
        ("base", 12.5),
        ("checkpoint-10", 37.5),
        ("one: state-0002", 75.0),
        ("two: state-0002", 75.0),
    ]
    settings = made.words[made.words.rindex("Settings that differ") :][:100]
    assert "method.coefficient" in settings
    assert "method.operator" not in settings


def test_without_the_plotting_library_the_tables_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arm_ray.report.page.render.plotting_library", lambda: None)
    made = page(merge_run(tmp_path))
    assert "The plots need the package vl-convert-python" in made.words
    assert sum(tag == "table" for tag, _ in made.tags) > 8


def test_the_library_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(library, "_bundle", lambda: made.append("x") or "the library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        monkeypatch.setattr(library, "_known", None)
        assert library.plotting_library() == "the library"
    assert made == ["x"]
    [file] = (tmp_path / "cache" / "arm_ray").iterdir()
    assert file.read_text(encoding="utf-8") == "the library"


def test_a_report_is_written_whole_beside_the_run_or_where_asked(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    assert write_report([run]) == run / REPORT_NAME
    assert (run / REPORT_NAME).read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert write_report([run], tmp_path / "new" / "a.html") == tmp_path / "new" / "a.html"
    # It is no part of what it is made of.
    assert write_report([run]) == run / REPORT_NAME
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="the report cannot be written"):
        write_report([run], tmp_path / "file" / "a.html")


def attach_run(root: Path) -> Path:
    """Attach after two arrivals, of which the first was the better one."""
    work = root / "published" / "work"
    work.mkdir(parents=True)
    config = f"run: {{path: /runs/grpo}}\nmerge: {{}}\npublish: {{dir: {root}}}\n"
    (work / "config.yaml").write_text(config, encoding="utf-8")
    arrivals, events = [], []
    for number, (step, value, other) in enumerate([(20, 0.75, 0.5), (30, 0.5, 0.625)], start=1):
        name = f"{number:04d}-step-{step:06d}"
        arrivals.append(
            {"number": number, "step": step, "version": f"v{number}", "states": [1] * (number - 1),
             "members": ["step-000010", f"step-{step:06d}"], "outcome": "published"}
        )  # fmt: skip
        events.append(
            {"time": 100.0 * number, "event": "arrival_published", "step": step, "value": value,
             "checkpoint_value": other, "is_best": number == 1, "members": ["step-000010"],
             "path": f"/published/step-{step}", "seconds": 3.0, "weight_cosine": 0.999}
        )  # fmt: skip
        for kind, mean in (("merged", value), ("checkpoint", other)):
            scored(work / "scores", f"{kind}-{name}", [1] * int(8 * mean) + [0] * int(8 - 8 * mean))
    (work / "attach.json").write_text(json.dumps({"arrivals": arrivals}), encoding="utf-8")
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (work / "events.jsonl").write_text(lines, encoding="utf-8")
    return root / "published"


def test_attach_is_told_by_its_arrivals(tmp_path: Path) -> None:
    run = attach_run(tmp_path)
    view = view_of(open_record(run))
    assert view.record.name == "grpo"
    # What `best` points to, and by the steps of the training.
    assert view.chosen == "merged-0001-step-000020"
    assert [(s.title, s.role, s.mean) for s in view.scores] == [
        ("checkpoint step 20", "checkpoint", 0.5),
        ("checkpoint step 30", "checkpoint", 0.625),
        ("merged step 20", "merged", 0.75),
        ("merged step 30", "merged", 0.5),
    ]
    made = page(run)
    values = made.specs["run-arrivals-plot"]["data"]["values"]
    assert [(v["step"], v["value"], v["of"], v["best"]) for v in values] == [
        (20, 0.75, "merged", True),
        (30, 0.5, "merged", False),
        (20, 0.5, "checkpoint", False),
        (30, 0.625, "checkpoint", False),
    ]
    [lineage] = [s for s in view.sections if s.id == "run-lineage"]
    table = lineage.figures[0].table
    assert table is not None
    assert [list(row) for row in table.rows] == [
        ["1", "20", "step-000010, step-000020", "base", "v1", "published"],
        ["2", "30", "step-000010, step-000030", "arrival 1", "v2", "published"],
    ]


def study_run(root: Path, differences: list[tuple[float, float, float]]) -> Path:
    """A study of one run, with merges of such differences from the best checkpoint."""
    (root / "config.yaml").write_text("series: {}\nevaluation: {}\n", encoding="utf-8")
    (root / "events.jsonl").write_text(
        '{"time": 1.0, "event": "study_started", "cells": 2}\n', encoding="utf-8"
    )
    score = {"task": "held", "metric": "loss", "low": 0.3, "high": 0.9, "n": 200}
    rows: list[dict[str, Any]] = [
        {"series": "sft", "seed": None, "operator": None, "kind": "base", "model": "base",
         "mean": 0.9, **score},
        {"series": "sft", "seed": 0, "operator": None, "kind": "checkpoint", "model": "sft-0-10",
         "checkpoint": 10, "mean": 0.6, **score},
    ]  # fmt: skip
    for number, (difference, low, high) in enumerate(differences):
        rows.append(
            {"series": "sft", "seed": 0, "operator": f"op{number}", "kind": "merged",
             "model": f"m{number}", "mean": 0.6 + difference, **score,
             "best_checkpoint": "sft-0-10", "best_checkpoint_difference": difference,
             "best_checkpoint_low": low, "best_checkpoint_high": high, "best_checkpoint_p": 0.01}
        )  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "results.jsonl").write_text(text, encoding="utf-8")
    return root


def test_a_study_is_told_by_its_merges_against_their_own_checkpoints(tmp_path: Path) -> None:
    run = study_run(tmp_path, [(-0.1, -0.15, -0.05), (0.02, -0.01, 0.05), (0.3, 0.2, 0.4)])
    view = view_of(open_record(run))
    assert view.finding.headline == (
        "1 of 3 merges are better than the best checkpoint of their run, 1 are worse and 1 equal "
        "within the error (held loss). The largest gain is +0.1 (+0.05 to +0.15): "
        "sft, op0, seed 0."
    )
    assert view.finding.tone == "good"
    assert [s.title for s in view.scores] == [
        "base", "sft, checkpoint 10, seed 0", "sft, op0, seed 0", "sft, op1, seed 0",
        "sft, op2, seed 0",
    ]  # fmt: skip
    values = page(run).specs["run-differences-0-plot"]["data"]["values"]
    assert [(v["model"], v["difference"], v["verdict"]) for v in values] == [
        ("sft, op0, seed 0", -0.1, "better"),
        ("sft, op1, seed 0", 0.02, "no difference"),
        ("sft, op2, seed 0", 0.3, "worse"),
    ]


def test_steps_that_were_searched_are_shown(tmp_path: Path) -> None:
    run = merge_run(tmp_path)
    tried = {"state": None, "coefficients": [[0.2, 0.3]], "loss": 0.5, "low": 0.4, "high": 0.6}
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        for number in (1, 2):
            event = {
                "event": "step_chosen", "iteration": number, "search": "subspace",
                "coefficients": [[0.2, 0.3]], "tried": [tried] * 4,
                "checked": [{**tried, "loss": 0.5 - 0.1 * number}],
                "gain": 0.25, "gain_low": 0.125, "gain_high": 0.5,
            }  # fmt: skip
            file.write(json.dumps(event) + "\n")
    view = view_of(open_record(run))
    [progress] = [s for s in view.sections if s.id == "run-progress"]
    [steps] = [f for f in progress.figures if f.caption.startswith("Steps")]
    assert steps.table is not None
    assert list(steps.table.rows[1]) == [
        "2", "subspace", "0.2, 0.3", "0.3000", "+0.2500", "+0.1250 to +0.5000", "4",
    ]  # fmt: skip
    assert steps.chart is not None
    shown = steps.chart.spec["layer"][-1]["data"]["values"]
    assert [(v["iteration"], v["value"]) for v in shown] == [(1, 0.4), (2, 0.3)]


def test_all_that_scrolls_or_opens_can_be_reached_by_keyboard(tmp_path: Path) -> None:
    made = page(merge_run(tmp_path))
    stops = [attrs.get("tabindex") for _, attrs in made.tags if "tabindex" in attrs]
    # In the order of the page.
    assert set(stops) == {"0"}
    scrolling = [a for _, a in made.tags if a.get("class") in ("scroll", "code")]
    assert all(a.get("tabindex") == "0" for a in scrolling)
    # What opens and filters are the browser's own elements; nothing else listens to a mouse.
    assert not any(name.startswith("on") for _, attrs in made.tags for name in attrs)
    inputs = [attrs for tag, attrs in made.tags if tag == "input"]
    assert [attrs["type"] for attrs in inputs] == ["radio"] * 3
    assert sum(tag == "label" for tag, _ in made.tags) == len(inputs)
    assert sum(tag == "html" and attrs.get("lang") == "en" for tag, attrs in made.tags) == 1

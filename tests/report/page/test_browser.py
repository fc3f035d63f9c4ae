"""The page in a browser: its plots are drawn, nothing goes wrong, and no run's text is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arm_ray.report.page.library import plotting_library
from arm_ray.report.page.palette import DARK, LIGHT
from arm_ray.report.page.write import page_of, write_report
from tests.builders.browser import NAMES, Opened, find_browser, open_page
from tests.builders.runs import merge_run

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)}"),
]
PLOTS = (
    "scores-0",
    "differences-0",
    "progress-0",
    "angles",
    "rotation",
    "update",
    "spectra",
    "timeline",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's page, as users have it."""
    root = tmp_path_factory.mktemp("run")
    assert plotting_library() is not None
    return write_report([merge_run(root)])


@pytest.fixture(scope="module", params=[(1200, False), (400, True)], ids=["wide", "narrow, dark"])
def opened(
    request: pytest.FixtureRequest, page: Path, tmp_path_factory: pytest.TempPathFactory
) -> Opened:
    width, is_dark = request.param
    profile = tmp_path_factory.mktemp("profile")
    return open_page(f"file://{page}", profile, width=width, is_dark=is_dark)


def drawing(opened: Opened, name: str) -> str:
    """What was drawn in a plot's place."""
    found = re.search(rf'id="run-{name}-plot".*?(<svg.*?</svg>)', opened.dom, re.S)
    assert found is not None, name
    return found[1]


def test_nothing_is_said_on_the_console(opened: Opened) -> None:
    assert opened.console == []


def test_all_plots_are_drawn(opened: Opened) -> None:
    assert opened.data("drawn") == str(len(PLOTS))
    assert opened.data("failed") == "0"
    marks = {name: len(re.findall(r"<path|<text|<line", drawing(opened, name))) for name in PLOTS}
    assert min(marks.values()) > 10, marks


def test_plots_show_what_they_are_given(opened: Opened) -> None:
    assert "checkpoint-10" in drawing(opened, "scores-0")
    # Two layers of two modules, of the iteration that is chosen at first.
    cells = re.findall(r'aria-roledescription="rect mark"', drawing(opened, "rotation"))
    assert len(cells) == 4
    assert "self_attn.q_proj" in drawing(opened, "rotation")


def test_colours_are_those_of_the_theme(opened: Opened) -> None:
    drawn = drawing(opened, "scores-0")
    found = {theme["merged"] in drawn for theme in (LIGHT, DARK)}
    assert found == {True, False}
    assert "$merged" not in drawn


def test_no_text_of_a_run_is_run(opened: Opened) -> None:
    assert "<title>run – arm_ray</title>" in opened.dom
    assert "taken" not in re.findall(r"<title>(.*?)</title>", opened.dom)
    # It is shown: as a question, and in a warning.
    assert "&lt;script&gt;document.title" in opened.dom
    # The library's own text has the word.
    assert "<img" not in re.sub(r"<script.*?</script>", "", opened.dom, flags=re.S)


def test_a_script_that_came_through_would_not_run(tmp_path: Path) -> None:
    """The page's policy holds where escaping would not."""
    page = tmp_path / "page.html"
    text = page_of([merge_run(tmp_path)])
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
    page.write_text(text.replace("<main>", f"<main>{evil}"), encoding="utf-8")
    opened = open_page(f"file://{page}", tmp_path / "profile")
    assert "<title>run – arm_ray</title>" in opened.dom
    assert any("Content Security Policy" in line for line in opened.console)


def test_parts_that_are_closed_are_drawn_once_opened(tmp_path: Path) -> None:
    runs = [merge_run(tmp_path / "a", "one"), merge_run(tmp_path / "b", "two")]
    page = tmp_path / "page.html"
    page.write_text(page_of(runs), encoding="utf-8")
    closed = open_page(f"file://{page}", tmp_path / "profile")
    whole = open_page(f"file://{page}#run-2", tmp_path / "profile")
    # One of the comparison, and those of the runs that are open.
    assert closed.data("drawn") == str(1 + len(PLOTS))
    assert whole.data("drawn") == str(1 + 2 * len(PLOTS))
    assert whole.console == []

"""The picture of the README: what it shows, and what it must not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from scripts.picture import MOST_BYTES, draw, find_browser, top_of
from tests.builders.paths import ROOT
from tests.builders.runs import merge_run


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG file."""
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:])


def test_where_the_run_lay_is_not_shown() -> None:
    page = "<head></head><p>/home/me/x/runs/demo/merges/a (/tmp/y/runs/demo)</p>"
    assert top_of(page, "demo").endswith("<p>runs/demo/merges/a (runs/demo)</p>")
    assert "section:not" in top_of(page, "demo")


def test_the_picture_is_one() -> None:
    picture = ROOT / "docs/images/report.png"
    assert size_of(picture) == (1000, 806)
    assert picture.stat().st_size <= MOST_BYTES


def test_without_a_run_there_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no Chromium|there is no run .*: make demo makes one"):
        draw(tmp_path / "none", tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.skipif(find_browser() is None, reason="no browser")
def test_a_run_is_drawn(tmp_path: Path) -> None:
    draw(merge_run(tmp_path / "runs"), tmp_path / "out.png", 600, 400)
    assert size_of(tmp_path / "out.png") == (600, 400)

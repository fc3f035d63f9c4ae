"""The documentation site: links that leave `docs/`, foreign files, warnings that fail a build."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import site_hooks
from tests.builders.paths import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def rewritten(markdown: str, at: str, repository: str | None = None) -> str:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri=at))
    config: Any = SimpleNamespace(repo_url=repository)
    return site_hooks.on_page_markdown(markdown, page, config)


@pytest.mark.parametrize(
    ("at", "link", "expected"),
    [
        ("attach.md", "[keys](configuration.md#run)", "[keys](configuration.md#run)"),
        ("tutorials/trl.md", "[keys](../configuration.md)", "[keys](../configuration.md)"),
        ("attach.md", "[a page](https://example.org/x)", "[a page](https://example.org/x)"),
        ("attach.md", "[below](#here)", "[below](#here)"),
        # A file of the repository that is a page of the site, from both sides.
        ("metrics.md", "[it](../cluster/README.md#metrics)", "[it](cluster-files.md#metrics)"),
        ("tutorials/cluster.md", "[it](../../cluster/README.md)", "[it](../cluster-files.md)"),
        ("cluster-files.md", "[m](../docs/metrics.md)", "[m](metrics.md)"),
        # Files that are none.
        ("attach.md", "[examples](../examples/attach)", "examples (`examples/attach`)"),
        ("attach.md", "[`examples/attach`](../examples/attach)", "`examples/attach`"),
        ("attach.md", "```\n[x](../examples)\n```", "```\n[x](../examples)\n```"),
    ],
)
def test_links(at: str, link: str, expected: str) -> None:
    assert rewritten(link, at) == expected


def test_links_to_the_repository() -> None:
    link = rewritten("[it](../examples/attach)", "attach.md", "https://example.org/arm_ray/")
    assert link == "[it](https://example.org/arm_ray/blob/main/examples/attach)"


def test_a_link_to_nowhere_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rewritten("[it](../examples/none.py)", "attach.md")
    assert "there is no examples/none.py" in caplog.text


@pytest.mark.parametrize(
    ("tag", "loads"),
    [
        ('<script src="https://example.org/x.js"></script>', True),
        ('<img alt="" src="//example.org/x.png">', True),
        ('<link rel="stylesheet" href="https://example.org/x.css">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<a href="https://example.org/">there</a> <img src="images/x.png">', False),
    ],
)
def test_what_a_page_would_load_is_told(
    tag: str, loads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with caplog.at_level(logging.WARNING):
        site_hooks.on_post_page(tag, page)
    assert ("index.md loads" in caplog.text) == loads


def test_no_fonts_of_others() -> None:
    assert re.search(r"^  font: false$", CONFIG, re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "wrong"),
    [("# A\n\n[x](#a)\n", ""), ("# A\n\n[x](#b)\n", "anchor"), ("[x](b.md)\n", "b.md")],
)
def test_what_is_wrong_fails_the_build(page: str, wrong: str, tmp_path: Path) -> None:
    """With the command of the Makefile and our settings of what is a warning."""
    [command] = re.findall(r"\$\(BIN\)/python (-m mkdocs .*)", (ROOT / "Makefile").read_text())
    [validation] = re.findall(r"^validation:\n(?:  .*\n)+", CONFIG, re.MULTILINE)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(page, encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == bool(wrong), done.stderr
    assert wrong in done.stderr

"""Chromium without a window: opens a page, and tells what became of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scripts.picture import BROWSERS as NAMES
from scripts.picture import find_browser

__all__ = ["NAMES", "Opened", "find_browser", "open_page"]


@dataclass(frozen=True)
class Opened:
    """A page as a browser has it.

    Attributes:
        dom: Its document, after its scripts have run.
        console: What was said on the console, a line each.
    """

    dom: str
    console: list[str]

    def data(self, name: str) -> str:
        """A `data-` attribute of the document; empty where it is not there."""
        found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', self.dom)
        return found[1] if found else ""


def open_page(url: str, profile: Path, *, width: int = 1200, is_dark: bool = False) -> Opened:
    """Open a page and let its clock run for a while, as fast as it goes.

    Args:
        url: `file://` or `http://`.
        profile: A directory for what the browser keeps.
        width: Of the window.
        is_dark: Whether the reader prefers dark colours.
    """
    program = find_browser()
    assert program is not None
    theme = ["--blink-settings=preferredColorScheme=0"] if is_dark else []
    done = subprocess.run(
        [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            *theme,
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Opened(done.stdout, console)

"""The picture of the README: the top of a run's report, as an image.

    python -m scripts.picture runs/smollm2

`arm-ray report` makes the page, of a copy of the run without weights under a path of its own, and
Chromium draws its verdict and scores, in the light theme.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from arm_ray.report.page.write import write_report

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "report.png"
MOST_BYTES = 200_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WIDTH, _HEIGHT = 1000, 806
# Weights and optimizers: the report reads none of them.
_LEFT_OUT = shutil.ignore_patterns(
    "*.safetensors", "*.pt", "*.bin", "tokenizer.json", "*.tfevents*"
)
# Verdict and scores, and nothing else: the picture ends where they do.
_STYLE = """<style>
:root { color-scheme: light; }
header nav, header .path, main > section:not([id$="scores"]), footer { display: none !important; }
</style></head>"""


def find_browser() -> str | None:
    """A Chromium's program; None: there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def top_of(page: str, name: str) -> str:
    """A report that ends after its scores, and does not say where the run lay on this machine."""
    page = page.replace("</head>", _STYLE, 1)
    return re.sub(rf"(?:/[\w.@+-]+)*/(?=runs/{re.escape(name)}\b)", "", page)


def draw(run: Path, picture: Path, width: int = _WIDTH, height: int = _HEIGHT) -> None:
    """Draw the top of a run's report.

    Args:
        run: Its directory.
        picture: The PNG file to write.
        width: Of the picture, in pixels.
        height: As well.
    """
    browser = find_browser()
    if browser is None:
        sys.exit(f"error: no Chromium: none of {', '.join(BROWSERS)} is there")
    if not run.is_dir():
        sys.exit(f"error: there is no run {run}: make demo makes one")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "runs", run.name)
        shutil.copytree(run, copy, ignore=_LEFT_OUT)
        page = write_report([copy], Path(folder, "page.html"))
        page.write_text(top_of(page.read_text(encoding="utf-8"), run.name), encoding="utf-8")
        drawn = Path(folder, "picture.png")
        subprocess.run(  # noqa: S603
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--no-first-run",
                f"--user-data-dir={folder}/profile",
                "--blink-settings=preferredColorScheme=1",
                "--virtual-time-budget=20000",
                f"--window-size={width},{height}",
                f"--screenshot={drawn}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        size = drawn.stat().st_size
        if size > MOST_BYTES:
            sys.exit(f"error: the picture has {size} bytes, more than {MOST_BYTES}")
        shutil.move(drawn, picture)
    print(f"{picture}: {size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", metavar="RUN_DIR")
    draw(Path(parser.parse_args().run), PICTURE)

"""The set-up: what can be in its way, and that it can be interrupted and started again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.paths import ROOT

LOCK = ROOT / "constraints" / "locked.txt"
SCRIPT = ROOT / "scripts" / "setup.sh"
# Nobody listens there, and nothing lies on a disk.
NO_NETWORK = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/",
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_CONFIG_FILE": os.devnull,
}


def interpreter(path: Path, says: str) -> Path:
    """A program that takes itself for a Python of some kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def set_up(venv: Path, python: Path | str = sys.executable, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, "VENV": str(venv), "PYTHON": str(python), "DEVICE": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def wanted() -> str:
    [line] = [t for t in LOCK.read_text().splitlines() if t.startswith("# for: ")]
    return line.removeprefix("# for: ")


def test_every_package_of_the_lock_has_one_version() -> None:
    lines = [t for t in LOCK.read_text().splitlines() if not t.startswith("#")]
    assert len(lines) > 200
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s=+]+", line) for line in lines)
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert len(locked) == len(lines)
    # What arm_ray names is there in the version that is named.
    for line in (ROOT / "constraints" / "tested.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.lower().replace("_", "-").split("==")
            assert locked[name] == version, name


def test_a_python_that_the_lock_does_not_fit(tmp_path: Path) -> None:
    other = interpreter(tmp_path / "python3.12", "Python 3.12, Linux, x86_64")
    code, said = set_up(tmp_path / "venv", other)
    assert code == 1
    assert "does not fit" in said
    assert "got: Python 3.12, Linux, x86_64" in said
    assert f"expected: {wanted()}" in said
    assert "LOCK=off" in said
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    code, said = set_up(tmp_path / "venv", "python3.99")
    assert code == 1
    assert "there is no python3.99" in said
    assert wanted() in said


def test_an_environment_of_another_python_is_left_alone(tmp_path: Path) -> None:
    ours = interpreter(tmp_path / "python", wanted())
    venv = tmp_path / "venv"
    interpreter(venv / "bin" / "python", "Python 3.12, Linux, x86_64")
    code, said = set_up(venv, ours)
    assert code == 1
    assert f"{venv} is in the way" in said
    assert "got: Python 3.12, Linux, x86_64" in said
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("")
    code, said = set_up(thesis, ours)
    assert code == 1
    assert "got: no virtual environment" in said
    assert (thesis / "chapter.tex").exists()


@pytest.mark.processes
@pytest.mark.skipif(
    wanted() != f"Python {sys.version_info[0]}.{sys.version_info[1]}, Linux, {os.uname().machine}",
    reason="the lock is for another Python",
)
def test_without_a_network_it_says_what_is_missing_and_begins_again(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    for again in (False, True):
        code, said = set_up(venv, **NO_NETWORK)
        assert code == 1
        assert ("was interrupted: beginning again" in said) == again
        assert "set-up 1/6: virtual environment" in said
        assert "set-up 2/6: pip and what builds packages" in said
        assert "a package could not be installed" in said
        assert re.search(r"No matching distribution found for pip==[\d.]+", said)
        assert f"(all that it said: {venv}/setup.log)" in said
        assert "check the network" in said
    # What half a set-up had made is gone; what others put beside it is not looked at.
    assert (venv / ".unfinished").exists()

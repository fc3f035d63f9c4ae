"""The notebook runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.paths import ROOT

FILE = ROOT / "examples" / "notebooks" / "first_merge.ipynb"
# In a process of its own, as a kernel is: what a cell sets holds for the next ones.
PROGRAM = """
import json, sys
space = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), space)
result = space["result"]
print("---")
print(json.dumps([str(result.path), str(result.report), [s.model for s in result.scores]]))
"""


def test_it_is_a_notebook_without_outputs() -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        assert max(map(len, "".join(cell["source"]).splitlines())) <= 100
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, input=json.dumps(sources), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown, _, told = done.stdout.partition("---\n")
    path, report, scored = json.loads(told)
    assert (Path(path) / "model.safetensors").is_file()
    assert Path(report).is_file()
    assert {"base", "candidate-1", "candidate-3"} <= set(scored)
    assert "tensors" in shown
    assert done.stderr == ""

"""What a case of malformed input is: what it makes, the command line, and what has to be said."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.builders.merge_case import MergeCase

# Larger files, most of them with holes, are compared by size and time alone.
_HASHED = 1 << 24


class Place:
    """Where a case makes its files, beside whole ones that all cases read.

    Attributes:
        root: The case's own directory.
        good: A base, two checkpoints of it, and calibration texts.
    """

    def __init__(self, root: Path, good: Path) -> None:
        self.root, self.good = root, good

    def file(self, name: str, content: str | bytes = "") -> Path:
        """Write a file of the case."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def json(self, name: str, content: Any) -> Path:
        """Write a file of JSON."""
        return self.file(name, json.dumps(content))

    def merge_content(self, **changes: Any) -> dict[str, Any]:
        """Content of a merge's configuration, with changes; a value of `...` takes a key away."""
        content: dict[str, Any] = {
            "base": str(self.good / "base"),
            "candidates": [str(self.good / "checkpoint-10")],
            "output": str(self.root / "run"),
            "method": {"operator": "task_arithmetic"},
            **changes,
        }
        return {key: value for key, value in content.items() if value is not ...}

    def merge(self, *overrides: str, **changes: Any) -> list[str]:
        """A merge of whole checkpoints, with changes."""
        text = yaml.safe_dump(self.merge_content(**changes), sort_keys=False)
        return ["merge", str(self.file("merge.yaml", text)), *overrides]

    def calibrated(self, path: object, **changes: Any) -> list[str]:
        """A merge that reads calibration data."""
        calibration = {"path": str(path), "batch_size": 4, "max_length": 32, **changes}
        return self.merge(
            method={"operator": "arm"},
            calibration=calibration,
            schedule={"step": "fixed", "max_iterations": 1, "anchor_iterations": 1},
            runtime={"layer_shards": 1},
        )

    def evaluate(self, tasks: Any, **changes: Any) -> list[str]:
        """An evaluation of a whole model."""
        content = {
            "models": {"base": str(self.good / "base")},
            "output": str(self.root / "scores"),
            "evaluation": {"tasks": tasks},
            **changes,
        }
        text = yaml.safe_dump(content, sort_keys=False)
        return ["evaluate", str(self.file("evaluate.yaml", text))]

    def attach(self, **sections: Mapping[str, Any]) -> list[str]:
        """Following a run that is not there yet."""
        content: dict[str, Any] = {
            "run": {"path": str(self.root / "training"), "idle_timeout_s": 1.0, "poll_s": 0.1},
            "merge": {"base": str(self.good / "base"), "method": {"operator": "task_arithmetic"}},
            "publish": {"dir": str(self.root / "published"), "promote": "always"},
        }
        for name, section in sections.items():
            known = content.get(name)
            content[name] = {**known, **section} if isinstance(known, dict) else section
        text = yaml.safe_dump(content, sort_keys=False)
        return ["attach", str(self.file("attach.yaml", text))]


def make_good(root: Path) -> Path:
    """The whole inputs that cases read."""
    MergeCase(root).make()
    return root


@dataclass(frozen=True)
class Malformed:
    """One fault of what comes from outside.

    Attributes:
        make: Makes it, and gives the command line that meets it.
        where: Text that the error's `where` holds; None: the case's directory.
        says: Text that the error holds somewhere.
        is_told: Whether the command tells of it in what it prints, and not by an error of ours, as
            `inspect`, `verify` and `status` do.
        codes: Exit codes that are documented for it.
    """

    make: Callable[[Place], list[str]]
    where: str | None = None
    says: str = ""
    is_told: bool = False
    codes: tuple[int, ...] = (1,)


def tree_of(root: Path) -> dict[str, object]:
    """Everything below a directory: path -> what it is, so that two looks can be compared."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        about: tuple[object, ...] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode))
        if stat.S_ISLNK(status.st_mode):
            about = (*about, os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            about = (*about, status.st_size, status.st_mtime_ns)
            if status.st_size < _HASHED:
                about = (*about, hashlib.sha256(path.read_bytes()).hexdigest())
        found[str(path.relative_to(root))] = about
    return found

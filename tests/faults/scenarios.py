"""What is done while its files fail: each writer of arm_ray, small enough to be done often."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from arm_ray.runtime.merge import run as merging
from arm_ray.runtime.merge.run import merge
from tests.builders.adapters import write_adapters
from tests.builders.merge_case import MergeCase
from tests.faults.torn import assert_nothing_torn

_SIZES = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 320}
_LINEAR = "method.operator=task_arithmetic"
_TWICE = "schedule={anchor_iterations: 1, max_iterations: 2, tolerance: 0.0, step: fixed}"


@dataclass(frozen=True)
class Scenario:
    """Something that writes files.

    Attributes:
        make: Makes what it reads, in a directory.
        run: Does it, or goes on with it, from that directory into another one; returns what it
            told people.
        result: Digest of what it made, which is the same however often it was stopped.
        look: Asserts that nothing half written can be seen.
    """

    make: Callable[[Path], object]
    run: Callable[[Path, Path], str]
    result: Callable[[Path], str]
    look: Callable[[Path], None] = assert_nothing_torn


def digest_of(directory: Path, pattern: str = "*") -> str:
    """Of the names and bytes of files."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob(pattern)):
        if path.is_file():
            digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _tiny(root: Path) -> MergeCase:
    return MergeCase(root).make(num_layers=1, rows=12, sizes=_SIZES)


def _adapters(root: Path) -> None:
    case = MergeCase(root).make(num_layers=1, rows=12, sizes=_SIZES, count=0)
    write_adapters(case)


def _merge(root: Path, out: Path, *overrides: str, report: bool = False) -> str:
    merging.is_up_or_named = lambda _address: False  # type: ignore[assignment]
    case = MergeCase(root)
    case.candidates = sorted([*root.glob("checkpoint-*"), *root.glob("adapter-?")])
    config = case.config(_TWICE, "calibration.batch_size=4", *overrides, output=str(out))
    console = Console(file=io.StringIO(), width=200)
    merge(config, console=console, writes_report=report)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def _model(out: Path) -> str:
    return digest_of(out / "model", "*.safetensors")


def _merging(*overrides: str, report: bool = False, adapters: bool = False) -> Scenario:
    return Scenario(
        _adapters if adapters else _tiny,
        lambda root, out: _merge(root, out, *overrides, report=report),
        _model,
    )


SCENARIOS: dict[str, Scenario] = {
    "a linear merge": _merging(_LINEAR, report=True),
    "an adapter": _merging(_LINEAR, "output_format=adapter", adapters=True),
    "recovery points": _merging("keep_states=none", "runtime.recovery_every=1"),
}

"""Checks that the reference solutions of a benchmark score 1.0, before models are scored on it.

    python -m arm_ray.evaluation.code.check_references humaneval HumanEval.jsonl.gz

What fails here (a time limit on a busy machine, an interpreter too old, a damaged file) would be
counted against every model. The exit code is 0 if all pass.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from arm_ray.errors import ArmRayError, EvaluationError
from arm_ray.evaluation.code.pool import in_order
from arm_ray.evaluation.code.programs import Benchmark, reference
from arm_ray.evaluation.code.sandbox import DEFAULT_INTERPRETER, Sandbox


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    given = _parser().parse_args(arguments)
    try:
        rows = read_rows(given.path)
        with Sandbox.open(
            unsafe_subprocess=given.unsafe_subprocess,
            interpreter=given.interpreter,
            slots=given.workers,
        ) as sandbox:
            print(f"isolation: {sandbox.isolation}; Python {sandbox.python_version}")
            return 0 if check(given.benchmark, rows, sandbox) else 1
    except ArmRayError as error:
        print(error, file=sys.stderr)
        return 2


def check(benchmark: str, rows: Sequence[Mapping[str, Any]], sandbox: Sandbox) -> bool:
    """Runs the reference solutions and prints how they did; says whether all passed."""
    begun = time.monotonic()
    programs = (reference(benchmark, row) for row in rows)
    outcomes = list(in_order(sandbox.run_tests, programs, sandbox.slots))
    taken = time.monotonic() - begun
    for row, outcome in zip(rows, outcomes, strict=True):
        if not outcome.passed:
            name = row.get("task_id", row.get("id"))
            print(f"{name}: {outcome.status}: {outcome.detail}")
    passed = sum(outcome.passed for outcome in outcomes)
    seconds = [outcome.seconds for outcome in outcomes]
    print(
        f"{benchmark}: {passed} of {len(rows)} reference solutions pass "
        f"({passed / len(rows):.4f}); {taken:.1f} s, {sandbox.slots} at a time; one program "
        f"{statistics.median(seconds) * 1000:.0f} ms in the median, {max(seconds):.2f} s at most"
    )
    return passed == len(rows)


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Reads a benchmark's file: JSON lines or a JSON list, also packed by gzip.

    Raises:
        EvaluationError: It cannot be read, or is empty.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        if text.lstrip().startswith("["):
            rows: Any = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise EvaluationError(
            "The benchmark's file cannot be read.", where=path, got=error
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(
            "The benchmark's file has no rows.", where=path, expected="objects, one a line"
        )
    return list(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m arm_ray.evaluation.code.check_references",
        description="Check that a benchmark's reference solutions score 1.0 in the sandbox.",
    )
    parser.add_argument("benchmark", choices=get_args(Benchmark))
    parser.add_argument("path", type=Path, help="the benchmark's own file")
    parser.add_argument("--workers", type=int, help="programs at a time; default: the CPUs")
    parser.add_argument("--interpreter", default=DEFAULT_INTERPRETER, help="Python inside")
    parser.add_argument(
        "--unsafe-subprocess",
        action="store_true",
        help="run without isolation where isolation is impossible",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

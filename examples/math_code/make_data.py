"""Make the data files of the study of mathematics and code, from GSM8K and MBPP.

::

    python examples/math_code/make_data.py --gsm8k FOLDER --mbpp FILE.jsonl [--output FOLDER]

``FOLDER`` has ``train.jsonl`` and ``test.jsonl`` of GSM8K as its authors publish them, with
``question`` and ``answer`` in each line; ``FILE`` the 974 problems of MBPP, with ``task_id``,
``text``, ``code`` and ``test_list``. The result is the same on every machine: problems are put in
the order of a digest of their text, no random numbers are drawn. ``data/README.md`` says what is
kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

# Characters of prompt and completion together: longer ones would double the time of every step.
LONGEST = 500
# First and last task of the parts that MBPP's authors made.
MBPP_TEST, MBPP_VALIDATION, MBPP_TRAIN = (11, 510), (511, 600), (601, 974)


def math_row(problem: dict[str, Any]) -> Row:
    """The question on one line, and the solution without the marks of the calculator."""
    question = " ".join(problem["question"].split())
    solution = re.sub(r"<<[^>]*>>", "", problem["answer"])
    lines = [" ".join(line.split()) for line in solution.strip().split("\n")]
    return {"prompt": f"Question: {question}\nAnswer:", "completion": " " + "\n".join(lines)}


def code_row(problem: dict[str, Any]) -> Row:
    """The task with its first test, which shows the function's name, and the program."""
    task = " ".join(problem["text"].split())
    lines = problem["code"].replace("\r\n", "\n").expandtabs(4).strip().split("\n")
    code = "\n".join(line.rstrip() for line in lines)
    prompt = f"Task: {task}\nTest: {problem['test_list'][0].strip()}\nProgram:"
    return {"prompt": prompt, "completion": f"\n{code}"}


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Those that are short enough, each prompt once, in the order of the digest of the prompt."""
    by_prompt = {row["prompt"]: row for row in rows}
    short = [r for r in by_prompt.values() if len(r["prompt"] + r["completion"]) <= LONGEST]
    return sorted(short, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())


def files(
    gsm8k_train: Sequence[dict[str, Any]],
    gsm8k_test: Sequence[dict[str, Any]],
    mbpp: Sequence[dict[str, Any]],
) -> dict[str, list[Row]]:
    """The rows of each file."""

    def part(bounds: tuple[int, int]) -> list[Row]:
        first, last = bounds
        return in_order(code_row(p) for p in mbpp if first <= p["task_id"] <= last)

    math = in_order(map(math_row, gsm8k_train))
    return {
        "math-calibration": math[:60],
        "math-train": math[60:460],
        "math-heldout": in_order(map(math_row, gsm8k_test))[:200],
        "code-calibration": part(MBPP_VALIDATION)[:60],
        "code-train": part(MBPP_TRAIN),
        "code-heldout": part(MBPP_TEST)[:200],
    }


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the data files of the study.")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--mbpp", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    seen, unseen = (_read(arguments.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    for name, rows in files(seen, unseen, _read(arguments.mbpp)).items():
        path = arguments.output / f"{name}.jsonl"
        texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()

"""Make the demo's data files from SVAMP.

::

    python examples/smollm2/make_data.py --svamp FILE.jsonl [--output examples/smollm2/data]

``FILE`` has the 1,000 problems of SVAMP, one JSON object a line with the upstream fields ``Body``,
``Question``, ``Equation`` and ``Answer``. The result is the same on every machine: problems are
put in the order of a digest of their text, no random numbers are drawn. ``data/README.md`` says
what is kept and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

# Filled in this order; what is left over is trained on.
SPLIT_ROWS = {"heldout": 300, "calibration": 100, "validation": 100}


def normalise(text: str) -> str:
    """Lower-case letters and digits, single spaces: equal for texts that differ in form alone."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def story(problem: dict[str, object]) -> str:
    """The problem without its numbers. SVAMP varies one story; its variants stay together."""
    return re.sub(r"\d+", "", normalise(str(problem["Body"])))


def number(text: str) -> str:
    """`290.0` as `290`."""
    return re.sub(r"\.0$", "", text)


def to_row(problem: dict[str, object]) -> dict[str, str]:
    """A prompt of one line, and the equation with its result."""
    body = " ".join(str(problem["Body"]).split()).rstrip(".")
    question = " ".join(str(problem["Question"]).split())
    parts = str(problem["Equation"]).split()
    if parts[0] == "(" and parts[-1] == ")":
        parts = parts[1:-1]
    equation = " ".join(number(part) for part in parts)
    return {
        "prompt": f"Question: {body}. {question}\nAnswer:",
        "completion": f" {equation} = {number(str(problem['Answer']))}",
    }


def split(problems: list[dict[str, object]]) -> dict[str, list[dict[str, str]]]:
    """The rows of each file; problems of one story are in one file, equal prompts are left out."""
    stories: dict[str, dict[str, dict[str, str]]] = {}
    for problem in problems:
        row = to_row(problem)
        stories.setdefault(story(problem), {})[normalise(row["prompt"])] = row
    order = sorted(stories, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    files: dict[str, list[dict[str, str]]] = {name: [] for name in [*SPLIT_ROWS, "train"]}
    for text in order:
        name = next((n for n, size in SPLIT_ROWS.items() if len(files[n]) < size), "train")
        files[name] += stories[text].values()
    return {
        name: sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
        for name, rows in files.items()
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's data files.")
    parser.add_argument("--svamp", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    lines = arguments.svamp.read_text(encoding="utf-8").splitlines()
    for name, rows in split([json.loads(line) for line in lines]).items():
        path = arguments.output / f"{name}.jsonl"
        texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()

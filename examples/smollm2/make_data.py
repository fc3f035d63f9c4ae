"""Make the demo's data files from the upstream files of GSM8K.

::

    python examples/smollm2/make_data.py --gsm8k-dir DIR [--output examples/smollm2/data]

``DIR`` holds ``train.jsonl`` and ``test.jsonl`` of GSM8K. The result is the same on every machine:
rows are put in the order of a digest of their text, no random numbers are drawn. ``data/README.md``
says what is kept and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

# Short problems with short answers, so that training and scoring take minutes on two cores.
MAX_QUESTION_CHARACTERS = 220
MAX_RATIONALE_CHARACTERS = 200
MAX_RATIONALE_LINES = 3

# From the upstream training file, in this order. All fitting rows of the upstream test file are
# held out.
SPLIT_ROWS = {"train": 1280, "calibration": 256, "validation": 256}


def normalise(text: str) -> str:
    """Lower-case letters and digits, single spaces: equal for texts that differ in form alone."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def to_row(question: str, answer: str) -> dict[str, str] | None:
    """A prompt and a one-line completion, or None where the problem does not fit the limits."""
    rationale, mark, number = answer.rpartition("####")
    # The upstream answers hold marks such as <<48/2=24>> for a calculator that is not used here.
    lines = [" ".join(line.split()) for line in re.sub(r"<<.*?>>", "", rationale).splitlines()]
    lines = [line for line in lines if line]
    question, number = question.strip(), number.strip()
    fits = (
        mark
        and "\n" not in question
        and len(question) <= MAX_QUESTION_CHARACTERS
        and 1 <= len(lines) <= MAX_RATIONALE_LINES
        and len(" ".join(lines)) <= MAX_RATIONALE_CHARACTERS
        and re.fullmatch(r"-?[\d,]+(\.\d+)?", number)
    )
    if not fits:
        return None
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {' '.join(lines)} #### {number.replace(',', '')}",
    }


def fitting_rows(path: Path, seen: set[str]) -> list[dict[str, str]]:
    """The rows of one upstream file, in digest order, without those whose prompt is in ``seen``."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        upstream = json.loads(line)
        row = to_row(upstream["question"], upstream["answer"])
        if row is not None and normalise(row["prompt"]) not in seen:
            seen.add(normalise(row["prompt"]))
            rows[hashlib.sha256(row["prompt"].encode()).hexdigest()] = row
    return [rows[digest] for digest in sorted(rows)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON Lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's data files.")
    parser.add_argument("--gsm8k-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    seen: set[str] = set()
    # Held out first: a problem that is in both upstream files must not be trained on.
    write(
        arguments.output / "heldout.jsonl", fitting_rows(arguments.gsm8k_dir / "test.jsonl", seen)
    )
    pool = fitting_rows(arguments.gsm8k_dir / "train.jsonl", seen)
    for name, count in SPLIT_ROWS.items():
        rows, pool = pool[:count], pool[count:]
        if len(rows) < count:
            raise SystemExit(f"{name}: {len(rows)} rows fit, expected {count}")
        write(arguments.output / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()

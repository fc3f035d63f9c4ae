"""The columns of a study's results, beside those of its axes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["text", "integer", "number"]
REFERENCES = ("base", "last_candidate", "best_checkpoint")
VERSIONS = ("arm_ray", "torch", "ray", "transformers", "vllm")
COSTS = ("seconds", "forward_seconds", "merge_seconds", "iterations")

_NAMES: dict[str, Kind] = dict.fromkeys(
    ("kind", "model", "state", "error", "task", "metric"), "text"
)
_VERSIONS: dict[str, Kind] = dict.fromkeys((*VERSIONS, "cpu", "gpu"), "text")


def _compared() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for name in REFERENCES:
        found[name] = "text"
        for suffix in ("difference", "low", "high", "p"):
            found[f"{name}_{suffix}"] = "number"
    return found


COLUMNS: Mapping[str, Kind] = {
    **_NAMES,
    # Of a checkpoint, its step.
    "checkpoint": "integer",
    # Of the task's metric: mean, interval, problems, completions of each.
    "mean": "number",
    "low": "number",
    "high": "number",
    "n": "integer",
    "repeats": "integer",
    # Against each reference: its name, the paired difference, interval and p-value.
    **_compared(),
    # Of the merge: sums over its iterations, how it ended, and as JSON what else its events count.
    "seconds": "number",
    "forward_seconds": "number",
    "merge_seconds": "number",
    "wall_seconds": "number",
    "iterations": "integer",
    "ended": "text",
    "device": "text",
    "compute_dtype": "text",
    "work": "text",
    "step_coefficients": "text",
    "digest": "text",
    # Of the scoring.
    "date": "text",
    **_VERSIONS,
}

"""Which checkpoints a run still has to write, whatever it was killed at and removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arm_ray.training.records import missing_saves, resume_point

SAVES = [1, 2, 3, 4, 5, 6]


def run(tmp_path: Path, whole: list[int], half: list[int] | None = None) -> Path:
    for step in [*whole, *(half or [])]:
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in whole:
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"global_step": step}))
    return tmp_path


@pytest.mark.parametrize(
    ("whole", "kept", "missing", "resumes"),
    [
        ([], None, SAVES, None),
        # With a limit all are written in their turn, for whoever follows the run.
        ([], 2, SAVES, None),
        ([3, 4], 2, [5, 6], 4),
        ([1, 2, 3, 4], None, [5, 6], 4),
        ([5, 6], 2, [], None),
        (SAVES, None, [], None),
        # One that should be there is not.
        ([1, 2, 4, 5, 6], None, [3], 2),
        ([4, 6], 2, [5], 4),
    ],
)
def test_what_is_missing(
    tmp_path: Path, whole: list[int], kept: int | None, missing: list[int], resumes: int | None
) -> None:
    output = run(tmp_path, whole)
    assert missing_saves(output, SAVES, kept) == missing
    point = resume_point(output, missing)
    assert (point and point[0]) == resumes


def test_half_a_checkpoint_is_missing(tmp_path: Path) -> None:
    output = run(tmp_path, [1, 2], half=[3])
    assert missing_saves(output, SAVES, 2) == [3, 4, 5, 6]

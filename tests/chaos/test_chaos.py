"""Kill anything, at any moment: runs go on, by themselves or once they are started again, and end
with the bits of undisturbed ones.

`make chaos` runs all of it; `make test` the ten kills. `python -m tests.chaos` does others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from arm_ray.runtime.scoring.evaluator import ATTEMPTS
from tests.builders.figures import guarantee
from tests.chaos.bed import Bed, Kill, plan_of
from tests.chaos.jobs import Job, attach_job, merge_job, sft_job, smollm2_job


@pytest.fixture
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A cluster of three raylets; its paths are short, for Ray's sockets."""
    with Bed(tmp_path_factory.mktemp("bed")) as found:
        yield found
    assert found.processes() == []


def disturb(bed: Bed, job: Job, plan: Sequence[Kill]) -> int:
    """Disturb a job; all kills are made, of each of its victims, and nothing went wrong."""
    bed.undisturbed(job)
    done = bed.disturb(job, plan)
    assert done.faults == []
    # A victim without a kill in it would be a promise that nobody has tried.
    assert done.kills == Counter(kill.victim for kill in plan)
    assert done.kills.keys() >= set(job.victims)
    made = sum(done.kills.values())
    guarantee(
        f"kills survived ({job.name}): {made} of {len(plan)} "
        f"({dict(sorted(done.kills.items()))}); {done.runs} runs with the bits of an undisturbed "
        f"one, {done.restarts} drivers started again, of which {done.gave_up} had lost the same "
        f"evaluator {ATTEMPTS} times"
    )
    return made


@pytest.mark.processes
def test_ten_kills(bed: Bed, tmp_path: Path) -> None:
    """A seeded part of the hundred, with each kind of victim of a merge in it."""
    job = merge_job(tmp_path / "of")
    victims = [*dict.fromkeys(job.victims), "layer shard", "raylet"]
    assert disturb(bed, job, plan_of(victims, 10, random.Random(10), within_s=6.0)) == 10


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("make", "kills", "within_s"),
    [(merge_job, 84, 10.0), (attach_job, 12, 8.0), (sft_job, 4, 20.0), (smollm2_job, 5, 25.0)],
    ids=["merge", "attach", "training", "SmolLM2"],
)
def test_a_hundred_kills_and_five_of_a_real_model(
    bed: Bed, tmp_path: Path, make: Callable[[Path], Job], kills: int, within_s: float
) -> None:
    job = make(tmp_path / "of")
    plan = plan_of(job.victims, kills, random.Random(kills), within_s)
    assert disturb(bed, job, plan) == kills

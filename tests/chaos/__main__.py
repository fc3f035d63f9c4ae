"""`python -m tests.chaos [--job merge] [--kills 20] [--seed 0] [--victims …]`: prints a table."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import jobs
from tests.chaos.bed import Bed, plan_of

JOBS = {
    "merge": jobs.merge_job,
    "smollm2": jobs.smollm2_job,
    "attach": jobs.attach_job,
    "sft": jobs.sft_job,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--job", choices=JOBS, default="merge")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", nargs="*", help="kinds of processes; default: all of the job")
    parser.add_argument("--within", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--keep", type=Path, help="a directory for what is made; default: none")
    given = parser.parse_args()
    rng, started = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as made:
        root = given.keep or Path(made)
        job = JOBS[given.job](root / given.job)
        plan = plan_of(given.victims or job.victims, given.kills, rng, given.within)
        with Bed(root / "bed") as bed:
            bed.undisturbed(job)
            done = bed.disturb(job, plan)
    for victim, count in sorted(done.kills.items()):
        print(f"{count:6d}  {victim}")
    print(
        f"{sum(done.kills.values())} kills in {time.monotonic() - started:.0f} s, {done.runs} runs "
        f"to their end, {done.restarts} drivers started again, {done.gave_up} gave up, "
        f"{len(done.faults)} faults"
    )
    for fault in done.faults:
        print(fault)
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())

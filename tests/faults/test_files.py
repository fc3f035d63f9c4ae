"""Whatever file operation fails, and whenever the process ends: nothing torn, nothing lost.

Every call that changes a file of a small job is counted, and then each of them fails in turn, or
is the last one of the process. The job ends with an error that says what to do, or goes on without
what is only for people and says so; nothing half written can be seen; and the same job afterwards
ends with the same bits as one that nothing happened to.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arm_ray.errors import ArmRayError
from arm_ray.events import listened
from arm_ray.runtime.merge import run as merging
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.session import telemetry
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.figures import guarantee
from tests.builders.merge_case import MergeCase
from tests.faults.conftest import Faulty
from tests.faults.scenarios import SCENARIOS
from tests.faults.shim import Fault
from tests.faults.torn import assert_nothing_torn

pytestmark = pytest.mark.processes

FAULTS = (
    Fault("from then on", "ENOSPC"),
    Fault("once", "EIO"),
    Fault("once", "EDQUOT"),
    Fault("from then on", "EROFS"),
    Fault("short write", "ENOSPC"),
    Fault("kill"),
)
EACH = (FAULTS[0], FAULTS[-1])
SEED = 20
# Nothing else of these runs shows it: what is for people alone, or is tidied up at the next start.
# A directory that could not be made is told of by what is written into it, unless it was there.
_FOR_PEOPLE = ("tensorboard", "report.html", ".partial", "unlink", "rmdir", "mkdir")


def problem_of(scenario: str, said: dict[str, Any], expected: str) -> str | None:
    """What is wrong with how a case ended; None: nothing."""
    if "torn" in said:
        return f"torn, or not to be gone on with: {said['torn']}"
    if said["result"] != expected:
        return "the job that went on made something else"
    if said["before"] not in (None, expected):
        return "something unfinished looked finished"
    if said["ended"] == "with a traceback":
        return f"a traceback: {said['error']}"
    if said["ended"] == "with an error" and not said["hint"]:
        return f"an error without a hint: {said['error']}"
    place = "" if said["ended"] != "well" or said["told"] else said["place"]
    if place and not any(name in place for name in _FOR_PEOPLE):
        return f"nothing was told of {place}"
    return None


def check(faulty: Faulty, scenario: str, faults: list[Fault]) -> tuple[int, list[str]]:
    """Do cases; returns how many were as they have to be, and what was wrong with the others."""
    expected = faulty.calm(scenario)["result"]
    problems = []
    for fault in faults:
        problem = problem_of(scenario, faulty.ask(scenario, fault), expected)
        if problem is not None:
            problems.append(f"{fault.name}, call {fault.at}: {problem}")
    return len(faults) - len(problems), problems


def at(fault: Fault, call: int) -> Fault:
    return Fault(fault.mode, fault.error, call)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_some_calls_fail_one_after_another(faulty: Faulty, scenario: str) -> None:
    calls = faulty.calm(scenario)["calls"]
    chosen = random.Random(SEED)
    faults = [at(fault, chosen.randint(1, calls)) for fault in FAULTS]
    held, problems = check(faulty, scenario, faults)
    guarantee(f"files, a sample, {scenario}: {held} of {len(faults)}")
    assert not problems, "\n".join(problems)


@pytest.mark.minutes
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call_fails_once(faulty: Faulty, scenario: str, fault: Fault) -> None:
    """A full disk and a kill at each call; the others at every fifth, which are much the same.

    Where there are few calls, at each of them as well.
    """
    calls = faulty.calm(scenario)["calls"]
    is_each = fault in EACH or calls < 25
    first = 1 if is_each else 1 + random.Random(f"{scenario} {fault.name}").randrange(5)
    faults = [at(fault, call) for call in range(first, calls + 1, 1 if is_each else 5)]
    held, problems = check(faulty, scenario, faults)
    how = "at each call" if is_each else "at every fifth call"
    guarantee(f"{fault.name} {how}, {scenario}: {held} of {len(faults)}")
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_written_through_memory(faulty: Faulty, scenario: str) -> None:
    """What is written through a mapping is seen by no count of calls: there is none."""
    assert faulty.calm(scenario)["calls"] > 0
    assert faulty.calm(scenario)["mapped"] == 0


def test_a_slow_file_system_changes_nothing(faulty: Faulty) -> None:
    expected = faulty.calm("a linear merge")["result"]
    slow = faulty.ask("a linear merge", Fault(delay_us=2_000))
    assert slow["ended"] == "well"
    assert slow["result"] == expected


def test_a_directory_that_is_removed_beneath_a_merge(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an error, or makes the directory again: what is there then is whole."""
    monkeypatch.setattr(merging, "is_up_or_named", lambda _address: False)
    # TensorBoard's own thread would say that its file is gone.
    monkeypatch.setattr(telemetry, "make_trackers", lambda *_: [])
    case.make(num_layers=1)
    quiet: dict[str, Any] = {"console": Console(quiet=True), "writes_report": False}
    whole = merge(case.config(output="whole"), **quiet).model
    removed: list[Path] = []

    def remove(log: Path, record: Mapping[str, Any]) -> None:
        if record["event"] == "iteration_finished" and record["iteration"] == 2:
            removed.append(log.parent)
            shutil.rmtree(log.parent, ignore_errors=True)

    made, told = None, None
    with listened(remove):
        try:
            made = merge(case.config(), **quiet).model
        except ArmRayError as error:
            told = error.hint
    assert len(removed) == 1
    assert (made is None) == (told is not None)
    assert_nothing_torn(case.root / "run")
    if made is None:
        assert not (case.root / "run" / "model").exists()
        shutil.rmtree(case.root / "run", ignore_errors=True)
        made = merge(case.config(), **quiet).model
    assert made is not None
    assert whole is not None
    assert_same_bits(load_all(made), load_all(whole))

"""A process that has imported everything, and does each case in a fork of itself.

Started with the shim in LD_PRELOAD. Reads a case a line, as JSON, and writes what came of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arm_ray.errors import ArmRayError
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.shim import Fault, Shim

Said = dict[str, Any]


def first(shim: Shim, scenario: Scenario, root: Path, out: Path, fault: Fault) -> Said:
    """Do it, with a fault; says how it ended."""
    scenario.begin(root, out)
    shim.arm(out, fault)
    said: Said = {"ended": "well"}
    try:
        said["told"] = [t for t in scenario.run(root, out).splitlines() if "warning" in t]
    except ArmRayError as error:
        said = {"ended": "with an error", "error": str(error), "hint": error.hint}
        said["kind"] = type(error).__name__
    except BaseException:
        said = {"ended": "with a traceback", "error": traceback.format_exc()}
    said |= {"calls": shim.calls, "mapped": shim.mapped, "place": shim.place}
    shim.arm(Path("/nowhere"), Fault())
    return said


def again(scenario: Scenario, root: Path, out: Path) -> Said:
    """Look at what there is, go on without a fault, and look again."""
    try:
        scenario.look(out)
        before = _result(scenario, out)
        scenario.run(root, out)
        scenario.look(out)
        return {"before": before, "result": scenario.result(out)}
    except BaseException:
        return {"torn": traceback.format_exc()}


def _result(scenario: Scenario, out: Path) -> str | None:
    try:
        return scenario.result(out)
    except (OSError, AssertionError):
        return None


def forked(work: Callable[[], Said]) -> Said:
    """What some work gives, done by a fork of this process; `killed`: it came to no end."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return json.loads(text) if text else {"ended": "killed"}


def main() -> None:
    """Do what is asked for, line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    shim, roots = Shim(), dict[str, Path]()
    with tempfile.TemporaryDirectory() as place:
        for line in sys.stdin:
            asked = json.loads(line)
            scenario = SCENARIOS[asked["scenario"]]
            root = roots.get(asked["scenario"])
            if root is None:
                root = roots[asked["scenario"]] = Path(place, f"inputs-{len(roots)}")
                root.mkdir()
                scenario.make(root)
                # What is imported late is imported once.
                warm = Path(place, f"warm-{len(roots)}")
                scenario.begin(root, warm)
                scenario.run(root, warm)
            fault, out = Fault(**asked["fault"]), Path(place, "out", "run")
            out.parent.mkdir()
            said = forked(lambda s=scenario, r=root, o=out, f=fault: first(shim, s, r, o, f))  # type: ignore[misc]
            then = forked(lambda s=scenario, r=root, o=out: again(s, r, o))  # type: ignore[misc]
            shutil.rmtree(out.parent)
            print(json.dumps({**dataclasses.asdict(fault), **said, **then}), file=answers)
            answers.flush()


if __name__ == "__main__":
    main()

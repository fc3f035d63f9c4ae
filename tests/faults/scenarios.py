"""What is done while its files fail: each writer of arm_ray, small enough to be done often."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.evaluation.records import (
    Record,
    read_records,
    read_scores,
    summarise,
    write_records,
)
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.exports.gguf import SCRIPT, export_gguf
from arm_ray.following.journal import Arrival, open_journal
from arm_ray.following.layouts import RunWatcher
from arm_ray.following.publish import BEST, LATEST, publish, published, recover
from arm_ray.following.snapshots import remove, snapshots, take
from arm_ray.report.trackers import make_trackers
from arm_ray.runtime.merge import run as merging
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.output.claim import claimed
from arm_ray.runtime.session import telemetry
from arm_ray.runtime.verify import repair, verify
from tests.builders.adapters import write_adapters
from tests.builders.merge_case import MergeCase
from tests.builders.models import fine_tuned, save, tiny_model
from tests.faults.torn import assert_nothing_torn

_SIZES = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 320}
_LINEAR = "method.operator=task_arithmetic"
_TWICE = "schedule={anchor_iterations: 1, max_iterations: 2, tolerance: 0.0, step: fixed}"


@dataclass(frozen=True)
class Scenario:
    """Something that writes files.

    Attributes:
        make: Makes what it reads, in a directory.
        run: Does it, or goes on with it, from that directory into another one; returns what it
            told people.
        result: Digest of what it made, which is the same however often it was stopped.
        look: Asserts that nothing half written can be seen.
        begin: Puts what there is already where it works; before faults.
    """

    make: Callable[[Path], object]
    run: Callable[[Path, Path], str]
    result: Callable[[Path], str]
    look: Callable[[Path], None] = assert_nothing_torn
    begin: Callable[[Path, Path], object] = lambda _root, _out: None


def digest_of(directory: Path, pattern: str = "*") -> str:
    """Of the names and bytes of files."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob(pattern)):
        if path.is_file():
            digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _tiny(root: Path) -> MergeCase:
    return MergeCase(root).make(num_layers=1, rows=12, sizes=_SIZES)


def _adapters(root: Path) -> None:
    case = MergeCase(root).make(num_layers=1, rows=12, sizes=_SIZES, count=0)
    write_adapters(case)


def _merge(root: Path, out: Path, *overrides: str, report: bool = False) -> str:
    merging.is_up_or_named = lambda _address: False  # type: ignore[assignment]
    case = MergeCase(root)
    case.candidates = sorted([*root.glob("checkpoint-*"), *root.glob("adapter-?")])
    # The page and the curves are of one scenario: they take most of the time.
    telemetry.make_trackers = make_trackers if report else lambda *_: []  # type: ignore[assignment]
    config = case.config(_TWICE, "calibration.batch_size=4", *overrides, output=str(out))
    console = Console(file=io.StringIO(), width=200)
    merge(config, console=console, writes_report=report)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def _model(out: Path) -> str:
    assert (out / "model").is_dir()
    return digest_of(out / "model", "*.safetensors")


def _merging(*overrides: str, report: bool = False, adapters: bool = False) -> Scenario:
    return Scenario(
        _adapters if adapters else _tiny,
        lambda root, out: _merge(root, out, *overrides, report=report),
        _model,
    )


def _trained(root: Path) -> None:
    """A run with three checkpoints."""
    model = tiny_model("smollm2", seed=1, num_layers=1, sizes=_SIZES)
    for step in (10, 20, 30):
        path = save(fine_tuned(model, seed=step), root / "run" / f"checkpoint-{step}")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def _follow(root: Path, out: Path) -> str:
    """What attach does with files: it takes snapshots, keeps its journal, and publishes."""
    watcher = RunWatcher(root / "run", "hf", missing=lambda _path: None)
    work, published = out / "work", out / "published"
    with claimed(work, "attach"):
        journal = open_journal(work)
        recover(published)
        watcher.scan()
        for found in watcher.scan():
            held = {snapshot.step: snapshot for snapshot in snapshots(work / "snapshots")}
            done = {arrival.step for arrival in journal.published}
            if found.step in done:
                continue
            snapshot = held.get(found.step)
            if snapshot is None:
                snapshot, why = take(found, watcher, work / "snapshots", copy=found.step == 20)
                assert snapshot is not None, why
            if journal.unfinished is None:
                journal.taken[found.step] = found.version
                number = len(journal.arrivals) + 1
                journal.begin(
                    Arrival(number, found.step, found.version, (snapshot.path.name,), (), 0)
                )
            said = {"step": found.step, "run": str(root)}
            publish(snapshot.path, published, found.step, said, 1, found.step == 10)
            journal.end(outcome="published", is_best=found.step == 10)
            for older in held.values():
                remove(older)
    return ""


def _published(out: Path) -> str:
    directory = out / "published"
    assert sorted(published(directory)) == [10, 30]
    links = [os.readlink(directory / name) for name in (BEST, LATEST)]
    return digest_of(directory, "step-*/*.safetensors") + str(links)


def _record(problem: str) -> Record:
    return Record(problem, 0, 0, "", 9, "text " * 50, 7, "stop", "v", "1", "", {"correct": 1.0})


def _evaluate(_root: Path, out: Path) -> str:
    """What an evaluation leaves of each task."""
    with claimed(out, "evaluation"):
        for task in ("one", "two"):
            if read_scores(out / "model", task) is not None:
                continue
            records = [_record(f"{task}-{number}") for number in range(20)]
            given = {"task": task, "kind": "math", "metrics": ["correct"]}
            scores = summarise(
                records,
                EvaluationSettings(("one", "two"), resamples=50),
                **given,
                digest="d",
                seconds=1.0,
            )
            write_records(out / "model", records, scores)
    return ""


def _scores(out: Path) -> str:
    found = [read_records(out / "model", task) for task in ("one", "two")]
    assert all(read_scores(out / "model", task) for task in ("one", "two"))
    return hashlib.sha256(str(found).encode()).hexdigest()


_CONVERTER = """
import sys
arguments = sys.argv[1:]
with open(arguments[arguments.index("--outfile") + 1], "wb") as file:
    file.write(b"GGUF" + bytes(5000))
"""


def _for_gguf(root: Path) -> None:
    save(tiny_model("smollm2", seed=1, num_layers=1, sizes=_SIZES), root / "model")
    (root / SCRIPT).write_text(_CONVERTER)


def _gguf(root: Path, out: Path) -> str:
    export_gguf(root / "model", out / "a.gguf", converter=root / SCRIPT, force=True)
    return ""


def _whole_gguf(out: Path) -> str:
    content = (out / "a.gguf").read_bytes()
    assert len(content) == 5004
    return hashlib.sha256(content).hexdigest()


def _damaged(root: Path) -> None:
    """A finished run, one bit of whose second state and of whose model is another one."""
    _tiny(root)
    made = root / "made"
    _merge(root, made, _LINEAR)
    for file in (made / "model" / SINGLE_NAME, made / "states" / "0002" / "config.json"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)


def _repair(_root: Path, out: Path) -> str:
    merging.is_up_or_named = lambda _address: False  # type: ignore[assignment]
    repair(out, console=Console(file=io.StringIO()))
    return ""


def _repaired(out: Path) -> str:
    assert verify(out).is_whole
    return _model(out)


def _look_at_repair(out: Path) -> None:
    """The run can be looked at, says of itself what it said, and has nothing else that is torn."""
    assert verify(out).path == out
    assert yaml.safe_load((out / "config.yaml").read_text())["output"] != str(out)
    assert_nothing_torn(out, is_damaged=True)


SCENARIOS: dict[str, Scenario] = {
    "a linear merge": _merging(_LINEAR, report=True),
    "an adapter": _merging(_LINEAR, "output_format=adapter", adapters=True),
    "recovery points": _merging("keep_states=none", "runtime.recovery_every=1"),
    "following a run": Scenario(_trained, _follow, _published),
    "records of an evaluation": Scenario(lambda _root: None, _evaluate, _scores),
    "a GGUF file": Scenario(_for_gguf, _gguf, _whole_gguf),
    "a repair": Scenario(
        _damaged,
        _repair,
        _repaired,
        _look_at_repair,
        # Where it lies now is not where its configuration says.
        lambda root, out: shutil.copytree(root / "made", out, dirs_exist_ok=True),
    ),
}

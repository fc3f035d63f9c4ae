"""Merges in the process that asks for them, without Ray."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_ray.checkpoints.huggingface import SINGLE_NAME
from arm_ray.errors import CorruptCheckpointError, WorkerError
from arm_ray.events import read_events
from arm_ray.merging.method import open_method
from arm_ray.runtime.cluster.actors import LocalHandle, in_place_of
from arm_ray.runtime.cluster.calls import NODE_FILES, SHARD, get_results, wait_for
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.publisher import Publisher
from arm_ray.runtime.merge.run import MergeOutcome, merge, needs_no_ray
from arm_ray.runtime.shards.meter import MOST_SPANS
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.paths import ROOT

LINEAR = "method.operator=task_arithmetic"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not joined Ray, and cannot."""

    @contextlib.contextmanager
    def refuse(*_: object) -> Iterator[None]:
        raise AssertionError("Ray is started")
        yield

    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    monkeypatch.setattr(module, "ray_session", refuse)
    for name in ("get", "put", "wait", "nodes", "cluster_resources", "available_resources"):
        monkeypatch.setattr(f"ray.{name}", refuse)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def run(case: MergeCase, *overrides: str, output: str = "run", **options: Any) -> MergeOutcome:
    return merge(case.config(*overrides, output=output), console=Console(quiet=True), **options)


@pytest.mark.usefixtures("no_ray")
def test_to_wait_for_nothing_asks_nobody() -> None:
    """A merge that takes longer than it is waited for at once has nothing to get."""
    assert get_results([]) == []
    assert wait_for([]) == ([], [])


@pytest.mark.parametrize(
    "overrides",
    [
        (LINEAR, "keep_states=none"),
        (LINEAR, "keep_states=all", "runtime.threads=2"),
        ("method.operator=ties",),
        ("method.operator=dare", "runtime.layer_shards=auto"),
        (
            "method.operator=slerp",
            "schedule.anchor_iterations=1",
            "schedule.max_iterations=1",
            "schedule.window_size=2",
        ),
        # The first of them by an actor.
        ("method.operator=arm", "runtime.threads=2"),
        ("method.operator=arm", "keep_states=none", "runtime.lookahead=0"),
        ("method.operator=arm", "keep_states=none", "runtime.recovery_every=1"),
        ("method.operator=arm", "runtime.residency=disk", "keep_states=none"),
        ("method.operator=arm", "schedule.tolerance=0.9", "keep_states=none"),
        ("method.operator=aim", "runtime.residency=host", "runtime.layer_shards=auto"),
        ("method.operator=acm",),
        (
            "method.operator=arm",
            "schedule.step=subspace",
            "calibration.batch_size=4",
            "select.samples=8",
        ),
    ],
    ids=lambda given: given[0].split("=")[1] + f"-{len(given)}-" + given[-1].split("=")[0],
)
def test_the_bits_are_those_of_actors(
    case: MergeCase, request: pytest.FixtureRequest, overrides: tuple[str, ...]
) -> None:
    case.make()
    request.getfixturevalue("local_ray")
    if overrides != ("method.operator=arm", "runtime.threads=2"):
        request.getfixturevalue("shards_in_process")
    expected = run(case, *overrides, output="actors")
    request.getfixturevalue("no_ray")
    torch.set_num_threads(2)
    found = run(case, *overrides)
    assert expected.model is not None
    assert found.model is not None
    assert_same_bits(load_all(expected.model), load_all(found.model))
    states = [sorted(p.name for p in (o.run / "states").glob("*")) for o in (expected, found)]
    assert states[0] == states[1]
    assert torch.get_num_threads() == 2
    # States are written beside the iterations.
    names = [
        [e["event"] for e in read_events(outcome.run / "events.jsonl")]
        for outcome in (expected, found)
    ]
    assert sorted(names[0]) == sorted(names[1])
    others = [[name for name in each if name != "state_written"] for each in names]
    assert others[0] == others[1]


@pytest.mark.usefixtures("no_ray")
def test_many_layers_are_merged_wherever_weights_live(case: MergeCase) -> None:
    """More layer groups of a shard than an event has spans; each is run and merged in turn."""
    case.make(num_layers=MOST_SPANS // 2 + 2)
    settings = ("schedule.max_iterations=1", "schedule.anchor_iterations=1", "keep_states=none")
    models = []
    for residency in ("device", "host", "disk"):
        done = run(case, *settings, f"runtime.residency={residency}", output=residency)
        assert done.model is not None
        models.append(load_all(done.model))
        [finished] = [
            e for e in read_events(done.run / "events.jsonl") if e["event"] == "iteration_finished"
        ]
        assert 1 <= len(finished["spans"][0]) <= MOST_SPANS
    assert_same_bits(models[0], models[1])
    assert_same_bits(models[0], models[2])


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("operator", [LINEAR, "method.operator=arm"])
def test_it_is_halted_and_gone_on_with(case: MergeCase, operator: str) -> None:
    case.make()
    whole = run(case, operator, output="whole")
    assert run(case, operator, "keep_states=none", stop_after=2).reason == "stop_after"
    again = run(case, operator, "keep_states=none")
    assert whole.model is not None
    assert again.model is not None
    assert_same_bits(load_all(whole.model), load_all(again.model))


@pytest.mark.usefixtures("no_ray")
def test_errors_are_those_of_actors(case: MergeCase) -> None:
    case.make()
    file = case.candidates[0] / SINGLE_NAME
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="holds") as caught:
        run(case, LINEAR, output="nan")
    assert caught.value.subject == "candidate-1"
    events = read_events(case.root / "nan" / "events.jsonl")
    assert events[-1]["event"] == "run_failed"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([LINEAR], True),
        ([LINEAR, "runtime.layer_shards=auto"], True),
        (["method.operator=ties", "runtime.device=cpu"], True),
        ([], True),
        (["method.operator=aim"], True),
        (["runtime.layer_shards=auto"], True),
        (["runtime.layer_shards=auto", "schedule.max_iterations=4000"], False),
        (["schedule.max_iterations=4000"], True),
        (["runtime.layer_shards=2"], False),
        ([LINEAR, "runtime.layer_shards=2"], False),
        ([LINEAR, "runtime.memory_gb=4.0"], False),
        ([LINEAR, "runtime.niceness=4"], False),
        ([LINEAR, "runtime.storage=per_node"], False),
        ([LINEAR, "runtime.resources={merger: 1.0}"], False),
        ([LINEAR, "runtime.device=cuda"], False),
        ([LINEAR, "evaluation={tasks: [gsm8k]}"], False),
    ],
)
def test_what_asks_for_actors_gets_them(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: bool
) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda address: address is not None)
    case.make()
    inputs = open_inputs(case.config())
    config = case.config(*overrides)
    method = open_method(config.method, 2)
    assert needs_no_ray(config, method, inputs, None) is expected
    assert not needs_no_ray(config, method, inputs, "ray://host")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = expected and "runtime.device=cpu" in overrides
    assert needs_no_ray(config, method, inputs, None) is on_gpu


class Broken:
    """What a call may raise."""

    def fail(self, error: Exception) -> None:
        raise error

    def take(self, _: None) -> None:
        """Given what another call returns."""


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (CorruptCheckpointError("damaged"), CorruptCheckpointError, "damaged"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
        (OSError(5, "Input/output error"), WorkerError, "cannot read or write a file"),
        (ValueError("odd"), WorkerError, "ValueError: odd"),
    ],
)
def test_a_call_in_this_process_raises_what_an_actor_s_would(
    error: Exception, raised: type[Exception], text: str
) -> None:
    handle = LocalHandle[Broken](Broken())
    ref = handle.call(Broken.fail, error)
    after = handle.call(Broken.take, in_place_of(ref))
    for callee in (SHARD, NODE_FILES):
        for each in (ref, after):
            with pytest.raises(raised, match=text):
                get_results([each], callee)
    handle.end()


class Slow:
    """Calls that wait for others."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.may_go_on = threading.Event()

    def wait(self, name: str) -> str:
        self.may_go_on.wait()
        self.seen.append(name)
        return name

    def let_go(self) -> None:
        self.may_go_on.set()


def test_calls_in_this_process_are_made_in_order_beside_those_of_another_group() -> None:
    slow = Slow()
    handle = LocalHandle[Slow](slow)
    refs = [handle.call(Slow.wait, name) for name in "abc"]
    assert wait_for(refs, 0.0) == ([], refs)
    get_results([handle.call_with({"concurrency_group": "control"}, Slow.let_go)])
    done, pending = wait_for(refs)
    assert done
    assert done + pending == refs
    assert wait_for(refs, all_of_them=True) == (refs, [])
    assert get_results(refs) == ["a", "b", "c"] == slow.seen
    assert wait_for([]) == ([], [])
    handle.end()


def test_an_error_ends_what_waits_for_the_driver_s_word(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    case.make()

    def fail(*_: object) -> None:
        # By now the merges of the next iterations wait to hear of this one.
        raise CorruptCheckpointError("damaged")

    monkeypatch.setattr(Publisher, "finished", fail)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        run(case, "schedule.tolerance=0.9", "keep_states=none", "runtime.lookahead=2")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("calls")]
    assert left == []


def test_the_command_starts_no_ray(case: MergeCase, tmp_path: Path) -> None:
    case.make()
    content = {**case.content(), "method": {"operator": "task_arithmetic"}}
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(content))
    program = (
        "import sys, ray\n"
        "def init(*_, **__): raise AssertionError('Ray is started')\n"
        "ray.init = init\n"
        "from arm_ray.cli import main\n"
        "sys.exit(main(['merge', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (case.root / "run" / "model" / SINGLE_NAME).is_file()

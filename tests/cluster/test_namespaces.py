"""A merge on three hosts with addresses and disks of their own, and with a wire that is pulled."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.config import EvaluateConfig, parse_merge_config, validate
from arm_ray.events import read_events
from arm_ray.planning.cluster import make_cluster
from arm_ray.planning.plan import make_plan
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.scoring.evaluate import evaluate
from arm_ray.schedule import state_name
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED, WORDS
from tests.cluster.namespaces import COUNT, Hosts, three_hosts, why_not

pytestmark = pytest.mark.minutes
WIDE = {"hidden_size": 256, "intermediate_size": 256}
TOKENS = 128


class Merges:
    """One merge of which the hosts make copies."""

    def __init__(self, root: Path, hosts: Hosts) -> None:
        self.hosts, self.common = hosts, root / "common"
        self.common.mkdir()
        # The first host has the checkpoints, and the driver; what is in `common` all of them see.
        self.case = MergeCase(self.common).make(num_layers=3, sizes=WIDE)
        rows = [{"text": " ".join([f"row {i}", *WORDS * 12])} for i in range(64)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.common / "calibration.jsonl").write_text(lines)
        shutil.copytree(self.common, hosts.roots[0] / "case")

    def content(self, root: Path, output: str, **runtime: Any) -> dict[str, Any]:
        content = self.case.content(output)
        text = json.dumps(content).replace(str(self.common), str(root))
        content = json.loads(text)
        content["calibration"] |= {"batch_size": 64, "max_length": TOKENS}
        content["runtime"] = {"micro_batch_tokens": 2048, "layer_shards": COUNT, **runtime}
        content["schedule"] |= {"anchor_iterations": 2, "max_iterations": 4, "tolerance": 0.0}
        return content

    def start(self, content: dict[str, Any], *overrides: str) -> Any:
        file = self.common / f"{Path(content['output']).name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return self.hosts.merge(file, *overrides)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merges]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("hosts")
    with three_hosts(root) as hosts:
        yield Merges(root, hosts)


@pytest.fixture(scope="module")
def alone(merges: Merges, local_ray: None) -> Path:
    """The same merge on one node."""
    content = merges.content(merges.common, "alone", layer_shards=1)
    outcome = merge(parse_merge_config(content), console=Console(quiet=True))
    assert outcome.model is not None
    return outcome.model


def finished(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "events.jsonl") if e["event"] == "iteration_finished"]


def ended_well(process: Any) -> str:
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told[-4000:]
    return str(told)


def test_the_bytes_that_cross_are_those_of_the_plan(merges: Merges, alone: Path) -> None:
    content = merges.content(merges.common, "shared", storage="shared")
    content["keep_states"] = "none"
    run = Path(content["output"])
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            samples.append((time.time(), merges.hosts.crossed()))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ended_well(merges.start(content))
    finally:
        over.set()
        watcher.join()
    assert_same_bits(load_all(alone), load_all(run / "model"))
    [start] = [e["time"] for e in read_events(run / "events.jsonl") if e["event"] == "run_started"]
    done = finished(run)
    end = done[-1]["time"]
    before = max(count for at, count in samples if at <= start)
    after = min(count for at, count in samples if at >= end)
    config = parse_merge_config(content)
    plan = make_plan(config, make_cluster(config.runtime, nodes=COUNT), TOKENS)
    planned = [row.sent_bytes for row in plan.iterations]
    counted = [event["network_bytes"] for event in done]
    assert counted == pytest.approx(planned, rel=0.05)
    assert sum(counted) > 50e6
    # The rest is Ray's own: calls, heartbeats, logs.
    assert after - before == pytest.approx(sum(planned), rel=0.05)
    assert after - before >= sum(counted)
    # Weights stay where they are.
    assert [event["fetched_bytes"] for event in done] == [0] * len(done)


def test_engines_on_a_host_that_has_no_models(merges: Merges, local_ray: None) -> None:
    hosts = merges.hosts
    case = MergeCase(hosts.roots[0] / "served")
    case.root.mkdir()
    case.make("smollm2", sizes=SERVED)
    rows = [{"question": f"{i} red apples and", "answer": str(i)} for i in range(4)]
    questions = case.root / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation: dict[str, Any] = {
        "tasks": [
            {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")},
            {
                "name": "boxed",
                "type": "questions",
                "path": str(questions),
                "temperature": 0.0,
                "max_tokens": 6,
            },
        ],
        "engine": {"kv_cache_gb": 0.05, "max_model_len": 64, "dtype": "float32"},
        "resamples": 200,
    }
    on_the_last = {"resources": {"engine": 1}}
    engines = {**evaluation["engine"], **on_the_last, "replicas": 2}
    there = {"engine": engines, "grading": on_the_last}
    content = case.content("scored")
    content["evaluation"] = {**evaluation, **there, "base": True, "candidates": False}
    content["runtime"] |= {"layer_shards": 2, "scratch": str(hosts.own / "scratch")}
    as_seen = json.dumps(content).replace(str(hosts.roots[0]), str(hosts.own))
    told = ended_well(merges.start(json.loads(as_seen)))
    run = case.root / "scored"
    scored = [e for e in read_events(run / "events.jsonl") if e["event"] == "model_scored"]
    assert [event["model"] for event in scored] == ["base", *map(state_name, range(1, 5))]
    # The engine's host has none of them: each came to it once, for
    # both engines, and nothing is left there.
    weights = sum(t.num_bytes for t in open_checkpoint(case.root / "base").tensors.values())
    assert all(weights < event["fetched_bytes"] < 2 * weights for event in scored)
    assert "state-0004: " in told
    assert "copied to the node of an engine" in told
    assert not any(root.joinpath("scratch").exists() for root in hosts.roots)

    # The same numbers as where the engine has the files.
    config = {
        "models": {"base": str(case.root / "base"), "last": str(run / "model")},
        "output": str(case.root / "again"),
        "evaluation": evaluation,
    }
    again = evaluate(validate(EvaluateConfig, config, source="test"), console=Console(quiet=True))
    events = read_events(case.root / "again" / "events.jsonl")
    assert [e["fetched_bytes"] for e in events if e["event"] == "model_scored"] == [0, 0]
    table = json.loads((run / "evaluation" / "scores.json").read_text())["models"]
    for ours, theirs in (("base", "base"), ("last", "state-0004")):
        for task, found in again[ours].items():
            metrics = table[theirs]["tasks"][task]["metrics"]
            assert {n: asdict(value) for n, value in found.metrics.items()} == metrics


def test_without_common_storage_and_with_a_node_cut_off(merges: Merges, alone: Path) -> None:
    hosts = merges.hosts
    content = merges.content(hosts.own / "case", "apart", storage="auto")
    content["keep_states"] = "last"
    content["runtime"] |= {"scratch": str(hosts.own / "scratch"), "disk_mb_per_s": 3.0}
    content["schedule"]["max_iterations"] = 4
    process = merges.start(content)
    run = hosts.roots[0] / "case" / "apart"
    deadline = time.monotonic() + 200
    while not (run / "events.jsonl").exists() or not finished(run):
        assert time.monotonic() < deadline, process.communicate(timeout=5)[0][-3000:]
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    # All three have worked on their own disks, each with its own layers alone.
    own = [sorted(root.glob("scratch/*/states/0001/group-*")) for root in hosts.roots]
    assert sorted(file.name for files in own for file in files) == [
        f"group-{group:05d}.safetensors" for group in range(3)
    ]
    assert all(len(files) == 1 for files in own)
    hosts.cut_off(2)
    ended_well(process)
    assert_same_bits(load_all(alone), load_all(run / "model"))
    first = finished(run)[0]
    config = parse_merge_config(merges.content(merges.common, "sizes"))
    inputs = open_inputs(config)
    sizes = [
        sum(c.tensors[n].num_bytes for c in inputs.checkpoints.values() for n in group.tensors)
        for group in inputs.layout.groups
    ]
    # The first host has the files; the others fetched those of their layers, once.
    there = int(own[0][0].stem.removeprefix("group-"))
    assert first["fetched_bytes"] == sum(sizes) - sizes[there]
    told = [e["message"] for e in read_events(run / "events.jsonl") if e["event"] == "warning"]
    assert any("going on with a new set" in text for text in told), told
    starts = [e for e in read_events(run / "events.jsonl") if e["event"] == "run_started"]
    assert [start["num_shards"] for start in starts] == [3, 2]
    assert not any(root.joinpath("scratch").exists() for root in hosts.roots[:2])

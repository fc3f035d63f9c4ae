"""The same merge on one node and on three: the same bits, whatever joins, leaves or is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arm_ray.checkpoints import states
from arm_ray.events import read_events
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.paths import ROOT

pytestmark = pytest.mark.minutes
ITERATIONS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("three")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.three_raylets", str(path)],
        cwd=ROOT,
        env={**env, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return path


def seen(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "seen.json").read_text())
    return content


def events(root: Path, run: str, name: str) -> list[dict[str, Any]]:
    return [e for e in read_events(root / run / "events.jsonl") if e["event"] == name]


def warnings(root: Path, run: str) -> list[str]:
    told = [event["message"] for event in events(root, run, "warning")]
    return [text for text in told if "calibration rows" not in text]


@pytest.mark.parametrize("run", ["shared", "apart", "halted", "left"])
def test_the_model_has_the_same_bits(root: Path, run: str) -> None:
    assert_same_bits(load_all(root / "one" / "model"), load_all(root / run / "model"))


def test_every_state_has_the_same_bits(root: Path) -> None:
    for iteration in range(1, ITERATIONS + 1):
        one, other = (states.state_directory(root / r, iteration) for r in ("one", "shared"))
        assert_same_bits(load_all(one), load_all(other))


def test_a_linear_merge_has_the_same_bits_and_its_states_at_the_output(root: Path) -> None:
    one, apart = root / "linear-one", root / "linear-apart"
    assert_same_bits(load_all(one / "model"), load_all(apart / "model"))
    for iteration in range(1, ITERATIONS + 1):
        pair = [states.state_directory(run, iteration) for run in (one, apart)]
        assert_same_bits(load_all(pair[0]), load_all(pair[1]))


def test_hidden_states_cross_the_nodes_and_weights_do_not(root: Path) -> None:
    for run in ("shared", "apart"):
        finished = events(root, run, "iteration_finished")
        assert len(finished) == ITERATIONS
        for event in finished:
            assert len(event["busy_seconds"]) == 3
            # Three shards on three nodes: each of the two ways is between nodes.
            assert event["network_bytes"] == event["sent_bytes"] > 0
            assert event["fetched_bytes"] == 0
        busy = [
            sum(seconds) for seconds in zip(*(e["busy_seconds"] for e in finished), strict=True)
        ]
        assert all(seconds > 0.0 for seconds in busy)
    assert not any(e["sent_bytes"] for e in events(root, "one", "iteration_finished"))


def test_weights_kept_on_the_nodes_go_when_the_run_is_over(root: Path) -> None:
    assert seen(root)["left by complete runs"] == []
    assert not (root / "apart" / "states").exists()
    left = seen(root)["left by a halted run"]
    # Three nodes, two layer groups each, of the last two states, which the window reads.
    assert len({path.split("/")[0] for path in left}) == 3
    assert sorted(path.rsplit("/", 2)[1] + path.rsplit("/", 1)[1] for path in left) == sorted(
        f"{iteration:04d}group-{group:05d}.safetensors"
        for iteration in (1, 2)
        for group in range(6)
    )


def test_a_node_that_leaves_costs_its_work_only(root: Path) -> None:
    # Who is told first: the driver, of the shard, or another shard, of its transfer.
    [told] = [text for text in warnings(root, "left") if "going on with a new set" in text]
    assert "(1 of 3)" in told
    starts = events(root, "left", "run_started")
    assert [start["num_shards"] for start in starts] == [3, 2]
    finished = [event["iteration"] for event in events(root, "left", "iteration_finished")]
    assert finished[-1] == ITERATIONS


def test_a_node_that_joins_is_used_from_the_next_iteration(root: Path) -> None:
    starts = events(root, "joined", "run_started")
    assert [start["num_shards"] for start in starts] == [2, 3]
    assert starts[1]["first_iteration"] > 1
    finished = [event["iteration"] for event in events(root, "joined", "iteration_finished")]
    assert finished == list(range(1, 21))
    assert_same_bits(load_all(root / "long" / "model"), load_all(root / "joined" / "model"))
    assert not [text for text in warnings(root, "joined") if "waiting for room" not in text]


def test_merges_side_by_side_leave_nothing_behind(root: Path) -> None:
    for run in ("twin-1", "twin-2"):
        assert not [text for text in warnings(root, run) if "waiting for room" not in text]
        assert_same_bits(load_all(root / "long" / "model"), load_all(root / run / "model"))
    overlap = [
        (events(root, run, "run_started")[0]["time"], events(root, run, "run_finished")[0]["time"])
        for run in ("twin-1", "twin-2")
    ]
    assert max(start for start, _ in overlap) < min(end for _, end in overlap)
    # Ray Data's own stay.
    assert not {"LayerShard", "NodeFiles"} & set(seen(root)["actors left"])

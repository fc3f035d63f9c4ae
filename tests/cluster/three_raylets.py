"""Merges on three raylets of this machine, each with its own scratch directory.

A process of its own, because a process has one Ray: `python -m tests.cluster.three_raylets ROOT`
leaves its runs below ROOT, and what it saw in `ROOT/seen.json`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from rich.console import Console

from arm_ray.runtime.merge import controller
from arm_ray.runtime.merge.run import MergeOutcome, merge
from tests.builders.merge_case import MergeCase
from tests.builders.paths import ROOT
from tests.doubles import in_process

SLOW = "runtime.disk_mb_per_s=0.5"


class Nodes:
    """A cluster of one-CPU nodes, and merges on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.case = MergeCase(root).make(num_layers=6, rows=48)
        self.seen: dict[str, Any] = {}
        self._made = 0
        settings: dict[str, Any] = self._settings()
        self.cluster = Cluster(initialize_head=True, head_node_args=settings)
        ray.init(
            address=self.cluster.address,
            namespace="arm_ray",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    def _settings(self) -> dict[str, Any]:
        own = self.root / f"node{self._made}"
        own.mkdir()
        self._made += 1
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {"num_cpus": 1, "env_vars": {"TMPDIR": str(own), "PYTHONPATH": paths}}

    def add(self) -> Any:
        """Have one more node join."""
        node = self.cluster.add_node(**self._settings())
        self.cluster.wait_for_nodes()
        return node

    def scratch(self) -> list[str]:
        """What runs have left in the nodes' scratch directories."""
        found = self.root.glob("node*/arm_ray-*/**/*.safetensors")
        return sorted(str(path.relative_to(self.root)) for path in found)

    def run(self, output: str, *overrides: str, **options: Any) -> MergeOutcome:
        """Merge into a directory below the root."""
        config = self.case.config("runtime.placement_timeout_s=90", *overrides, output=output)
        return merge(config, console=Console(quiet=True), **options)

    def compute(self, output: str, *overrides: str) -> None:
        """Merge without actors, to compare with."""
        placed = controller.placed_shards
        controller.placed_shards = in_process.placed_shards
        try:
            self.run(output, *overrides)
        finally:
            controller.placed_shards = placed

    def run_and(self, output: str, do: Callable[[], Any], *overrides: str) -> None:
        """Merge, and do something once the first iteration is finished."""
        merging = threading.Thread(target=self.run, args=(output, *overrides))
        merging.start()
        events = self.root / output / "events.jsonl"
        while not events.exists() or "iteration_finished" not in events.read_text():
            time.sleep(0.02)
        # Here, because Ray starts nodes in a main thread only.
        do()
        merging.join()


def main() -> None:
    nodes = Nodes(Path(sys.argv[1]))
    try:
        nodes.run("one")
        nodes.compute("linear-one", "method.operator=task_arithmetic")
        nodes.add()
        last = nodes.add()
        three = "runtime.layer_shards=3"
        nodes.run("shared", three, "runtime.storage=shared")
        apart = (three, "runtime.storage=per_node")
        nodes.run("apart", *apart, "keep_states=none")
        nodes.run("linear-apart", *apart, "method.operator=task_arithmetic")
        nodes.seen["left by complete runs"] = nodes.scratch()
        nodes.run("halted", *apart, "keep_states=last", stop_after=2)
        nodes.seen["left by a halted run"] = nodes.scratch()
        nodes.run(
            "halted", "runtime.layer_shards=2", "runtime.storage=per_node", "keep_states=last"
        )

        def leave() -> None:
            nodes.cluster.remove_node(last, allow_graceful=False)

        nodes.run_and("left", leave, *apart, SLOW, "keep_states=last")
        steps = "{anchor_iterations: 2, max_iterations: 20, tolerance: 0, step: fixed}"
        long = (f"schedule={steps}", "keep_states=last")
        nodes.compute("long", *long, "runtime.layer_shards=1")
        joined = (*long, "runtime.layer_shards=auto", "runtime.storage=shared", SLOW)
        nodes.run_and("joined", nodes.add, *joined)
        both = [
            threading.Thread(target=nodes.run, args=(name, *long, "runtime.layer_shards=1", SLOW))
            for name in ("twin-1", "twin-2")
        ]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        alive = list_actors(filters=[("state", "=", "ALIVE")])
        nodes.seen["actors left"] = sorted({actor["class_name"] for actor in alive})
    finally:
        (nodes.root / "seen.json").write_text(json.dumps(nodes.seen))
        ray.shutdown()
        nodes.cluster.shutdown()


if __name__ == "__main__":
    main()

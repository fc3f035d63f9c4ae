"""A cluster of raylets in a process of its own: `python -m tests.chaos.nodes DIRECTORY`.

It prints the address, and then does what it is told on standard input, a line each: `add` has one
more node join. It ends, and its cluster with it, when its input does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.builders.paths import ROOT

# What lines begin with that are ours: libraries may write lines of their own.
SAYS = "nodes: "
# So that a lost node is noticed within seconds, where Ray takes half a minute by default.
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


class Nodes:
    """The cluster: a head of two CPUs, and nodes of two.

    Args:
        root: Each node has a scratch directory of its own below it.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, 0
        head = {**self._settings(), "include_dashboard": False, "_system_config": SYSTEM}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def _settings(self) -> dict[str, Any]:
        own = self._root / f"node{self._made}"
        own.mkdir(parents=True)
        self._made += 1
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {"num_cpus": 2, "env_vars": {"TMPDIR": str(own), "PYTHONPATH": paths}}

    def add(self) -> None:
        """Have one more node join."""
        self.cluster.add_node(**self._settings())


def main() -> None:
    nodes = Nodes(Path(sys.argv[1]))
    print(SAYS + nodes.cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.add()
            print(f"{SAYS}added", flush=True)
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main()

"""Run by test_placement.py in a process of its own: a cluster of two nodes with four declared GPUs.

Ray takes the GPUs at their word, so that placement is exercised; the computation is on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from rich.console import Console

from arm_ray.config import parse_merge_config
from arm_ray.errors import PlacementError
from arm_ray.runtime.cluster.nodes import view_of_cluster
from arm_ray.runtime.merge import run as merging
from arm_ray.runtime.shards import placement


def main() -> None:
    content = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=5, num_gpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, object] = {}
    seen: list[list[int]] = []
    original = placement._start

    def spy(*arguments: object) -> object:
        actors = original(*arguments)  # type: ignore[arg-type]
        nodes: Counter[str] = Counter()
        for group in placement_group_table().values():
            if group["state"] == "CREATED":
                nodes.update(group["bundles_to_node_id"].values())
        seen.append(sorted(nodes.values()))
        return actors

    placement._start = spy  # type: ignore[assignment]
    quiet = Console(quiet=True)
    try:
        config = parse_merge_config(content, ["runtime.layer_shards=8", "runtime.gpus_per_shard=1"])
        found["model"] = str(merging.merge(config, console=quiet).model)
        found["nodes"] = seen[-1]
        left = [
            group["state"]
            for group in placement_group_table().values()
            if group["state"] != "REMOVED"
        ]
        found["left"] = left
        fractional = parse_merge_config(
            content,
            ["runtime.gpus_per_shard=0.5", "runtime.layer_shards=auto"],
        )
        plan = placement.plan_placement(view_of_cluster(), fractional.runtime, 16)
        found["shards of half a GPU"] = plan.num_shards
        too_many = parse_merge_config(
            content,
            [
                f"output={content['output']}-many",
                "runtime.layer_shards=8",
                "runtime.gpus_per_shard=2",
                "runtime.placement_timeout_s=3",
            ],
        )
        try:
            merging.merge(too_many, console=quiet)
        except PlacementError as error:
            found["error"] = str(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

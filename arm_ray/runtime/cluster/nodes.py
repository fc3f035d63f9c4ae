"""The nodes of a cluster and what they have, as Ray says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arm_ray.lazy import ray_is_joined
from arm_ray.runtime.session.lazy_ray import ray


@dataclass(frozen=True)
class ClusterView:
    """What a cluster has at one moment.

    Attributes:
        nodes: Ids of the nodes that are alive.
        total: Resource -> amount in all.
        free: Resource -> amount that nobody has taken.
    """

    nodes: frozenset[str]
    total: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        return (
            f"free: {format_resources(self.free)}; in all: {format_resources(self.total)} "
            f"on {len(self.nodes)} node(s)"
        )


# Where no cluster is joined.
THIS_PROCESS = ClusterView(frozenset(), {}, {})


def view_of_cluster() -> ClusterView:
    """The cluster that this process has joined, as it is now."""
    return ClusterView(alive_nodes(), ray.cluster_resources(), ray.available_resources())


def alive_nodes() -> frozenset[str]:
    """Ids of the cluster's nodes."""
    return frozenset(str(node["NodeID"]) for node in ray.nodes() if node["Alive"])


def this_node() -> str:
    """Ray's id of the node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def node_names(ids: Sequence[str]) -> list[str]:
    """Addresses and host names of nodes, by Ray's ids."""
    known = {node["NodeID"]: node for node in ray.nodes()} if ray_is_joined() else {}
    return [
        f"{known[i]['NodeManagerHostname']} ({known[i]['NodeManagerAddress']})" if i in known else i
        for i in ids
    ]


def format_resources(resources: Mapping[str, float]) -> str:
    """Resources in words; those that Ray makes up itself are left out."""
    own = ("memory", "object_store_memory", "node:", "accelerator_type:", "bundle_")
    shown = [
        f"{value:g} {key}"
        for key, value in resources.items()
        if not key.startswith(own) and "_group_" not in key
    ]
    return ", ".join(sorted(shown)) or "nothing"

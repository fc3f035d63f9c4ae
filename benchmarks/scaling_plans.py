"""The tables of docs/scaling.md: what merges of large models are planned to need.

`python -m benchmarks.scaling_plans TABLE ...` prints tables by name, all without one. It plans and
simulates; it reads no weights and starts nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache

from arm_ray.config import MergeConfig, load_merge_config
from arm_ray.planning.cluster import make_cluster, place
from arm_ray.planning.estimate import choose_partition
from arm_ray.planning.memory import Peak
from arm_ray.planning.plan import Plan, ShardFacts, make_plan
from arm_ray.planning.simulator import Simulation, simulate
from arm_ray.planning.sources import open_workload
from arm_ray.planning.state_life import state_life
from arm_ray.planning.timing import Clock
from arm_ray.planning.workload import group_work, state_uses

LARGE = ("qwen2.5-14b", "qwen2.5-72b", "llama-3.1-405b")
PLACES = ("device", "host", "disk")
GPUS = (8, 16, 32)
GB = 1e9


def config(model: str, *overrides: str) -> MergeConfig:
    """An example plan's configuration."""
    return load_merge_config(f"examples/plans/{model}.yaml", overrides)


@cache
def plan(model: str, gpus: int, *overrides: str, device: str = "h100-80gb") -> Plan:
    """The plan of an example on nodes of 8 GPUs."""
    found = config(model, *overrides)
    cluster = make_cluster(found.runtime, gpus=gpus, nodes=-(-gpus // 8), device=device)
    return make_plan(found, cluster)


def on_gpu(shard: ShardFacts) -> Peak:
    """The peak of a shard's GPU memory."""
    assert shard.memory.gpu is not None
    return shard.memory.gpu


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")


def bubbles(model: str, shards: int, *overrides: str) -> Simulation:
    """The schedule with a disk that takes no time."""
    found = config(model, *overrides)
    cluster = make_cluster(found.runtime, gpus=shards, device="h100-80gb")
    device = replace(cluster.device, disk_read=1e30, disk_write=1e30)
    workload, _ = open_workload(found)
    nodes = -(-shards // 8)
    partition = choose_partition(workload, found, cluster, shards, nodes)
    placement = place(workload, found.runtime, cluster, shards, nodes, partition)
    clock = Clock(workload, found.runtime, device, placement, 1.0)
    life = state_life(found, workload.num_candidates, None)
    times = clock.iterations(state_uses(workload), life)
    return simulate(times, found.runtime.lookahead)


def sizes() -> None:
    """Parameters and bytes of the models and their parts."""
    for model in LARGE:
        w, _ = open_workload(config(model))
        first, middle = w.layout.groups[0], w.layout.groups[1]
        count = {g.first_layer: sum(map(w.elements, g.tensors)) for g in (first, middle)}
        largest = max((n for n in middle.tensors), key=w.elements)
        row(
            model,
            w.parameters / GB,
            w.layout.num_layers,
            count[1] / GB,
            (count[0] - count[1]) / GB,
            count[0] / GB,
            w.elements(largest) * 4 / GB,
            2 * w.parameters / GB,
            4 * w.parameters / GB,
            w.hidden_bytes / 1e6,
            w.micro_batches * 3 * w.hidden_bytes / GB,
        )


def memory() -> None:
    """Peak memory by residency and number of GPUs."""
    for model in LARGE:
        for residency in PLACES:
            for gpus in GPUS:
                p = plan(model, gpus, f"runtime.residency={residency}")
                s = max(p.shards, key=lambda s: s.memory.limiting.total)
                row(
                    model,
                    residency,
                    gpus,
                    on_gpu(s).total / GB,
                    on_gpu(s).when,
                    max(s.memory.host.total for s in p.shards) / GB,
                    p.host_bytes_per_node / GB,
                    "yes" if p.fits else "no",
                )


def terms() -> None:
    """What the peak of the largest actor consists of."""
    for model, residency, gpus in (
        ("qwen2.5-14b", "device", 8),
        ("qwen2.5-72b", "device", 32),
        ("qwen2.5-72b", "host", 8),
        ("llama-3.1-405b", "device", 32),
        ("llama-3.1-405b", "host", 32),
        ("llama-3.1-405b", "disk", 32),
    ):
        p = plan(model, gpus, f"runtime.residency={residency}")
        s = max(p.shards, key=lambda s: s.memory.limiting.total)
        for peak in (on_gpu(s), s.memory.host):
            print(
                model,
                residency,
                gpus,
                "shard",
                s.index,
                peak.when,
                f"{peak.total / GB:.1f}",
                {k: round(v / GB, 2) for k, v in peak.terms.items()},
            )


def limits() -> None:
    """The largest actor beside what it has to fit in."""
    """What is largest in a group of 405B, and what relieves it."""
    for gpus, *o in (
        (126,),
        (32, "runtime.residency=host"),
        (32, "runtime.residency=host", "runtime.transport=object_store"),
        (32, "runtime.residency=host", "calibration.max_length=4096"),
        (32, "runtime.residency=host", "calibration.batch_size=16"),
    ):
        p = plan("llama-3.1-405b", gpus, *o)
        for s in (p.shards[0], p.shards[1]):
            peak = on_gpu(s)
            print(
                gpus,
                *o,
                "shard",
                s.index,
                peak.when,
                f"{peak.total / GB:.1f}",
                {k: round(v / GB, 1) for k, v in peak.terms.items()},
            )
    for gpus, device, *o in ((64, "h200"), (126, "h100-80gb", "runtime.residency=host")):
        p = plan("llama-3.1-405b", gpus, *o, device=device)
        row(
            gpus,
            device,
            *o,
            p.fits,
            f"{p.simulation.makespan_s:.0f}",
            f"{p.total_s:.0f}",
            f"{100 * p.simulation.efficiency:.0f} %",
            f"{gpus * p.total_s / 3600:.1f}",
        )


def smallest() -> None:
    """The smallest cluster that fits."""
    for model in LARGE:
        for device in ("h100-80gb", "h200"):
            for fit in plan(model, 32, device=device).smallest:
                row(
                    model,
                    device,
                    fit.residency,
                    fit.shards or "none",
                    fit.gpus,
                    fit.nodes,
                    fit.shard_bytes / GB,
                    fit.host_bytes_per_node / GB,
                )


def traffic() -> None:
    """Bytes read, written and sent in an iteration."""
    for model in LARGE:
        for gpus in GPUS:
            p, d = plan(model, gpus), plan(model, gpus, "runtime.residency=disk")
            a, b = p.iterations[0], p.iterations[3]
            row(
                model,
                gpus,
                a.read_bytes / GB,
                d.iterations[1].read_bytes / GB,
                a.written_bytes / GB,
                a.sent_bytes / GB,
                b.sent_bytes / GB,
                a.sent_bytes / GB / (gpus - 1),
                b.sent_bytes / GB / (gpus - 1),
            )


def work() -> None:
    """Floating-point operations of an iteration."""
    for model in LARGE:
        p = plan(model, 8)
        for i in (0, 3):
            x = p.iterations[i]
            row(
                model,
                x.regime,
                *(
                    f"{v:.2e}"
                    for v in (x.forward_flops, x.capture_flops, x.rotation_flops, x.merge_flops)
                ),
            )
        w, _ = open_workload(config(model))
        g = group_work(w, 1, 3)
        row(model, "one layer", f"{g.factor_flops:.2e}", f"{g.apply_flops:.2e}", g.factorisations)


def time() -> None:
    """Seconds of an iteration and of all, and GPU-hours."""
    for model in LARGE:
        for residency in PLACES:
            for gpus in GPUS:
                p = plan(model, gpus, f"runtime.residency={residency}")
                t = [x.seconds for x in p.iterations]
                if p.fits:
                    row(
                        model,
                        residency,
                        gpus,
                        *(
                            f"{x:.0f}"
                            for x in (
                                p.check_s,
                                t[0],
                                t[1],
                                t[3],
                                p.simulation.makespan_s,
                                p.export_s,
                                p.total_s,
                            )
                        ),
                        f"{100 * p.simulation.efficiency:.0f} %",
                        f"{gpus * p.total_s / 3600:.2f}",
                        f"{3 * gpus * p.total_s / 3600:.2f}",
                    )


def pipeline() -> None:
    """Efficiency of the pipeline alone."""
    for model in LARGE:
        last = {"qwen2.5-14b": 48, "qwen2.5-72b": 80, "llama-3.1-405b": 126}[model]
        for residency in PLACES[:2]:
            for shards in (8, 16, 32, last):
                cells = []
                for tokens in (1024, 2048, 8192):
                    for ahead in (0, 2, 8):
                        s = bubbles(
                            model,
                            shards,
                            f"runtime.residency={residency}",
                            f"runtime.micro_batch_tokens={tokens}",
                            f"runtime.lookahead={ahead}",
                        )
                        cells.append(f"{100 * s.efficiency:.0f}")
                s = bubbles(model, shards, f"runtime.residency={residency}")
                row(model, residency, shards, *cells, f"{s.makespan_s:.1f}", max(s.most_waiting))


def disk() -> None:
    """Room for states, and the bandwidth that writing them takes."""
    for model in LARGE:
        for keep in ("all", "last", "none"):
            d = plan(model, 8, f"keep_states={keep}").disk
            row(model, keep, d.most_states, d.kept_states, d.needed_bytes / 1e12)
        for gpus in GPUS:
            s = bubbles(model, gpus)
            t = s.finished_s
            written = plan(model, 8, "keep_states=all").iterations[0].written_bytes
            row(
                model,
                gpus,
                t[2] - t[1],
                written / (t[2] - t[1]) / GB,
                written / (t[2] - t[1]) / GB / (gpus / 8),
                t[5],
            )


def messages() -> None:
    """Calls and hidden states in an iteration."""
    for model in LARGE:
        for residency in PLACES[:2]:
            for gpus in GPUS:
                w, _ = open_workload(config(model))
                groups, calls = len(w.layout.groups), 3 * w.micro_batches
                chunks = gpus if residency == "device" else groups
                row(
                    model,
                    residency,
                    gpus,
                    calls * chunks,
                    groups,
                    calls * (gpus - 1),
                    3 * (calls * chunks + groups),
                    w.hidden_bytes / 1e6,
                )


def measured() -> None:
    """Predictions beside what was measured on CPUs."""

    def cpu(model: str, tokens: int, *overrides: str) -> Plan:
        found = config(model, *overrides)
        return make_plan(found, make_cluster(found.runtime, device="cpu"), tokens)

    p = cpu("qwen2.5-3b", 50)
    memory, i = p.shards[0].memory, p.iterations[0]
    row("memory", memory.host.total / GB, memory.page_cache / GB, i.seconds, i.forward_s)
    for shards, threads in ((1, 2), (1, 1), (2, 1)):
        p = cpu("smollm2-135m", 50, f"runtime.threads={threads}", f"runtime.layer_shards={shards}")
        i = p.iterations[0]
        row(
            "smollm2",
            shards,
            threads,
            p.simulation.makespan_s,
            i.seconds,
            i.forward_s,
            i.merge_s + i.write_s,
        )
    found = config("qwen2.5-14b", "runtime.threads=2")
    w, _ = open_workload(found, 128)
    cluster = make_cluster(found.runtime, device="cpu")
    clock = Clock(w, found.runtime, cluster.device, place(w, found.runtime, cluster, 1, 1), 1.0)
    g = clock.group(state_uses(w)[0], 1)
    row("layer14b", 3 * w.micro_batches * g.forward_call, g.rotation, g.elementwise, g.write)


TABLES = (
    sizes, memory, terms, limits, smallest, traffic, work, time, pipeline, disk, messages, measured,
)  # fmt: skip


def main() -> None:
    """Print the tables of the command line."""
    for table in TABLES:
        if table.__name__ in sys.argv[1:] or len(sys.argv) == 1:
            print(table.__name__)
            table()


if __name__ == "__main__":
    main()

"""A plan as text."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from arm_ray.merging.settings import EVERYWHERE
from arm_ray.planning.cluster import runs_text
from arm_ray.planning.memory import Peak
from arm_ray.planning.plan import Plan

_WIDTH = 110


def render(plan: Plan) -> str:
    """Tables and sentences, 110 columns wide, without colours."""
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, highlight=False, markup=False)
    for text in _head(plan):
        console.print(text)
    for table in (_memory(plan), _iterations(plan), _work(plan), _shards(plan), _cluster(plan)):
        console.print()
        console.print(table)
    console.print(_scaling(plan))
    console.print()
    for line in _verdict(plan):
        console.print(line)
    lines = stream.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(plan: Plan) -> list[str]:
    model = plan.model
    shards = len(plan.shards)
    forward = (
        f"Calibration    {model.samples} samples of {model.tokens_per_sample} tokens an iteration, "
        f"{model.micro_batches} micro-batch(es) for each state, {model.compute_dtype}"
    )
    return [
        f"Model          {model.family}, {_count(model.parameters)} parameters in {model.tensors} "
        f"tensors; {model.rotated_tensors} are rotated "
        f"({_count(model.rotated_parameters) if model.rotated_tensors else 0})",
        f"Layers         {model.layers} in {model.layer_groups} group(s) on {shards} shard(s), "
        f"{plan.partition}",
        f"Checkpoints    base {_size(model.base_bytes)}, {len(model.candidate_bytes)} candidate(s) "
        f"{_size(sum(model.candidate_bytes))}; a merged state {_size(model.state_bytes)} (float32)",
        forward if model.samples else "Calibration    none: the operator needs no activations",
        f"Where          {plan.device}, {_size(plan.memory_bytes)} "
        f"{'for each shard' if plan.shards[0].memory.gpu else 'on each node'}, "
        f"{plan.nodes} node(s), residency {plan.residency}",
        f"Disk           {_size(plan.disk.needed_bytes)} at most: {plan.disk.most_states} state(s) "
        f"and the model of {_size(plan.disk.model_bytes)}; {plan.disk.kept_states} state(s) stay",
        *(
            f"By part        {fact.key} {_from_to(fact.first, fact.last)} in {fact.tensors} "
            f"tensor(s): {'all others' if fact.part == EVERYWHERE else fact.part}"
            for fact in model.by_part
        ),
    ]


def _from_to(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:g} (first layer) to {last:g} (last)"


def _memory(plan: Plan) -> Table:
    """The terms of the shard that needs most."""
    worst = max(plan.shards, key=lambda s: s.memory.limiting.total)
    title = f"Memory of the largest shard (shard {worst.index})"
    table = _table(title, ["term"], [])
    peaks: list[Peak] = []
    for label, peak in (("GPU", worst.memory.gpu), ("host", worst.memory.host)):
        if peak is not None:
            table.add_column(f"{label} ({peak.when})", justify="right")
            peaks.append(peak)
    for term in dict.fromkeys(term for peak in peaks for term in peak.terms):
        table.add_row(term, *(_size(p.terms[term]) if term in p.terms else "" for p in peaks))
    table.add_section()
    table.add_row("sum", *(_size(peak.total) for peak in peaks))
    if worst.memory.page_cache:
        table.add_row("memory-mapped, page cache", *[""] * (len(peaks) - 1), _mapped(plan))
    return table


def _mapped(plan: Plan) -> str:
    return _size(max(shard.memory.page_cache for shard in plan.shards))


def _iterations(plan: Plan) -> Table:
    table = _table(
        "Iterations (seconds of work are summed over the shards)",
        ["", "regime", "states"],
        ["read", "written", "sent", "forward s", "merge s", "write s", "step s", "elapsed s"],
    )
    for row in plan.iterations:
        table.add_row(
            str(row.iteration),
            row.regime,
            str(len(row.inputs)),
            _size(row.read_bytes),
            _size(row.written_bytes),
            _size(row.sent_bytes),
            _seconds(row.forward_s),
            _seconds(row.merge_s),
            _seconds(row.write_s),
            _seconds(row.step_s),
            _seconds(row.seconds + row.step_s + row.compare_s),
        )
    return table


def _work(plan: Plan) -> Table:
    table = _table(
        "Operations (FLOP)", ["", "regime"], ["forward", "capture", "rotation", "elementwise"]
    )
    for row in plan.iterations:
        numbers = (row.forward_flops, row.capture_flops, row.rotation_flops, row.merge_flops)
        table.add_row(str(row.iteration), row.regime, *(f"{n:.2e}" if n else "-" for n in numbers))
    return table


def _shards(plan: Plan) -> Table:
    columns = ["parameters", "GPU", "host", "page cache", "busy s", "busy %"]
    table = _table("Shards", ["", "node", "layers"], columns)
    for shard in plan.shards:
        gpu = shard.memory.gpu
        table.add_row(
            str(shard.index),
            str(shard.node),
            runs_text(shard.layers),
            _count(shard.parameters),
            _size(gpu.total) if gpu else "-",
            _size(shard.memory.host.total),
            _size(shard.memory.page_cache),
            _seconds(shard.busy_s),
            f"{100 * shard.utilisation:.0f}",
        )
    return table


def _cluster(plan: Plan) -> Table:
    columns = ["shards", "GPUs", "nodes", "largest shard", "host of a node"]
    table = _table("Smallest cluster for each residency", ["residency"], columns)
    for fit in plan.smallest:
        table.add_row(
            fit.residency,
            "does not fit" if fit.shards is None else str(fit.shards),
            str(fit.gpus) if fit.gpus else "-",
            str(fit.nodes),
            _size(fit.shard_bytes),
            _size(fit.host_bytes_per_node),
        )
    return table


def _scaling(plan: Plan) -> str:
    points = ", ".join(
        f"{point.actors}: {_seconds(point.seconds)} s ({100 * point.efficiency:.0f} %)"
        for point in plan.scaling
    )
    return (
        f"\nIterations alone on other numbers of actors, as many on a node, memory aside "
        f"(efficiency):\n  {points}"
    )


def _losses(plan: Plan) -> str:
    """Losses that steps and the model are chosen by."""
    steps = sum(row.step_s for row in plan.iterations)
    compared = sum(row.compare_s for row in plan.iterations) + plan.compare_s
    text = f" + choosing steps {_duration(steps)} at most" if steps else ""
    return text + (f" + comparing models {_duration(compared)}" if compared else "")


def _verdict(plan: Plan) -> list[str]:
    lines = [
        f"Estimated time: {_duration(plan.total_s)} = checking the checkpoints "
        f"{_duration(plan.check_s)} + iterations {_duration(plan.simulation.makespan_s)} "
        f"(efficiency {100 * plan.simulation.efficiency:.0f} %) + writing the model "
        f"{_duration(plan.export_s)}{_losses(plan)}.",
        *([f"{plan.loss[0].upper()}{plan.loss[1:]}."] if plan.loss else []),
        *(
            [f"{text}." for text in plan.measured]
            or ["Rates and efficiencies are assumptions (docs/planning.md), not measurements."]
        ),
        *(f"Assumed: {text}." for text in plan.assumptions),
        "",
    ]
    if plan.fits:
        unit = "GPU" if plan.shards[0].memory.gpu else "node"
        return [
            *lines,
            f"It fits. Host memory: {_size(plan.host_bytes_per_node)} on a node; each {unit} has "
            f"{_size(plan.memory_bytes)}.",
        ]
    return [
        *lines,
        "It does not fit:",
        *map(_bullet, plan.problems),
        "What would:",
        *map(_bullet, plan.remedies),
    ]


def _bullet(text: str) -> str:
    return textwrap.fill(f"  - {text}", _WIDTH, subsequent_indent="    ")


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _size(size: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _count(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1.0 else f"{seconds:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 100.0:
        return f"{_seconds(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

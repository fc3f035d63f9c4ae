"""The plots of what happens inside of a merge: angles, modules, spectra, and who worked when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arm_ray.report.page.charts import TOP, Chart, chart_of
from arm_ray.report.run_facts import Iteration, Work, number, numbers

_KINDS = ("forward", "merge", "score", "stage")
# Most spans of a plot: a page has to open at once.
_MOST_SPANS = 3000
# Iterations that a reader can choose from.
_MOST_ITERATIONS = 12


def angles_chart(name: str, iterations: Sequence[Iteration]) -> Chart:
    """The angle of consecutive states, and of their task vectors, by iteration."""
    rows = []
    for iteration in iterations:
        for field_name, label in (
            ("weight_cosine", "weights"),
            ("task_vector_cosine", "task vectors"),
        ):
            angle, cosine = iteration.angle(field_name), number(iteration.event.get(field_name))
            if angle is not None:
                rows.append(
                    {
                        "iteration": iteration.number,
                        "angle": float(f"{angle:.5g}"),
                        "cosine": cosine,
                        "of": label,
                    }
                )
    return chart_of(
        name,
        "Angle between a state and the one before, degrees",
        f"Angles between consecutive states over {len(iterations)} iterations.",
        {
            "height": 200,
            "data": {"values": rows},
            "mark": {"type": "line", "point": {"filled": True, "size": 50}, "strokeWidth": 2},
            "encoding": {
                "x": {
                    "field": "iteration",
                    "type": "quantitative",
                    "axis": {"tickMinStep": 1, "format": "d"},
                    "scale": {"nice": False, "padding": 24, "zero": False},
                },
                "y": {
                    "field": "angle",
                    "type": "quantitative",
                    "title": "degrees (log scale)",
                    "scale": {"type": "symlog", "constant": 0.1},
                },
                "color": {
                    "field": "of",
                    "type": "nominal",
                    "scale": {
                        "domain": ["weights", "task vectors"],
                        "range": ["$merged", "$checkpoint"],
                    },
                    "legend": TOP,
                },
                "tooltip": [
                    {"field": "of"},
                    {"field": "iteration"},
                    {"field": "angle", "format": ".4f"},
                    {"field": "cosine", "format": ".7f"},
                ],
            },
        },
        "Weights: arccos of cos(W_t, W_t−1). Task vectors: of cos(W_t − W_base, W_t−1 − W_base).",
    )


def heat_chart(
    name: str, title: str, key: str, unit: str, iterations: Sequence[Iteration], log: bool
) -> Chart | None:
    """A value of each module and layer, with a choice of the iteration."""
    rows: list[dict[str, Any]] = []
    modules: dict[str, None] = {}
    for iteration in _spread(iterations):
        for module in iteration.modules:
            value = number(module.get(key))
            if value is None or not isinstance(module.get("layer"), int):
                continue
            modules[str(module.get("module"))] = None
            rows.append(
                {
                    "t": iteration.number,
                    "layer": module["layer"],
                    "module": str(module.get("module")),
                    "value": value,
                }
            )
    if not rows:
        return None
    numbers_of = sorted({row["t"] for row in rows})
    scale: dict[str, Any] = {"range": ["$low", "$middle", "$high"]}
    if log and all(row["value"] > 0 for row in rows):
        scale["type"] = "log"
    else:
        scale["zero"] = False
    spec: dict[str, Any] = {
        "height": 20 * len(modules),
        "data": {"values": rows},
        "transform": [{"filter": "datum.t == chosen"}],
        "params": [_choice("chosen", "iteration", numbers_of)],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "layer",
                "type": "ordinal",
                "axis": {"labelAngle": 0, "labelOverlap": True, "title": "layer"},
            },
            "y": {
                "field": "module",
                "type": "nominal",
                "sort": list(modules),
                "title": None,
            },
            "color": {
                "field": "value",
                "type": "quantitative",
                "scale": scale,
                "legend": {"title": unit, "orient": "top", "gradientLength": 180},
            },
            "tooltip": [
                {"field": "module"},
                {"field": "layer"},
                {"field": "value", "format": ".4~g", "title": unit},
            ],
        },
        "config": {"scale": {"bandPaddingInner": 0.06}},
    }
    return chart_of(
        name, title, f"{title} of {len(modules)} modules, by layer and iteration.", spec
    )


def _spread(iterations: Sequence[Iteration]) -> Sequence[Iteration]:
    """The first, the last, and some between them."""
    if len(iterations) <= _MOST_ITERATIONS:
        return iterations
    step = (len(iterations) - 1) / (_MOST_ITERATIONS - 1)
    return [iterations[round(i * step)] for i in range(_MOST_ITERATIONS)]


def _choice(name: str, label: str, values: Sequence[Any]) -> Mapping[str, Any]:
    """A value that the reader chooses; nothing to choose where there is one."""
    chosen: dict[str, Any] = {"name": name, "value": values[-1]}
    if len(values) > 1:
        chosen["bind"] = {"input": "select", "options": list(values), "name": f"{label} "}
    return chosen


def spectrum_chart(name: str, iterations: Sequence[Iteration]) -> Chart | None:
    """Singular values of the activation shifts, a line for each layer."""
    with_spectra = [t for t in iterations if any(m.get("spectrum") for m in t.modules)]
    if not with_spectra:
        return None
    # One iteration's lines are many; the last one is what became of them.
    last = with_spectra[-1]
    rows: list[dict[str, Any]] = []
    modules: dict[str, None] = {}
    for module in last.modules:
        values, layer = numbers(module.get("spectrum")), module.get("layer")
        if not values or not isinstance(layer, int) or values[0] <= 0.0:
            continue
        modules[str(module.get("module"))] = None
        for index, value in enumerate(values):
            if value > 0.0:
                rows.append(
                    {
                        "layer": layer,
                        "module": str(module.get("module")),
                        "at": round(index / max(1, len(values) - 1), 4),
                        "value": float(f"{value / values[0]:.3g}"),
                    }
                )
    if not rows:
        return None
    return chart_of(
        name,
        f"Singular values of the activation shifts, iteration {last.number}",
        f"Singular values relative to the largest, for {len(modules)} modules, a line a layer.",
        {
            "height": 240,
            "data": {"values": rows},
            "params": [_choice("module", "module", list(modules)[::-1])],
            "transform": [{"filter": "datum.module == module"}],
            "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.85},
            "encoding": {
                "x": {
                    "field": "at",
                    "type": "quantitative",
                    "title": "rank, largest σ (0) to smallest (1)",
                    "scale": {"domain": [0, 1]},
                    "axis": {"tickCount": 5},
                },
                "y": {
                    "field": "value",
                    "type": "quantitative",
                    "title": "σ / largest σ",
                    "scale": {"type": "log"},
                },
                "color": {
                    "field": "layer",
                    "type": "quantitative",
                    "scale": {"range": ["$checkpoint", "$merged"], "interpolate": "lab"},
                    "legend": {"orient": "top", "gradientLength": 180, "title": "layer"},
                },
                "detail": {"field": "layer"},
                "tooltip": [
                    {"field": "layer"},
                    {"field": "at"},
                    {"field": "value", "format": ".3~g"},
                ],
            },
        },
        "A spectrum that falls fast: few directions carry the shift, and so the rotation.",
    )


def timeline_chart(name: str, work: Sequence[Work]) -> Chart | None:
    """When each actor did what, in seconds since the first began."""
    if not work:
        return None
    kept = sorted(work, key=lambda w: -w.seconds)[:_MOST_SPANS]
    start = min(w.start for w in kept)
    rows = [
        {
            "actor": w.actor,
            "kind": w.kind if w.kind in _KINDS else "stage",
            "from": round(w.start - start, 3),
            "to": round(w.start - start + w.seconds, 3),
            "what": w.what,
            "seconds": round(w.seconds, 3),
        }
        for w in sorted(kept, key=lambda w: w.start)
    ]
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
    actors = list(dict.fromkeys(str(row["actor"]) for row in rows))
    return chart_of(
        name,
        "What each actor did, seconds since the beginning",
        f"A timeline of {len(actors)} actors and {len(rows)} pieces of work.",
        {
            "height": 24 * len(actors),
            "data": {"values": rows},
            "mark": {"type": "bar", "height": {"band": 0.7}},
            "encoding": {
                "x": {"field": "from", "type": "quantitative", "title": "seconds"},
                "x2": {"field": "to"},
                "y": {"field": "actor", "type": "nominal", "sort": _by_name(actors), "title": None},
                "color": {
                    "field": "kind",
                    "type": "nominal",
                    "scale": {"domain": kinds, "range": [f"${kind}" for kind in kinds]},
                    "legend": TOP,
                },
                "tooltip": [
                    {"field": "actor"},
                    {"field": "what"},
                    {"field": "kind"},
                    {"field": "seconds", "format": ".2f"},
                    {"field": "from", "format": ".2f"},
                ],
            },
        },
        "By the clock of each actor's node.",
    )


def _by_name(actors: Sequence[str]) -> list[str]:
    shards = [a for a in actors if a.startswith("shard ")]
    others = [a for a in actors if a not in shards]
    return [*sorted(shards, key=lambda a: int(a.removeprefix("shard "))), *others]

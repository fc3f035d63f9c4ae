"""The plots, as Vega-Lite specifications without colours: the page puts in those of its theme.

A text `$name` is replaced by that colour of `palette`, everywhere but in the data. Every plot says
in its description what a reader who does not see it should know, and stands above its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arm_ray.report.page.comparison import Difference
from arm_ray.report.run_facts import ROLES, Score, number

Spec = Mapping[str, Any]
_ROLE_COLOURS = {"domain": list(ROLES), "range": [f"${role}" for role in ROLES]}


@dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        id: Of its place on the page; letters, digits and `-`.
        title: What it shows, with units.
        description: The same for who does not see it.
        spec: Vega-Lite.
        note: A line below it.
    """

    id: str
    title: str
    description: str
    spec: Spec
    note: str = ""


def chart_of(
    name: str, title: str, description: str, spec: Mapping[str, Any], note: str = ""
) -> Chart:
    """A plot as wide as there is room."""
    whole = {"description": description, "width": "container", "autosize": _AUTOSIZE, **spec}
    return Chart(f"{name}-plot", title, description, whole, note)


def shown(value: float, is_loss: bool) -> float:
    """A score as it is drawn: a loss as it is, a part of 1 in %."""
    return round(value if is_loss else 100 * value, 4)


def _unit(metric: str) -> str:
    return "loss, nats per token" if metric == "loss" else f"{metric}, %"


def scores_chart(name: str, scores: Sequence[Score], chosen: str | None) -> Chart:
    """The scores of one task, with intervals; a row for each model."""
    first = scores[0]
    rows = [
        {
            "model": s.title,
            "role": s.role,
            "value": shown(s.mean, s.is_loss),
            "low": None if s.low is None else shown(s.low, s.is_loss),
            "high": None if s.high is None else shown(s.high, s.is_loss),
            "chosen": s.model == chosen,
        }
        for s in scores
    ]
    order = [row["model"] for row in rows]
    y = {"field": "model", "type": "nominal", "sort": order, "title": None}
    x = {
        "field": "value",
        "type": "quantitative",
        "title": _unit(first.metric),
        "axis": _FEW,
    }
    colour = {"field": "role", "type": "nominal", "scale": _ROLE_COLOURS, "legend": TOP}
    tooltip = [
        {"field": "model"},
        {"field": "value", "format": ".4f"},
        {"field": "low", "format": ".4f"},
        {"field": "high", "format": ".4f"},
    ]
    scale = {"zero": False, "nice": True}
    return chart_of(
        name,
        f"{first.task}: {_unit(first.metric)}",
        f"Scores of {len(rows)} models on {first.task}, with 95 % intervals.",
        {
            "height": 26 * len(rows),
            "data": {"values": rows},
            "encoding": {"y": y},
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {
                        "x": {**x, "field": "low", "scale": scale},
                        "x2": {"field": "high"},
                        "color": colour,
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "opacity": 1},
                    "encoding": {
                        "x": {**x, "scale": scale},
                        "color": colour,
                        "tooltip": tooltip,
                        "size": {"condition": {"test": "datum.chosen", "value": 130}, "value": 60},
                        "shape": {
                            "condition": {"test": "datum.chosen", "value": "diamond"},
                            "value": "circle",
                        },
                    },
                },
            ],
        },
        "Diamond: the model that is published, or the best merge.",
    )


_FEW = {"tickCount": 8, "labelOverlap": True}
_AUTOSIZE = {"type": "fit-x", "contains": "padding"}
# Of a legend above the plot.
TOP = {"orient": "top", "title": None, "direction": "horizontal"}


def differences_chart(
    name: str, found: Sequence[Difference], title: str, sign: str = "− "
) -> Chart:
    """Paired differences on one task, with intervals.

    Args:
        name: Of the chart.
        found: The differences.
        title: Of which models.
        sign: Stands before the name of each.
    """
    first = found[0].other
    rows = [
        {
            "model": f"{sign}{d.other.title}",
            "difference": shown(d.comparison.difference, first.is_loss),
            "low": shown(d.comparison.low, first.is_loss),
            "high": shown(d.comparison.high, first.is_loss),
            "verdict": "no difference" if not d.is_sure else "better" if d.gain > 0 else "worse",
        }
        for d in found
    ]
    order = [row["model"] for row in rows]
    colour = {
        "field": "verdict",
        "type": "nominal",
        "scale": {
            "domain": ["better", "no difference", "worse"],
            "range": ["$gained", "$base", "$lost"],
        },
        "legend": TOP,
    }
    unit = _unit(first.metric).replace(", %", ", percentage points")
    return chart_of(
        name,
        title,
        f"{title}: {len(rows)} paired differences, with intervals.",
        {
            "height": 26 * len(rows),
            "data": {"values": rows},
            "layer": [
                {
                    "data": {"values": [{"zero": 0}]},
                    "mark": {"type": "rule", "color": "$muted", "strokeDash": [4, 3]},
                    "encoding": {"x": {"field": "zero", "type": "quantitative"}},
                },
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {
                        "y": {
                            "field": "model",
                            "type": "nominal",
                            "sort": order,
                            "title": None,
                        },
                        "x": {"field": "low", "type": "quantitative", "title": unit, "axis": _FEW},
                        "x2": {"field": "high"},
                        "color": colour,
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                    "encoding": {
                        "y": {"field": "model", "type": "nominal", "sort": order, "title": None},
                        "x": {"field": "difference", "type": "quantitative"},
                        "color": colour,
                        "tooltip": [
                            {"field": "model"},
                            {"field": "difference", "format": "+.4f"},
                            {"field": "low", "format": "+.4f"},
                            {"field": "high", "format": "+.4f"},
                        ],
                    },
                },
            ],
        },
    )


def progress_chart(
    name: str,
    title: str,
    states: Sequence[tuple[int, Score]],
    others: Sequence[Score],
    chosen: str | None,
    x_title: str = "iteration",
) -> Chart:
    """A score by iteration (or step), with the checkpoints as lines across."""
    is_loss = states[0][1].is_loss
    rows = [
        {
            "iteration": t,
            "value": shown(s.mean, is_loss),
            "low": None if s.low is None else shown(s.low, is_loss),
            "high": None if s.high is None else shown(s.high, is_loss),
            "chosen": s.model == chosen,
        }
        for t, s in states
    ]
    near = _near(states, others)
    lines: list[dict[str, Any]] = [
        {"model": s.title, "role": s.role, "value": shown(s.mean, is_loss)} for s in near
    ]
    # Names of lines that are close to each other would cover each other: apart, to both sides.
    lines.sort(key=lambda line: line["value"])
    for index, line in enumerate(lines):
        line["side"] = index % 2
    x = {
        "field": "iteration",
        "type": "quantitative",
        "title": x_title,
        "axis": {"tickMinStep": 1, "format": "d"},
        "scale": {"nice": False, "padding": 24, "zero": False},
    }
    y = {
        "type": "quantitative",
        "title": _unit(states[0][1].metric),
        "scale": {"zero": False, "nice": True},
    }
    layers: list[Mapping[str, Any]] = []
    if lines:
        layers += [
            {
                "data": {"values": lines},
                "mark": {"type": "rule", "strokeDash": [5, 3]},
                "encoding": {
                    "y": {**y, "field": "value"},
                    "color": {
                        "field": "role",
                        "type": "nominal",
                        "scale": _ROLE_COLOURS,
                        "legend": TOP,
                    },
                    "tooltip": [{"field": "model"}, {"field": "value", "format": ".4f"}],
                },
            },
        ]
        layers += [
            {
                "data": {"values": [line for line in lines if line["side"] == side]},
                "mark": {
                    "type": "text",
                    "align": "right" if side == 0 else "left",
                    "dx": -4 if side == 0 else 4,
                    "dy": 11 if side == 0 else -6,
                    "fontSize": 11,
                },
                "encoding": {
                    "y": {**y, "field": "value"},
                    "x": {"value": "width" if side == 0 else 0},
                    "text": {"field": "model"},
                    "color": {"field": "role", "type": "nominal", "scale": _ROLE_COLOURS},
                },
            }
            for side in (0, 1)
            if any(line["side"] == side for line in lines)
        ]
    layers += [
        {
            "data": {"values": rows},
            "mark": {"type": "area", "color": "$merged", "opacity": 0.14},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "line", "color": "$merged", "strokeWidth": 2},
            "encoding": {"x": x, "y": {**y, "field": "value"}},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "point", "filled": True, "color": "$merged", "opacity": 1},
            "encoding": {
                "x": x,
                "y": {**y, "field": "value"},
                "size": {"condition": {"test": "datum.chosen", "value": 150}, "value": 50},
                "shape": {
                    "condition": {"test": "datum.chosen", "value": "diamond"},
                    "value": "circle",
                },
                "tooltip": [
                    {"field": "iteration", "title": x_title},
                    {"field": "value", "format": ".4f"},
                    {"field": "low", "format": ".4f"},
                    {"field": "high", "format": ".4f"},
                ],
            },
        },
    ]
    return chart_of(
        name,
        title,
        f"{title}: {len(rows)} merged states, and {len(lines)} checkpoints as lines across.",
        {"height": 240, "layer": layers},
        "Diamond: the chosen state. Band: its interval. Dashed: checkpoints and base."
        + "".join(
            f" {s.title} is outside, at {shown(s.mean, is_loss):g}."
            for s in others
            if s not in near
        ),
    )


def _near(states: Sequence[tuple[int, Score]], others: Sequence[Score]) -> list[Score]:
    """The models whose lines do not press what is of interest into a corner."""
    values = [s.mean for _, s in states] + [s.mean for s in others if s.role != "base"]
    low, high = min(values), max(values)
    reach = 0.6 * (high - low)
    return [s for s in others if s.role != "base" or low - reach <= s.mean <= high + reach]


def training_chart(name: str, log: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The training loss by step."""
    points = [(number(row.get("step")), number(row.get("loss"))) for row in log]
    known = [(step, loss) for step, loss in points if step is not None and loss is not None]
    if not known:
        return None
    every = -(-len(known) // 1500)
    rows = [{"step": step, "loss": loss} for step, loss in known[::every]]
    return chart_of(
        name,
        "Training loss by step, nats per token",
        f"Training loss over {len(known)} steps.",
        {
            "height": 200,
            "data": {"values": rows},
            "mark": {"type": "line", "color": "$checkpoint", "strokeWidth": 1.5},
            "encoding": {
                "x": {"field": "step", "type": "quantitative"},
                "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}},
                "tooltip": [{"field": "step"}, {"field": "loss", "format": ".4f"}],
            },
        },
    )


def arrivals_chart(
    name: str,
    merged: Sequence[tuple[int, float]],
    beside: Sequence[tuple[int, float]],
    best: int | None,
) -> Chart:
    """Of attach: what models are compared by, of the merged model and the checkpoint, by step."""
    rows = [
        {"step": step, "value": value, "of": role, "best": role == "merged" and step == best}
        for role, points in (("merged", merged), ("checkpoint", beside))
        for step, value in points
    ]
    return chart_of(
        name,
        "What models are compared by, by training step",
        f"Values of {len(merged)} merged models and the checkpoints that they were made at.",
        {
            "height": 220,
            "data": {"values": rows},
            "encoding": {
                "x": {
                    "field": "step",
                    "type": "quantitative",
                    "axis": {"tickMinStep": 1, "format": "d"},
                    "scale": {"nice": False, "padding": 24, "zero": False},
                },
                "y": {
                    "field": "value",
                    "type": "quantitative",
                    "title": "value (evaluation.select)",
                    "scale": {"zero": False},
                },
                "color": {
                    "field": "of",
                    "type": "nominal",
                    "scale": {
                        "domain": ["merged", "checkpoint"],
                        "range": ["$merged", "$checkpoint"],
                    },
                    "legend": TOP,
                },
            },
            "layer": [
                {"mark": {"type": "line", "strokeWidth": 2}},
                {
                    "mark": {"type": "point", "filled": True, "opacity": 1},
                    "encoding": {
                        "size": {"condition": {"test": "datum.best", "value": 150}, "value": 50},
                        "shape": {
                            "condition": {"test": "datum.best", "value": "diamond"},
                            "value": "circle",
                        },
                        "tooltip": [
                            {"field": "of"},
                            {"field": "step"},
                            {"field": "value", "format": ".4f"},
                        ],
                    },
                },
            ],
        },
        "Diamond: the model that `best` points to.",
    )

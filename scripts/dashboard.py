"""The Grafana dashboard and the table of docs/metrics.md, out of the table of metrics. Pure.

`python -m scripts.dashboard > cluster/grafana/arm_ray.json`, and with `table` behind it the
table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arm_ray.report.scalars import BY_NAME, METRICS, PREFIX, RAY_PREFIX, Metric

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_SCHEMA_VERSION = 41


@dataclass(frozen=True)
class Panel:
    """What stands in one panel.

    Attributes:
        title: Above it.
        unit: As Grafana calls it.
        metrics: Names without prefix.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]


ROWS: dict[str, tuple[Panel, ...]] = {
    "Merge": (
        Panel("Iteration", "none", ("iteration",)),
        Panel("Iterations completed", "none", ("iterations_total",)),
        Panel("Time of an iteration", "s", ("iteration_seconds",)),
        Panel("Work of an iteration", "s", ("forward_seconds", "merge_seconds")),
        Panel("Stage utilisation", "percentunit", ("stage_utilisation_ratio",)),
        Panel("Cosines", "none", ("weight_cosine", "task_vector_cosine")),
        Panel(
            "Bytes",
            "bytes",
            (
                "written_bytes_total",
                "sent_bytes_total",
                "network_bytes_total",
                "fetched_bytes_total",
            ),
        ),
        Panel("Peak memory of a shard", "bytes", ("shard_peak_bytes",)),
        Panel("Rank-deficient tensors", "none", ("rank_deficient_tensors",)),
        Panel("Warnings", "none", ("warnings_total",)),
    ),
    "Evaluation": (
        Panel("Scores", "none", ("score",)),
        Panel("Tokens in a second", "none", ("evaluation_tokens_per_second",)),
        Panel("Samples in a second", "none", ("evaluation_samples_per_second",)),
        Panel("Time of a model", "s", ("evaluation_seconds", "evaluation_reload_seconds")),
        Panel("Samples scored", "none", ("evaluation_samples_total",)),
        Panel("Tokens scored", "none", ("evaluation_tokens_total",)),
    ),
    "Attach": (
        Panel("Steps", "none", ("checkpoint_step", "published_step", "best_step")),
        Panel(
            "Checkpoints",
            "none",
            (
                "checkpoints_taken_total",
                "checkpoints_skipped_total",
                "arrivals_published_total",
                "arrivals_failed_total",
            ),
        ),
        Panel("Time to publication", "s", ("publication_lag_seconds", "publication_seconds")),
        Panel("What is compared", "none", ("published_value", "checkpoint_value")),
    ),
    "Training": (
        Panel("Loss", "none", ("training_loss",)),
        Panel("Reward", "none", ("training_reward", "training_reward_deviation")),
        Panel("Step", "none", ("training_step",)),
        Panel("Learning rate", "sci", ("training_learning_rate",)),
        Panel("Gradient norm", "none", ("training_gradient_norm",)),
        Panel("Divergence and entropy", "none", ("training_kl", "training_entropy")),
        Panel("Tokens of a completion", "none", ("training_completion_tokens",)),
    ),
}


def expression(metric: Metric) -> str:
    """The PromQL of a metric's panel: of all drivers of a run, the sum or the newest."""
    labels = ", ".join(("run", *metric.labels))
    # Another session of a run is another driver; its counters begin at zero.
    how = "sum" if metric.kind == "counter" else "max"
    return f'{how} by ({labels}) ({metric.prometheus_name}{{run=~"$run"}})'


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": top},
                "panels": [],
            }
        )
        top += 1
        for index, panel in enumerate(row):
            line, column = divmod(index, _COLUMNS // _WIDTH)
            position = {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": top + line * _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, position))
        top += -(-len(row) // (_COLUMNS // _WIDTH)) * _HEIGHT
    return {
        "uid": "arm-ray",
        "title": "arm_ray",
        "tags": ["ray", "arm_ray"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def table() -> str:
    """All metrics as a Markdown table."""
    lines = [
        "| in Prometheus | kind, unit | labels | in trackers | from | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        labels = ", ".join(f"`{name}`" for name in ("run", *metric.labels))
        tag = f"`{metric.tag}`" if metric.tag else "-"
        lines.append(
            f"| `{metric.prometheus_name}` | {metric.kind}, {metric.unit} | {labels} | {tag} | "
            f"{', '.join(metric.jobs)} | {metric.description} |"
        )
    return "\n".join(lines) + "\n"


def _panel(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    metrics = [BY_NAME[name] for name in panel.metrics]
    several = len(metrics) > 1
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(
            f"{metric.name}: {metric.description}" if several else metric.description
            for metric in metrics
        ),
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression(metric),
                "legendFormat": _legend(metric, several),
            }
            for index, metric in enumerate(metrics)
        ],
    }


def _legend(metric: Metric, several: bool) -> str:
    parts = ["{{run}}", *(f"{{{{{label}}}}}" for label in metric.labels)]
    return " ".join([*parts, *([metric.name.removesuffix("_total")] if several else [])])


def _variables() -> list[dict[str, Any]]:
    query = f'label_values({{__name__=~"{RAY_PREFIX}{PREFIX}.+"}}, run)'
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
        },
        {
            "name": "run",
            "label": "run",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "runs"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
        },
    ]


def main(arguments: Sequence[str]) -> None:
    """Print one of the two."""
    text = table() if "table" in arguments else json.dumps(dashboard(), indent=2) + "\n"
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])

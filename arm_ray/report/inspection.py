"""What `arm-ray inspect` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from arm_ray.checkpoints.inspect import Inspection

_LABELS = {"r": "rank", "lora_alpha": "alpha", "base_model_name_or_path": "base"}


def print_inspection(console: Console, found: Inspection) -> None:
    """Print a checkpoint's description as a table of two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(found):
        table.add_row(label, value)
    console.print(table, highlight=False, markup=False)


def print_run(console: Console, path: str, layout: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the checkpoints of a run's directory.

    Args:
        console: Where to.
        path: The directory.
        layout: How the trainer lays them out.
        rows: Of each: `step`, `path`, `complete` and `reason`.
    """
    console.print(
        f"{path} is a run's directory ({layout})", highlight=False, markup=False, soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("checkpoint", overflow="fold")
    table.add_column("complete", overflow="fold")
    for row in rows:
        complete = "yes" if row["complete"] else f"no: {row['reason']}"
        table.add_row(str(row["step"]), str(row["path"]), complete)
    console.print(table, highlight=False, markup=False)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    rows = [
        ("checkpoint", found.path),
        ("format", f"{found.format} ({found.found_by or 'nothing that is known'})"),
        ("step", "not known" if found.step is None else str(found.step)),
        ("complete", "yes" if found.complete else f"no: {found.reason}"),
    ]
    if not found.num_tensors:
        return rows
    config = found.config or "none: taken from the base"
    rows += [("configuration", config)]
    if found.model_type is not None:
        rows += [("model", str(found.model_type))]
    dtypes = ", ".join(f"{code} {count}" for code, count in sorted(found.dtypes.items()))
    rows += [
        ("tensors", f"{found.num_tensors} ({dtypes})"),
        ("parameters", f"{found.num_parameters:,}"),
        ("files", f"{found.file_bytes / 1e6:,.1f} MB"),
    ]
    details = {key: value for key, value in found.details.items() if value is not None}
    return rows + [(_LABELS.get(key, key), str(value)) for key, value in details.items()]

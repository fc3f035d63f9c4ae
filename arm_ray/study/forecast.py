"""What a study will take, from configurations and headers alone: starts and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arm_ray.config import MergeConfig, RuntimeConfig
from arm_ray.errors import ArmRayError
from arm_ray.planning.cluster import Cluster
from arm_ray.planning.plan import Plan, make_plan
from arm_ray.study.parts import Merge
from arm_ray.study.plan import Study
from arm_ray.study.records import CELL_NAME, CellRecord, read_record

GB = 1e9


@dataclass(frozen=True)
class MergeForecast:
    """A merge and what it is planned to need.

    Attributes:
        merge: The merge.
        plan: What it needs; None: it cannot be planned.
        problem: Why not; or that it does not fit; empty: it does.
        is_done: Whether an earlier run has done it.
    """

    merge: Merge
    plan: Plan | None
    problem: str
    is_done: bool


@dataclass(frozen=True)
class Forecast:
    """A study as it would run.

    Attributes:
        study: The study.
        merges: Each distinct merge.
        scorings: Models that are scored, each on all tasks.
    """

    study: Study
    merges: tuple[MergeForecast, ...]
    scorings: int

    @property
    def fits(self) -> bool:
        """Whether every merge can be planned and fits."""
        return not any(merge.problem for merge in self.merges)


def forecast(
    study: Study,
    make_cluster: Callable[[RuntimeConfig], Cluster],
    tokens_per_sample: int | None = None,
) -> Forecast:
    """Plan all merges of a study; those that differ only in what costs nothing are planned once.

    Args:
        study: The study. Its checkpoints need not exist, and of a base `config.json` is enough.
        make_cluster: The cluster for a merge's `runtime`.
        tokens_per_sample: As for `make_plan`.
    """
    known: dict[str, tuple[Plan | None, str]] = {}
    merges = []
    for merge in study.merges.values():
        # A merged model has the shapes of the base that it came from.
        config = merge.config.model_copy(update={"base": merge.run.root})
        key = _cost_key(config)
        if key not in known:
            known[key] = _planned(config, make_cluster, tokens_per_sample)
        plan, problem = known[key]
        record = read_record(CellRecord, merge.directory / CELL_NAME)
        is_done = record is not None and record.state != "failed"
        merges.append(MergeForecast(merge, plan, problem, is_done))
    return Forecast(study, tuple(merges), len(study.models) + len(study.merges))


def _planned(
    config: MergeConfig,
    make_cluster: Callable[[RuntimeConfig], Cluster],
    tokens_per_sample: int | None,
) -> tuple[Plan | None, str]:
    try:
        plan = make_plan(config, make_cluster(config.runtime), tokens_per_sample)
    except ArmRayError as error:
        return None, " ".join(str(error).split())
    return plan, "; ".join(plan.problems)


def _cost_key(config: MergeConfig) -> str:
    """Of what a plan depends on: not which checkpoints, which samples, or which number."""
    content = config.model_dump(mode="json", exclude={"output", "tracking", "evaluation"})
    content["candidates"] = [
        given if Path(given).exists() else "?" for given in content["candidates"]
    ]
    if content["calibration"] is not None:
        content["calibration"] = {
            key: content["calibration"][key] for key in ("batch_size", "max_length")
        }
    method = config.method
    content["method"] = [method.operator, method.needs_calibration, method.is_plain_sum]
    return json.dumps(content, sort_keys=True)


def forecast_text(found: Forecast) -> str:
    """A forecast for a terminal: cells, counts, and what each distinct merge needs."""
    study = found.study
    merges, runs = study.merges, study.runs
    trained = [run for run in runs if run.training is not None]
    done = sum(merge.is_done for merge in found.merges)
    lines = [
        f"{len(study.cells)} cells of {_counts(study)}",
        f"{len(trained)} trainings: "
        + (", ".join(f"{run} to step {run.training.stop_after}" for run in trained if run.training)
           or "none"),
        f"{len(merges)} different merges"
        + (f", {done} of them done" if done else "")
        + (f", {study.config.parallel} at once" if study.config.parallel > 1 else ""),
        f"{found.scorings} models scored on {', '.join(study.tasks)}: {len(merges)} merged, "
        f"{len(study.models)} others",
        "",
    ]  # fmt: skip
    for merge in found.merges:
        lines.append(f"{merge.merge.name}{' (done)' if merge.is_done else ''}")
        lines += [f"    {cell}" for cell in merge.merge.cells]
        lines.append(f"    {_need(merge)}")
    lines += ["", *_sums(found)]
    return "\n".join(lines) + "\n"


def _counts(study: Study) -> str:
    return " x ".join(f"{len(labels)} {axis}" for axis, labels in study.axes.items())


def _need(found: MergeForecast) -> str:
    plan = found.plan
    if plan is None:
        return f"cannot be planned: {found.problem}"
    text = (
        f"{plan.total_s:,.0f} s on {len(plan.shards)} shard(s) of {plan.device}, "
        f"{plan.disk.needed_bytes / GB:,.1f} GB of disk, of which the model takes "
        f"{plan.disk.model_bytes / GB:,.1f} GB"
    )
    return text if plan.fits else f"{text}; does not fit: {found.problem}"


def _sums(found: Forecast) -> list[str]:
    left = [merge for merge in found.merges if merge.plan is not None and not merge.is_done]
    plans = [merge.plan for merge in left if merge.plan is not None]
    config = found.study.config
    batch = len(found.merges) if config.keep_models or config.batch is None else config.batch
    models = sorted((plan.disk.model_bytes for plan in plans), reverse=True)[:batch]
    working = sorted(
        (plan.disk.needed_bytes - plan.disk.model_bytes for plan in plans), reverse=True
    )[: config.parallel]
    lines = [
        f"merges in all: {sum(plan.total_s for plan in plans):,.0f} s, one after another; "
        f"{(sum(models) + sum(working)) / GB:,.1f} GB of disk at most "
        f"({len(models)} models, and the states of {len(working)} merge(s) at work)",
        "trainings and scorings are not in these sums",
    ]
    assumptions = dict.fromkeys(note for plan in plans for note in plan.assumptions)
    if assumptions:
        lines += ["assumed:", *(f"  - {note}" for note in assumptions)]
    return lines

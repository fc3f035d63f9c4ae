"""Commands that do long work on Ray: merge, pipeline, study, attach."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import arm_ray
from arm_ray.cli.explaining import cluster_of
from arm_ray.cli.options import Commands, add_cluster, add_job, positive
from arm_ray.cli.saying import said
from arm_ray.model.imports import collection_paused, is_own_process
from arm_ray.secrets import hidden, shortened
from arm_ray.storage.urls import is_url

if TYPE_CHECKING:
    from arm_ray.config import MergeConfig

_LONGEST_LINE = 300
_MERGE = (
    "arm-ray merge merge.yaml",
    "arm-ray merge merge.yaml schedule.max_iterations=4 method.operator=ties",
    "arm-ray merge merge.yaml --quiet",
)
_PIPELINE = (
    "arm-ray pipeline pipeline.yaml",
    "arm-ray pipeline pipeline.yaml output=/runs/second --address 10.0.0.1:6379",
)
_STUDY = (
    "arm-ray study study.yaml --dry-run --gpus 8",
    "arm-ray study study.yaml",
    "arm-ray study study.yaml --render",
)
_ATTACH = (
    "arm-ray attach attach.yaml",
    "arm-ray attach attach.yaml run.path=/runs/sft run.start=all",
    "arm-ray attach attach.yaml --json",
)


def add_merge_to(commands: Commands) -> None:
    """`merge`."""
    merge = add_job(commands, "merge", _merge, "merge checkpoints, or go on with a merge", _MERGE)
    merge.add_argument(
        "--stop-after",
        type=positive,
        metavar="N",
        help="halt after iteration N; run again to go on",
    )


def add_others_to(commands: Commands) -> None:
    """`pipeline`, `study` and `attach`."""
    add_job(commands, "pipeline", _pipeline, "train, merge and score in one go", _PIPELINE)
    study = add_job(commands, "study", _study, "a grid of merges, scored and tabulated", _STUDY)
    study.add_argument(
        "--dry-run", action="store_true", help="say what there is to do and what it takes; no more"
    )
    study.add_argument(
        "--render", action="store_true", help="write tables and figures of what there is; no more"
    )
    add_cluster(study)
    add_job(commands, "attach", _attach, "follow a running training", _ATTACH)


def _begin(
    options: argparse.Namespace,
    job: str,
    where: Path | str,
    starts: Callable[[], None] = lambda: None,
) -> None:
    """Say at once what begins, and import what all jobs need, faster than by themselves.

    Args:
        options: The command line.
        job: What it is.
        where: The job's directory.
        starts: Starts what goes on meanwhile.
    """
    if not options.quiet and not options.json:
        line = f"arm_ray {arm_ray.__version__}: {job} in {hidden(str(where))}"
        print(shortened(line, _LONGEST_LINE), file=sys.stderr)
    starts()
    with collection_paused():
        importlib.import_module("arm_ray.runtime.merge.run")


def _start_ray(config: MergeConfig, address: str | None) -> None:
    """Have a local Ray start while torch is imported and inputs are checked, if it is needed."""
    from arm_ray.runtime.cluster.joining import is_up_or_named, local_slots, start_ray_early

    # The commonest mistake is told without waiting for a Ray that would only end again.
    is_there = is_url(config.base) or Path(config.base).is_dir()
    is_made = not is_url(config.output) and (Path(config.output) / "model").is_dir()
    # vLLM takes much longer to start than Ray, and asks for CPU slots that are not known yet.
    is_needed = config.runtime.asks_for_actors and config.evaluation is None and not is_made
    if is_own_process() and is_there and is_needed and not is_up_or_named(address):
        slots = local_slots(config.runtime, sys.maxsize)
        start_ray_early(slots, {"job": "merge", "output": config.output})


def _merge(options: argparse.Namespace) -> int:
    """Merge checkpoints as the YAML file says, or go on with the run in its output directory."""
    from arm_ray.config import load_merge_config

    config = load_merge_config(options.config, options.overrides)
    _begin(options, "merge", config.output, partial(_start_ray, config, options.address))
    from arm_ray.runtime.merge.run import merge

    with said(options) as out:
        done = merge(
            config, address=options.address, stop_after=options.stop_after, console=out.console
        )
        out.result(done.model or done.run)
    return 0


def _pipeline(options: argparse.Namespace) -> int:
    """Train, merge early checkpoints, score everything; stages that are done are not done again."""
    from arm_ray.training.pipeline import load_pipeline_config

    config = load_pipeline_config(options.config, options.overrides)
    _begin(options, "pipeline", config.output)
    from arm_ray.runtime.pipeline import run_pipeline

    with said(options) as out:
        run_pipeline(config, source=options.config, address=options.address, console=out.console)
        out.result(config.output)
    return 0


def _study(options: argparse.Namespace) -> int:
    """Train, merge and score every combination of a grid; what is done is not done again.

    The exit code is 1 where something failed, or of a dry run where something does not fit.
    """
    from arm_ray.study.config import load_study_config

    config = load_study_config(options.config, options.overrides)
    if options.dry_run:
        from arm_ray.study.forecast import forecast, forecast_text
        from arm_ray.study.plan import Study

        study = Study(config, options.config)
        found = forecast(
            study, lambda runtime: cluster_of(options, runtime), options.tokens_per_sample
        )
        print(forecast_text(found), end="")
        return 0 if found.fits else 1
    if not options.render:
        _begin(options, "study", config.output)
    from arm_ray.runtime.study.run import render_study, run_study

    if options.render:
        for path in render_study(config, source=options.config):
            print(path)
        return 0
    with said(options) as out:
        done = run_study(
            config, source=options.config, address=options.address, console=out.console
        )
        out.result(done.study.output)
    return 1 if done.failed else 0


def _attach(options: argparse.Namespace) -> int:
    """Merge every new checkpoint of a run that is still going, score it, publish what is better."""
    from arm_ray.following.config import load_attach_config

    config = load_attach_config(options.config, options.overrides)
    _begin(options, "attach", config.published)
    from arm_ray.runtime.attach.run import attach

    with said(options) as out:
        done = attach(config, address=options.address, console=out.console)
        out.result(done.best or config.published)
    return 0

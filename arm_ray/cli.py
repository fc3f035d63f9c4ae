"""`arm-ray`: the command line. It parses, calls, and turns errors into exit codes.

Exit codes: 0 success, 1 an error that the message explains, 2 a wrong command line,
130 interrupted (run the same command again to go on). One module, because a command's arguments
and what is done with them are read together.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import arm_ray
from arm_ray.checkpoints.naming import FORMATS, FormatOrAuto, split_source
from arm_ray.errors import ArmRayError, ConfigError
from arm_ray.model.imports import OWN_PROCESS, collection_paused
from arm_ray.storage.urls import is_url, plain_path

if TYPE_CHECKING:
    from arm_ray.config import EvaluateConfig, RuntimeConfig
    from arm_ray.planning.cluster import Cluster

# What else a command needs is imported by the command: help comes at once, and a typing error in a
# configuration before anything heavy is loaded.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if arguments is None:
        os.environ.update(OWN_PROCESS)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides before an option only; take those after it as well.
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown or not hasattr(options, "overrides"):
        parser.parse_args(arguments)
    options.overrides = [*getattr(options, "overrides", ()), *rest]
    # `ray job stop` and schedulers send SIGTERM: leave through the same clean-up as Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if "config" in options:
            options.config = plain_path(options.config)
        return int(options.run(options))
    except ArmRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 or more")
    return value


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arm-ray", description="Merge a training run's checkpoints without training, on Ray."
    )
    parser.add_argument("--version", action="version", version=arm_ray.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    merge = _add_job(commands, "merge", _merge, "merge checkpoints, or go on with a merge")
    merge.add_argument(
        "--stop-after",
        type=_positive,
        metavar="N",
        help="halt after iteration N; run again to go on",
    )
    _add_evaluate(commands)
    _add_job(commands, "pipeline", _pipeline, "train, merge and score in one go")
    study = _add_job(commands, "study", _study, "a grid of merges, scored and tabulated")
    study.add_argument(
        "--dry-run", action="store_true", help="say what there is to do and what it takes; no more"
    )
    study.add_argument(
        "--render", action="store_true", help="write tables and figures of what there is; no more"
    )
    _add_cluster(study)
    _add_job(commands, "attach", _attach, "follow a running training")
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint is, and if it is whole",
        description=_inspect.__doc__,
    )
    inspect.add_argument("path", metavar="PATH", help="a directory, a URL, or FORMAT:PATH")
    inspect.add_argument("--format", choices=FORMATS, help="read it as that; default: as it looks")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    plan = _add_configured(commands, "plan", _plan, "memory, disk, work and time of a merge")
    _add_cluster(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_looks(commands)
    keys = commands.add_parser(
        "config", help="what a configuration key means", description=_config.__doc__
    )
    keys.add_argument(
        "key", nargs="?", metavar="KEY", help="schedule.window_size; a section: all its keys"
    )
    keys.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    keys.set_defaults(run=_config)
    return parser


def _add_looks(commands: Any) -> None:
    """Commands that look at runs, and change nothing of them."""
    report = commands.add_parser(
        "report", help="a run as one HTML page", description=_report.__doc__
    )
    report.add_argument("runs", nargs="+", metavar="RUN_DIR", help="several are compared")
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the first directory"
    )
    report.set_defaults(run=_report)
    status = commands.add_parser("status", help="how a run stands", description=_status.__doc__)
    status.add_argument("path", nargs="?", metavar="RUN_DIR")
    status.add_argument(
        "--address", help="Ray cluster (HOST:6379) or its dashboard (http://HOST:8265)"
    )
    status.add_argument("--watch", action="store_true", help="say it again every 2 s, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    serve = commands.add_parser(
        "serve", help="a run's report in the browser, live", description=_serve.__doc__
    )
    serve.add_argument("path", metavar="RUN_DIR")
    serve.add_argument("--port", type=_count, default=0, metavar="N", help="default: a free one")
    serve.set_defaults(run=_serve)


def _add_configured(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command of a configuration file and its overrides."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=run.__doc__)
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="take precedence over the file"
    )
    command.set_defaults(run=run)
    return command


def _add_job(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command of a configuration file that works on Ray."""
    command = _add_configured(commands, name, run, text)
    _add_address(command)
    return command


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, else local")


def _add_cluster(command: argparse.ArgumentParser) -> None:
    """What is planned for, instead of this machine's CPUs."""
    command.add_argument("--gpus", type=_positive, metavar="N", help="GPUs in all; default: enough")
    command.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one GPU; default: the device's"
    )
    command.add_argument("--nodes", type=_positive, default=1, metavar="M", help="default: 1")
    command.add_argument(
        "--device",
        metavar="NAME",
        help="h100-80gb, a100-80gb, h200, cpu, or this-cpu (measured); "
        "default: h100-80gb with --gpus, else cpu",
    )
    command.add_argument(
        "--tokens-per-sample",
        type=_positive,
        metavar="N",
        help="default: calibration.max_length, the most there can be",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="score models on benchmarks", description=_evaluate.__doc__
    )
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="CONFIG.yaml | [NAME=]MODEL_DIR",
        help="a configuration and section.key=value overrides, or models; the others are compared "
        "with the first",
    )
    evaluate.add_argument("--tasks", metavar="A,B", help="benchmarks to score them on")
    evaluate.add_argument("--data", metavar="DIR", help="directory of the benchmarks' files")
    evaluate.add_argument("--output", metavar="DIR", help="default: below runs/")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="the first N problems")
    evaluate.add_argument(
        "--lm-eval", metavar="A,B", help="tasks of lm-evaluation-harness, after the benchmarks"
    )
    evaluate.add_argument(
        "--lm-eval-path", metavar="DIR", help="directory of lm-eval task files of your own"
    )
    evaluate.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="examples in the prompts of lm-eval tasks"
    )
    evaluate.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="put prompts of lm-eval tasks through the tokenizer's chat template",
    )
    evaluate.add_argument("--tokenizer", metavar="DIR", help="for all models; default: their own")
    evaluate.add_argument("--adapter-base", metavar="DIR", help="base of models that are adapters")
    evaluate.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="take precedence over the file, for example evaluation.sampling.temperature=0",
    )
    _add_address(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _import_runtime() -> None:
    """Import what all jobs need, faster than they would by themselves."""
    with collection_paused():
        importlib.import_module("arm_ray.runtime.merge.run")


def _merge(options: argparse.Namespace) -> int:
    """Merge checkpoints as the YAML file says, or go on with the run in its output directory."""
    from arm_ray.config import load_merge_config

    config = load_merge_config(options.config, options.overrides)
    _import_runtime()
    from arm_ray.runtime.merge.run import merge

    merge(config, address=options.address, stop_after=options.stop_after)
    return 0


def _pipeline(options: argparse.Namespace) -> int:
    """Train, merge early checkpoints, score everything; stages that are done are not done again."""
    from arm_ray.training.pipeline import load_pipeline_config

    config = load_pipeline_config(options.config, options.overrides)
    _import_runtime()
    from arm_ray.runtime.pipeline import run_pipeline

    run_pipeline(config, source=options.config, address=options.address)
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
            study, lambda runtime: _cluster(options, runtime), options.tokens_per_sample
        )
        print(forecast_text(found), end="")
        return 0 if found.fits else 1
    _import_runtime()
    from arm_ray.runtime.study.run import render_study, run_study

    if options.render:
        for path in render_study(config, source=options.config):
            print(path)
        return 0
    done = run_study(config, source=options.config, address=options.address)
    return 1 if done.failed else 0


def _attach(options: argparse.Namespace) -> int:
    """Merge every new checkpoint of a run that is still going, score it, publish what is better."""
    from arm_ray.following.config import load_attach_config

    config = load_attach_config(options.config, options.overrides)
    _import_runtime()
    from arm_ray.runtime.attach.run import attach

    attach(config, address=options.address)
    return 0


def _report(options: argparse.Namespace) -> int:
    """Write what runs have come to as one HTML page, which needs no network; several are compared.

    A run that is not finished, or lacks files, is shown as far as it goes.
    """
    from arm_ray.report.page.write import write_report

    output = None if options.output is None else Path(options.output)
    print(write_report([_run_directory(run) for run in options.runs], output))
    return 0


def _status(options: argparse.Namespace) -> int:
    """Say how a run stands, from its directory, or what of ours runs in a Ray cluster.

    The exit code is 1 where the run has failed, or the directory holds none.
    """
    if (options.path is None) == (options.address is None):
        raise ConfigError(
            "there is not one thing to tell the status of",
            where="command line",
            got="both" if options.path else "neither RUN_DIR nor --address",
            expected="RUN_DIR or --address",
        )
    import time

    while True:
        told, code = _status_text(options)
        # From the top left, and what is below goes.
        print(f"\033[H\033[J{told}" if options.watch and sys.stdout.isatty() else told, flush=True)
        if not options.watch:
            return code
        time.sleep(2.0)


def _run_directory(given: str) -> Path:
    """The directory of a run that is looked at."""
    if is_url(given):
        from arm_ray.storage.secrets import hidden

        raise ConfigError(
            "a run at a URL is not looked at from here",
            where=hidden(given),
            expected="a directory",
            hint="its report.html is there; or copy events.jsonl, config.yaml and evaluation/",
        )
    return Path(plain_path(given))


def _status_text(options: argparse.Namespace) -> tuple[str, int]:
    import json

    from arm_ray.report.status import lines_of, status_of

    if options.path is not None:
        status = status_of(_run_directory(options.path))
        code = 1 if status.state in ("failed", "foreign") else 0
        if options.json:
            return json.dumps(status.to_dict(), indent=None if options.watch else 2), code
        return "\n".join(lines_of(status)), code
    import dataclasses

    from arm_ray.runtime.cluster.jobs import jobs_of

    found, lines = [], []
    for job in jobs_of(options.address):
        entry: dict[str, Any] = dataclasses.asdict(job)
        lines.append(f"{job.job} {job.output}: {job.state} ({job.id}, arm_ray {job.version})")
        if job.output and Path(job.output).is_dir():
            status = status_of(Path(job.output), is_running=job.state == "RUNNING")
            entry["run"] = status.to_dict()
            lines += [f"  {line}" for line in lines_of(status)]
        elif job.output:
            lines.append("  its directory cannot be seen from here")
        found.append(entry)
    if options.json:
        return json.dumps(found, indent=None if options.watch else 2), 0
    return "\n".join(lines) or "no job of arm_ray is known there", 0


def _serve(options: argparse.Namespace) -> int:
    """Show a run's report in the browser of this machine, refreshed as events come."""
    from arm_ray.report.run_record import open_record
    from arm_ray.report.serving import PageServer

    run = open_record(_run_directory(options.path)).path
    with PageServer(run, options.port) as server:
        try:
            print(f"{server.url} shows {run}; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
    return 0


def _config(options: argparse.Namespace) -> int:
    """Print what a configuration key means, takes, defaults to, and what reads it."""
    from arm_ray import config_keys

    if options.markdown:
        print(config_keys.as_markdown(), end="")
    elif options.key is None:
        print(config_keys.listing())
    else:
        print(config_keys.describe(config_keys.find_keys(options.key)))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    """Say what a directory is: a checkpoint, of which format, step and size; or a run with some.

    The exit code is 1 where it is not complete.
    """
    named, text = split_source(plain_path(options.path))
    if is_url(text):
        return _inspect_url(text, options.format or named, options.json)
    path = Path(text).expanduser().absolute()
    import json

    from rich.console import Console

    from arm_ray.checkpoints.inspect import inspect_checkpoint
    from arm_ray.report.inspection import print_inspection, print_run

    found = inspect_checkpoint(path, options.format or named)
    layout, rows = _checkpoints_of(path, found.found_by)
    is_checkpoint = bool(found.found_by) or not rows
    if options.json:
        content: dict[str, Any] = found.to_dict() if is_checkpoint else {"path": str(path)}
        content |= {"layout": layout, "checkpoints": rows} if rows else {}
        print(json.dumps(content, indent=2))
    else:
        console = Console()
        if is_checkpoint:
            print_inspection(console, found)
        if rows:
            print_run(console, str(path), layout, rows)
    if is_checkpoint:
        return 0 if found.complete else 1
    return 0 if any(row["complete"] for row in rows) else 1


def _inspect_url(url: str, format: FormatOrAuto, as_json: bool) -> int:  # noqa: A002
    import json

    from rich.console import Console

    from arm_ray.checkpoints.inspect import inspect_url
    from arm_ray.config import scratch_path
    from arm_ray.report.inspection import print_inspection

    found = inspect_url(url, format, scratch_path(None))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(Console(), found)
    return 0 if found.complete else 1


def _checkpoints_of(path: Path, found_by: str) -> tuple[str, list[dict[str, Any]]]:
    """How a run lays out its checkpoints, and those of it that are in a directory."""
    from arm_ray.checkpoints.formats import missing
    from arm_ray.following.layouts import RunWatcher

    watcher = RunWatcher(path, missing=missing)
    try:
        # What nothing else says is complete, two looks at the same files do.
        watcher.scan()
        found = watcher.scan()
    except ConfigError:
        return "", []
    if found_by and watcher.layout == "deepspeed" and len(found) < 2:
        return "", []  # one checkpoint, with its shards in a directory below
    rows = [
        {"step": f.step, "path": str(f.path), "complete": f.complete, "reason": f.reason}
        for f in found
    ]
    return watcher.layout, rows


def _evaluate(options: argparse.Namespace) -> int:
    """Score models on benchmarks with vLLM, and compare each with the first, problem by problem."""
    given = options.lm_eval_path or options.num_fewshot is not None or options.apply_chat_template
    if given and not options.lm_eval:
        raise ConfigError(
            "options of lm-eval tasks are given, and no such task",
            where="command line",
            expected="--lm-eval with names of tasks, for example --lm-eval arc_easy",
        )
    config = evaluate_config(options)
    from rich.console import Console

    console = Console()
    if not options.lm_eval:
        from arm_ray.runtime.scoring.evaluate import evaluate

        evaluate(config, address=options.address, console=console)
        return 0
    from arm_ray.runtime.scoring.lm_eval import LmEvalOptions, evaluate_lm_eval, open_lm_eval

    lm_eval = LmEvalOptions(
        _names(options.lm_eval),
        options.lm_eval_path,
        options.num_fewshot,
        options.limit,
        options.apply_chat_template,
    )
    # A wrong name is told before the benchmarks, which may take hours.
    tasks = open_lm_eval(lm_eval)
    if config.evaluation.tasks:
        from arm_ray.runtime.scoring.evaluate import evaluate

        evaluate(config, address=options.address, console=console)
    evaluate_lm_eval(config, lm_eval, tasks, address=options.address, console=console)
    return 0


def evaluate_config(options: argparse.Namespace) -> EvaluateConfig:
    """The configuration that the command line of `evaluate` asks for.

    It has no tasks of ours where there are only those of lm-evaluation-harness.

    Raises:
        ConfigError: It is not one, or lacks the tasks.
    """
    from arm_ray.config import EvaluateConfig, read_yaml, validate

    given: list[str] = options.models
    from_file = given[0].endswith((".yaml", ".yml"))
    overrides = [*(given[1:] if from_file else []), *options.overrides]
    content: dict[str, Any] = (
        read_yaml(Path(given[0])) if from_file else {"models": _named_models(given)}
    )
    source = given[0] if from_file else "command line"
    evaluation = _evaluation_section(content, source)
    if options.tasks:
        evaluation["tasks"] = list(_names(options.tasks))
    if options.data:
        evaluation["data_dir"] = options.data
    if options.limit and evaluation.get("tasks"):
        evaluation["tasks"] = _limited(evaluation["tasks"], options.limit, source)
    for key in ("tokenizer", "adapter_base", "output"):
        if getattr(options, key):
            content[key] = getattr(options, key)
    only_lm_eval = bool(options.lm_eval) and not evaluation.get("tasks")
    if only_lm_eval:
        # Checked as a name like any other, and taken out again below.
        evaluation["tasks"] = [options.lm_eval]
    if not evaluation.get("tasks"):
        raise ConfigError(
            "there is nothing to score the models on",
            where=source,
            expected="--tasks with names of benchmarks, for example --tasks gsm8k,math500",
        )
    if "output" not in content:
        import hashlib
        import json

        # Where the models are missing, the check below says so.
        asked = [content.get("models"), evaluation["tasks"]]
        text = json.dumps(asked, sort_keys=True, default=str)
        content["output"] = f"runs/evaluate-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    config = validate(EvaluateConfig, content, overrides, source=source)
    if only_lm_eval and config.evaluation.tasks == (options.lm_eval,):
        import dataclasses

        without = dataclasses.replace(config.evaluation, tasks=())
        return config.model_copy(update={"evaluation": without})
    return config


def _evaluation_section(content: dict[str, Any], source: str) -> dict[str, Any]:
    """The section `evaluation` of the content; an empty one, put there, where it has none."""
    section = content.get("evaluation")
    # A section with nothing below its name parses as null.
    if section is None:
        section = content["evaluation"] = {}
    if not isinstance(section, dict):
        raise ConfigError(
            "the section `evaluation` does not hold keys and values",
            where=source,
            got=repr(section),
            expected="a mapping with tasks, data_dir, sampling, …",
        )
    return section


def _limited(tasks: Any, limit: int, source: str) -> list[Any]:
    """The tasks with a limit each."""
    if not isinstance(tasks, list):
        raise ConfigError(
            "the tasks are no list",
            where=f"{source}: evaluation.tasks",
            got=repr(tasks),
            expected="names of benchmarks or tasks in full, for example [gsm8k, math500]",
        )
    named = [{"name": task} if isinstance(task, str) else task for task in tasks]
    # What is neither a name nor a mapping is told with all other problems.
    return [{**task, "limit": limit} if isinstance(task, dict) else task for task in named]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _named_models(given: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR`, or a directory under its last parts; a name has no slash."""
    models: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            parts = Path(split_source(text)[1]).parts
            name, path = parts[-1] if parts else text, text
            if name in models and len(parts) > 1:
                name = f"{parts[-2]}-{parts[-1]}"
        if name in models:
            raise ConfigError(
                "two models have the same name", got=text, expected="NAME=DIR with another name"
            )
        models[name] = path
    return models


def _plan(options: argparse.Namespace) -> int:
    """Say what a merge will need, from its configuration and headers; starts and reads nothing.

    The exit code is 1 where it does not fit.
    """
    from arm_ray.config import load_merge_config

    config = load_merge_config(options.config, options.overrides)
    from arm_ray.planning.plan import make_plan
    from arm_ray.planning.render import render

    plan = make_plan(config, _cluster(options, config.runtime), options.tokens_per_sample)
    import json

    print(json.dumps(plan.to_dict(), indent=2) if options.json else render(plan), end="")
    if options.json:
        print()
    return 0 if plan.fits else 1


def _cluster(options: argparse.Namespace, runtime: RuntimeConfig) -> Cluster:
    """The cluster that is planned for."""
    from arm_ray.planning.cluster import make_cluster

    return make_cluster(
        runtime,
        gpus=options.gpus,
        gpu_memory_gb=options.gpu_memory,
        nodes=options.nodes,
        device=options.device,
    )


if __name__ == "__main__":
    sys.exit(main())

"""The command `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_ray.checkpoints.naming import split_source
from arm_ray.cli.options import Commands, add_command, add_running, count, positive
from arm_ray.cli.saying import said
from arm_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from arm_ray.config import EvaluateConfig

_EXAMPLES = (
    "arm-ray evaluate base=/models/base runs/merge/model --tasks gsm8k,math500 --limit 100",
    "arm-ray evaluate evaluate.yaml --set evaluation.sampling.temperature=0",
    "arm-ray evaluate /models/base runs/merge/model --lm-eval arc_easy,hellaswag",
)


def add_to(commands: Commands) -> None:
    """Add the command."""
    evaluate = add_command(commands, "evaluate", _evaluate, "score models on benchmarks", _EXAMPLES)
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
    evaluate.add_argument("--limit", type=positive, metavar="N", help="the first N problems")
    evaluate.add_argument(
        "--lm-eval", metavar="A,B", help="tasks of lm-evaluation-harness, after the benchmarks"
    )
    evaluate.add_argument(
        "--lm-eval-path", metavar="DIR", help="directory of lm-eval task files of your own"
    )
    evaluate.add_argument(
        "--num-fewshot", type=count, metavar="N", help="examples in the prompts of lm-eval tasks"
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
    add_running(evaluate)


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

    # The numbers are what it is asked for.
    with said(options, Console()) as out:
        _score(config, options, out.console)
        out.result(config.output)
    return 0


def _score(config: EvaluateConfig, options: argparse.Namespace, console: Console | None) -> None:
    if not options.lm_eval:
        from arm_ray.runtime.scoring.evaluate import evaluate

        evaluate(config, address=options.address, console=console)
        return
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

"""Commands that explain: plan, config, completion."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from arm_ray.cli.options import Commands, add_cluster, add_command, add_configured

if TYPE_CHECKING:
    from arm_ray.config import RuntimeConfig
    from arm_ray.planning.cluster import Cluster

_PLAN = (
    "arm-ray plan merge.yaml",
    "arm-ray plan merge.yaml --gpus 8 --device h100-80gb",
    "arm-ray plan merge.yaml schedule.max_iterations=1 --json",
)
_CONFIG = ("arm-ray config", "arm-ray config schedule", "arm-ray config method.coefficient")
_COMPLETION = (
    "arm-ray completion bash > ~/.local/share/bash-completion/completions/arm-ray",
    "arm-ray completion zsh > ~/.zfunc/_arm-ray",
    "arm-ray completion fish > ~/.config/fish/completions/arm-ray.fish",
)
# What arguments are called that are files or directories.
_FILES = (
    "CONFIG.yaml",
    "CONFIG.yaml | [NAME=]MODEL_DIR",
    "DIR",
    "FILE",
    "MODEL_DIR",
    "MODEL_DIR | RUN_DIR",
    "PATH",
    "RUN_DIR",
    "RUN_DIR | MODEL_DIR",
)
_SHELLS = ("bash", "zsh", "fish")


def add_plan_to(commands: Commands) -> None:
    """`plan`."""
    plan = add_configured(commands, "plan", _plan, "memory, disk, work and time of a merge", _PLAN)
    add_cluster(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")


def add_others_to(commands: Commands) -> None:
    """`config` and `completion`."""
    keys = add_command(commands, "config", _config, "what a configuration key means", _CONFIG)
    keys.add_argument(
        "key", nargs="?", metavar="KEY", help="schedule.window_size; a section: all its keys"
    )
    keys.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    completion = add_command(
        commands, "completion", _completion, "complete commands in a shell", _COMPLETION
    )
    completion.add_argument("shell", choices=_SHELLS)


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


def _plan(options: argparse.Namespace) -> int:
    """Say what a merge will need, from its configuration and headers; starts and reads nothing.

    The exit code is 1 where it does not fit.
    """
    from arm_ray.config import load_merge_config

    config = load_merge_config(options.config, options.overrides)
    from arm_ray.planning.render import render
    from arm_ray.runtime.plan import plan_of

    plan = plan_of(config, cluster_of(options, config.runtime), options.tokens_per_sample)
    import json

    print(json.dumps(plan.to_dict(), indent=2) if options.json else render(plan), end="")
    if options.json:
        print()
    return 0 if plan.fits else 1


def cluster_of(options: argparse.Namespace, runtime: RuntimeConfig) -> Cluster:
    """The cluster that is planned for."""
    from arm_ray.planning.cluster import make_cluster

    return make_cluster(
        runtime,
        gpus=options.gpus,
        gpu_memory_gb=options.gpu_memory,
        nodes=options.nodes,
        device=options.device,
    )


def _completion(options: argparse.Namespace) -> int:
    """Print what a shell needs to complete commands, options and files of arm-ray."""
    import shtab

    from arm_ray.cli.parser import make_parser

    parser = make_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, shell=options.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Have what is not an option's choice completed with names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, how)
        elif action.metavar in _FILES:
            action.complete = how  # type: ignore[attr-defined]

"""What is checked before a run is followed: paths, the output directory, the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.weight_file import atomic_file
from arm_ray.config import read_yaml
from arm_ray.errors import ArmRayError, RunDirectoryError
from arm_ray.following.config import AttachConfig
from arm_ray.model.layout import check_layout, load_config, model_layout
from arm_ray.runtime.cluster.joining import outliving
from arm_ray.schedule import BASE

_CONFIG_NAME = "config.yaml"


def check_outlives_job(config: AttachConfig) -> None:
    """Refuse relative paths in a submitted job, whose working directory is a temporary copy.

    Raises:
        ConfigError: Names the key.
    """
    given = {"publish.dir": config.publish.dir, "run.path": config.run.path}
    if config.output is not None:
        given["output"] = config.output
    for key, path in given.items():
        outliving(path, key)


def open_work(config: AttachConfig) -> None:
    """Write the configuration down, unless the directory follows something else.

    Raises:
        RunDirectoryError: It belongs to another run, or merges otherwise.
    """
    file = config.work / _CONFIG_NAME
    content = config.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False)
    if file.is_file():
        before, after = _identity(read_yaml(file)), _identity(content)
        keys = sorted({*before, *after})
        differing = [key for key in keys if before.get(key) != after.get(key)]
        if differing:
            lines = [f"      {key}: {before.get(key)} -> {after.get(key)}" for key in differing]
            raise RunDirectoryError(
                "the output directory follows a run with another configuration",
                where=config.work,
                got="\n" + "\n".join(lines),
                hint="choose another publish.dir and output, or restore these keys to go on",
            )
    with atomic_file(file) as written:
        written.write(text.encode())


def _identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay as it was for the arrivals to be one stream."""
    run, merging = content.get("run") or {}, content.get("merge") or {}
    scoring = content.get("evaluation") or {}
    return {
        "evaluation.select": scoring.get("select"),
        "evaluation.tasks": scoring.get("tasks"),
        "run.path": run.get("path"),
        "run.kind": run.get("kind"),
        "publish.dir": (content.get("publish") or {}).get("dir"),
        **{f"merge.{key}": value for key, value in merging.items() if key != "runtime"},
    }


def check_base(config: AttachConfig) -> None:
    """Open the base: what is wrong with it is wrong with every arrival.

    Raises:
        CheckpointError: Any of its kinds.
    """
    try:
        base = open_given(config.merge.base)
        check_layout(model_layout(load_config(base), 1), base, BASE)
    except ArmRayError as error:
        raise error.of("merge.base") from None

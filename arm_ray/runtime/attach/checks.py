"""What is checked before a run is followed: paths, the output directory, the base."""

from __future__ import annotations

import yaml

from arm_ray.checkpoints.formats import open_given
from arm_ray.config import read_yaml
from arm_ray.errors import ArmRayError
from arm_ray.following.config import AttachConfig
from arm_ray.identity import differences, identity
from arm_ray.model.checks import check_layout, layout_of
from arm_ray.runtime.cluster.joining import outliving
from arm_ray.runtime.output.claim import CONFIG_NAME, refuse_other, write_config
from arm_ray.schedule import BASE


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
    file = config.work / CONFIG_NAME
    content = config.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False)
    if file.exists():
        before, after = (identity(AttachConfig, given) for given in (read_yaml(file), content))
        refuse_other(
            config.work,
            differences(before, after),
            "the output directory follows",
            "choose another publish.dir and output, or restore these keys to go on",
        )
    write_config(config.work, text)


def check_base(config: AttachConfig) -> None:
    """Open the base: what is wrong with it is wrong with every arrival.

    Raises:
        CheckpointError: Any of its kinds.
    """
    try:
        base = open_given(config.merge.base)
        check_layout(layout_of(base, trusted=config.trusted_families), base, BASE)
    except ArmRayError as error:
        raise error.of("merge.base") from None
